// The columns traversal: neighbouring channels side by side, their positions one below the other.
//
//                channels ->
//   position 0   [ lane 0 ][ lane 1 ] ... [ lane threads_x - 1 ]   a pack of channels each
//   position 1   [        ][        ]                              taken by the next threads_x threads
//   ...          down a piece of the positions, threads_y at a time, several under way
//
// A thread keeps its channels and has one accumulator for each. At the end the block merges the accumulators of a
// channel over its rows of threads.
#pragma once

#include <algorithm>
#include <bit>

#include "element.cuh"
#include "fast_div.h"
#include "group_reduce.cuh"
#include "stats.cuh"

namespace fastnorm::cuda {

constexpr int log2_of(int power) { return std::countr_zero(static_cast<unsigned>(power)); }

// A geometry and its grid as columns kernels need them.
struct ColumnsShape {
  int64_t C, positions, outer;
  int64_t groups, set_channels;  // sets per outer, channels per set
  int64_t items, pieces, piece_length, tiles;
  int staged_length;
  int tile, threads_x, threads_y;
  int log_threads_x, log_threads_y;  // both are powers of two
  int log_row_threads;               // see merged_rows
  WideDiv by_fast, by_slow;          // of items: see ColumnsPiece
  FastDiv by_set_channels;
  int64_t mask_row_bytes;
  bool set_params;     // the channels of a set, which here are the elements of a run, have one weight
  bool per_position;   // every position has statistics of its own: the weights' gradients of a LayerNorm
  bool pieces_adjoin;  // neighbouring items: the pieces of a tile (gangs); else the tiles of a piece, which adjoin in
                       // memory
  bool backwards;      // items are taken from the last to the first
};

inline ColumnsShape columns_shape(const Geometry& g, const Grid& grid, DType dtype) {
  if (is_planar_batch(g)) {
    ColumnsShape s = columns_shape(samples_as_rows(g), grid, dtype);
    s.set_params = true;
    return s;
  }
  ColumnsShape s{};
  s.C = g.C;
  s.outer = g.outer();
  s.positions = g.positions();
  s.set_channels = g.set_channels();
  s.per_position = g.per_element();
  if (s.per_position) {
    s.outer = 1;
    s.positions = g.N;
  }
  s.groups = g.C / s.set_channels;
  s.items = grid.items;
  s.pieces = grid.pieces;
  s.piece_length = grid.piece_length;
  s.staged_length = static_cast<int>(grid.staged_length);
  s.tile = static_cast<int>(grid.tile);
  s.tiles = (g.C + grid.tile - 1) / grid.tile;
  s.threads_x = grid.threads_x;
  s.threads_y = grid.threads_y;
  s.log_threads_x = log2_of(s.threads_x);
  s.log_threads_y = log2_of(s.threads_y);
  s.log_row_threads = std::max(s.log_threads_x, log2_of(kWarp));
  s.pieces_adjoin = grid.gang != Gang::kBlock;
  s.by_fast = WideDiv(s.pieces_adjoin ? s.pieces : s.tiles);
  s.by_slow = WideDiv(s.pieces_adjoin ? s.tiles : s.pieces);
  // The binding refuses calls of 2^31 channels in several groups; with one group there is nothing to divide.
  s.by_set_channels = FastDiv(s.groups == 1 ? 1 : s.set_channels);
  // Where positions have statistics of their own, forward wrote the mask along the sets' runs.
  s.mask_row_bytes = mask_row_bytes(g.mask_run(), dtype);
  return s;
}

// Positions that a thread takes at a time for moments, and copies at a time. Half as many cost a sixth more
// instructions; twice as many leave too many over, because a block of 512 threads has 13 packs for each.
constexpr int kMomentsRows = 4;

// Some positions of an item.
struct Range {
  int begin, end;
};

// A position of this thread's pack: within its item, and the pack's first element.
struct PackPlace {
  int position;
  int64_t element;
};

// The positions of a round that a thread has: all of them, or those before the end of the last round.
struct FullRound {
  bool in;
  FASTNORM_DEVICE bool operator[](int) const { return in; }
};
struct LastRound {
  bool in;
  int left, step;  // positions from the thread's first to the end
  FASTNORM_DEVICE bool operator[](int u) const { return in && u * step < left; }
};

// This thread's part of one item.
template <int W>
struct ColumnsPiece {
  const ColumnsShape& shape;
  int64_t outer, first_row, first_channel;
  int piece;
  int positions, channels;  // of the item
  int x, y;                 // this thread's column of packs and its first position
  int64_t channel;          // of this thread's first lane
  bool in;                  // this thread has channels

  // Has no positions and no channels where the item is not `valid`.
  FASTNORM_DEVICE explicit ColumnsPiece(const ColumnsShape& s, int64_t item, bool valid = true) : shape(s) {
    const int64_t fast = s.by_fast.divisor, slow = s.by_slow.divisor;
    const int64_t row = s.by_fast.divide(item), in_row = item - row * fast;
    outer = s.by_slow.divide(row);
    const int64_t in_outer = row - outer * slow, tile = s.pieces_adjoin ? in_outer : in_row;
    piece = static_cast<int>(s.pieces_adjoin ? in_row : in_outer);
    const int64_t first_position = piece * s.piece_length;
    first_row = outer * s.positions + first_position;
    first_channel = tile * s.tile;
    positions = valid ? positions_of(piece) : 0;
    channels = valid ? static_cast<int>(std::min(static_cast<int64_t>(s.tile), s.C - first_channel)) : 0;
    x = thread_index() & (s.threads_x - 1);
    y = thread_index() >> s.log_threads_x;
    channel = first_channel + x * W;
    in = x * W < channels;
  }

  // The number of positions of one of the pieces.
  FASTNORM_DEVICE int positions_of(int of_piece) const {
    const int64_t left = shape.positions - of_piece * shape.piece_length;
    return static_cast<int>(std::min(shape.piece_length, left));
  }
  FASTNORM_DEVICE int64_t row(int position) const { return first_row + position; }
  FASTNORM_DEVICE int64_t element(int position) const { return row(position) * shape.C + channel; }
  FASTNORM_DEVICE uint8_t* mask_byte(uint8_t* mask, int position) const {
    return mask + row(position) * shape.mask_row_bytes + channel / 8;
  }
  FASTNORM_DEVICE unsigned mask_bits(const uint8_t* mask, const PackPlace& place) const {
    const int position = place.position;
    if (!shape.per_position) return load_mask<W>(mask + row(position) * shape.mask_row_bytes, channel);
    return load_mask<W>(mask + (row(position) * shape.groups + group(0)) * shape.mask_row_bytes,
                        channel - group(0) * shape.set_channels);
  }
  // The set, among those of an outer, of a channel; of lane w.
  FASTNORM_DEVICE int64_t group_of(int64_t of_channel) const {
    return shape.groups == 1 ? 0 : shape.by_set_channels.divide(static_cast<uint32_t>(of_channel));
  }
  FASTNORM_DEVICE int64_t group(int w) const { return group_of(channel + w); }
  // The set of lane w; it depends on the position only where per_position is set.
  FASTNORM_DEVICE int64_t set(int w, int position = 0) const {
    return (shape.per_position ? row(position) : outer) * shape.groups + group(w);
  }
  // The first element of lane w's set.
  FASTNORM_DEVICE int64_t set_base(int w) const {
    return outer * shape.positions * shape.C + group(w) * shape.set_channels;
  }
  // Where a tile has whole sets: the number, within the tile, of lane w's set.
  FASTNORM_DEVICE int set_in_tile(int w) const {
    return shape.groups == 1 ? 0 : static_cast<int>(shape.by_set_channels.divide(static_cast<unsigned>(x * W + w)));
  }
  // Calls body(w) for every lane whose set differs from that of the lane before, and same(w) for the others. Where sets
  // are wider than packs, a pack lies in one.
  template <class Body, class Same>
  FASTNORM_DEVICE void for_lane_sets(Body body, Same same) const {
    const bool one = shape.set_channels % W == 0;
    body(0);
#pragma unroll
    for (int w = 1; w < W; ++w) {
      if (one) {
        same(w);
      } else {
        body(w);
      }
    }
  }

  // The values of the sets of this thread's lanes, from those of the tile's sets.
  template <class V>
  FASTNORM_DEVICE void values_of_sets(const V* of_tile, V (&out)[W]) const {
    if (!in) return;
    if (shape.set_channels == 1) {
#pragma unroll
      for (int w = 0; w < W; ++w) out[w] = of_tile[x * W + w];
    } else {
      for_lane_sets([&](int w) { out[w] = of_tile[set_in_tile(w)]; }, [&](int w) { out[w] = out[w - 1]; });
    }
  }

  // The index among [outer, pieces, C] of the partial of this item's channel first_channel + c.
  FASTNORM_DEVICE int64_t partial(int c) const { return (outer * shape.pieces + piece) * shape.C + first_channel + c; }

  // The tile's first set.
  FASTNORM_DEVICE int64_t first_set() const { return outer * shape.groups + group_of(first_channel); }

  // The index, in a staged piece, of this thread's pack. The same for every tensor.
  template <class T>
  FASTNORM_DEVICE int slot(const PackPlace& place, const T* /*tensor*/) const {
    return place.position * (shape.tile / W) + x;
  }

  // How many of the first `positions` of a walk are this thread's.
  FASTNORM_DEVICE int count_of(int positions) const {
    return (positions + shape.threads_y - 1 - y) >> shape.log_threads_y;
  }
  // The number of positions of the rows of threads [row_y, row_y + rows).
  FASTNORM_DEVICE int count(int row_y, int rows = 1) const {
    const int each = positions >> shape.log_threads_y, left = positions - (each << shape.log_threads_y);
    return rows * each + std::clamp(left - row_y, 0, rows);
  }

  FASTNORM_DEVICE Range whole() const { return {0, positions}; }
  // Positions that stay in shared memory, from the first.
  template <bool kRereads>
  FASTNORM_DEVICE Range staged() const {
    return {0, kRereads ? std::min(positions, shape.staged_length) : positions};
  }
  // The positions of a copy group: whole rounds, so that only the last group that is not empty has an incomplete one.
  FASTNORM_DEVICE int group_length(const Range& staged) const {
    constexpr int kRounds = kCopyGroups * kMomentsRows;
    const int rows = (staged.end + shape.threads_y - 1) >> shape.log_threads_y;
    return (rows + kRounds - 1) / kRounds * (kMomentsRows << shape.log_threads_y);
  }
  // This thread's place in the row of threads that begins at a position.
  FASTNORM_DEVICE PackPlace at(int position) const { return {position + y, element(position + y)}; }
  FASTNORM_DEVICE PackPlace next(const PackPlace& place, int rows) const {
    return {place.position + rows * shape.threads_y, place.element + rows * (shape.C << shape.log_threads_y)};
  }
  // Calls body(places) for U positions of this thread at a time, and for the rest one by one, `positions` of the block
  // in all, and leaves `place` behind the last whole round. A thread without channels makes no call, and threads make
  // different numbers of calls.
  template <int U, class Body>
  FASTNORM_DEVICE void walk_on(PackPlace& place, int positions, Body body) const {
    if (!in) return;
    const int rounds = U == 1 ? count_of(positions) : positions >> (shape.log_threads_y + log2_of(U));
    for (int left = rounds; left > 0; --left) {
      PackPlace places[U];
      places[0] = place;
#pragma unroll
      for (int u = 1; u < U; ++u) places[u] = next(places[u - 1], 1);
      body(places);
      place = next(places[U - 1], 1);
    }
    if constexpr (U > 1) {
      const int rest = positions & ((U << shape.log_threads_y) - 1);
      if (rest == 0) return;
      PackPlace single = place;
      for (int left = count_of(rest); left > 0; --left) {
        const PackPlace places[1] = {single};
        body(places);
        single = next(single, 1);
      }
    }
  }
  // The same for a range, from the last position to the first where kFromEnd.
  template <int U, bool kFromEnd = false, class Body>
  FASTNORM_DEVICE void walk(const Range& range, Body body) const {
    if constexpr (!kFromEnd) {
      PackPlace place = at(range.begin);
      walk_on<U>(place, range.end - range.begin, body);
    } else if (in) {
      const int positions = range.end - range.begin;
      const int rows = count_of(positions), left = rows % U, rounds = rows / U;
      PackPlace place = next(at(range.begin), rounds * U + left - 1);
      for (int i = 0; i < left; ++i) {
        const PackPlace places[1] = {place};
        body(places);
        place = next(place, -1);
      }
      for (int i = 0; i < rounds; ++i) {
        PackPlace places[U];
        places[U - 1] = place;
#pragma unroll
        for (int u = U - 1; u > 0; --u) places[u - 1] = next(places[u], -1);
        body(places);
        place = next(places[0], -1);
      }
    }
  }
  // Calls body(places, taken) for U positions at a time, in whole rounds and an incomplete last one, which comes first
  // where kFromEnd. All threads of the block make the same number of calls; places[u] is this thread's where taken[u].
  template <int U, bool kFromEnd = false, class Body>
  FASTNORM_DEVICE void walk_together(const Range& range, Body body) const {
    const int step = shape.threads_y, round = U << shape.log_threads_y, rest = (range.end - range.begin) & (round - 1);
    const auto take = [&](int first, const auto& taken) {
      PackPlace places[U];
      places[0] = at(first);
#pragma unroll
      for (int u = 1; u < U; ++u) places[u] = next(places[u - 1], 1);
      body(places, taken);
    };
    const int last = range.end - rest;
    const auto take_last = [&] {
      if (rest > 0) take(last, LastRound{in, rest - y, step});
    };
    if constexpr (kFromEnd) {
      take_last();
      for (int begin = last - round; begin >= range.begin; begin -= round) take(begin, FullRound{in});
    } else {
      for (int begin = range.begin; begin < last; begin += round) take(begin, FullRound{in});
      take_last();
    }
  }
  // Calls use(place, read(place)) for every position of this thread, with U reads before the first use.
  template <int U, bool kFromEnd = false, class Read, class Use>
  FASTNORM_DEVICE void walk_read(const Range& range, Read read, Use use) const {
    walk<U, kFromEnd>(range, [&](const auto& places) {
      constexpr int kPlaces = std::extent_v<std::remove_cvref_t<decltype(places)>>;
      decltype(read(places[0])) what[kPlaces];
#pragma unroll
      for (int u = 0; u < kPlaces; ++u) what[u] = read(places[u]);
#pragma unroll
      for (int u = 0; u < kPlaces; ++u) use(places[u], what[u]);
    });
  }
};

// Calls body(piece) for the items of these blocks.
template <int W, class Body>
FASTNORM_DEVICE void for_columns(const ColumnsShape& shape, const BlockRange& blocks, Body body) {
  for (int64_t item = blocks.index; item < shape.items; item += blocks.count) {
    body(ColumnsPiece<W>(shape, shape.backwards ? shape.items - 1 - item : item));
  }
}

// Begins to copy a piece to shared memory, copy group by copy group; copy(place) begins with a pack of every tensor.
// Every thread copies what it reads itself.
template <int W, class Copy>
FASTNORM_DEVICE void stage_columns(const ColumnsPiece<W>& piece, const Range& staged, Copy copy) {
  PackPlace place = piece.at(0);
  int left = staged.end;
  const int length = piece.group_length(staged);
#pragma unroll 1
  for (int copy_group = 0; copy_group < kCopyGroups; ++copy_group, left -= length) {
    if (left > 0) {
      piece.template walk_on<kMomentsRows>(place, std::min(left, length), [&](const auto& places) {
#pragma unroll
        for (const PackPlace& each : places) copy(each);
      });
    }
    commit_copies();
  }
}

// Calls body(places) for the places of a staged piece, U at a time, each when its copy group has landed; ready(copy
// group) waits for that.
template <int U, int W, class Ready, class Body>
FASTNORM_DEVICE void walk_landed(const ColumnsPiece<W>& piece, const Range& staged, Ready ready, Body body) {
  PackPlace place = piece.at(0);
  int left = staged.end;
  const int length = piece.group_length(staged);
#pragma unroll 1
  for (int copy_group = 0; left > 0; ++copy_group, left -= length) {
    ready(copy_group);
    piece.template walk_on<U>(place, std::min(left, length), body);
  }
}

// The weights and biases of this thread's channels. Load them before a barrier whose results they are used with.
template <class A, int W>
struct LaneParams {
  A weight[W], bias[W];

  template <class T>
  FASTNORM_DEVICE static LaneParams load(const ColumnsPiece<W>& piece, const Params& weight, const Params& bias) {
    LaneParams p{};
    if (piece.in && piece.shape.set_params) {
      const auto load_of_set = [&](int w) {
        p.weight[w] = load_param_of<T>(weight, piece.group(w), A(1));
        p.bias[w] = load_param_of<T>(bias, piece.group(w), A(0));
      };
      const auto copy = [&](int w) { p.weight[w] = p.weight[w - 1], p.bias[w] = p.bias[w - 1]; };
      piece.for_lane_sets(load_of_set, copy);
    } else if (piece.in) {
      load_params<T>(weight, piece.channel, A(1), p.weight);
      load_params<T>(bias, piece.channel, A(0), p.bias);
    }
    return p;
  }
};

// The coefficients of this thread's channels.
template <int W, class A>
FASTNORM_DEVICE LaneCoefs<A, W> lane_coefs(const SetStats<A> (&stats)[W], const LaneParams<A, W>& params) {
  LaneCoefs<A, W> coefs;
#pragma unroll
  for (int w = 0; w < W; ++w) coefs.lane[w] = make_affine(stats[w], params.weight[w], params.bias[w]);
  return coefs;
}

}  // namespace fastnorm::cuda
