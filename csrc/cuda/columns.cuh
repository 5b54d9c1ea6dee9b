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

#include "group_reduce.cuh"
#include "moments.cuh"

namespace fastnorm::cuda {

// A geometry and its grid as columns kernels need them.
struct ColumnsShape {
  int64_t C, positions, outer;
  int64_t groups, set_channels;  // sets per outer, channels per set
  int64_t items, pieces, piece_length, tiles;
  int tile, threads_x, threads_y;
  int64_t mask_row_bytes;
  bool per_position;   // every position has statistics of its own: the weights' gradients of a LayerNorm
  bool pieces_adjoin;  // neighbouring items: the pieces of a tile (gangs); else the tiles of a piece, which adjoin in
                       // memory
  bool backwards;      // items are taken from the last to the first
};

inline ColumnsShape columns_shape(const Geometry& g, const Grid& grid, DType dtype) {
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
  s.tile = static_cast<int>(grid.tile);
  s.tiles = (g.C + grid.tile - 1) / grid.tile;
  s.threads_x = grid.threads_x;
  s.threads_y = grid.threads_y;
  s.pieces_adjoin = grid.gang != Gang::kBlock;
  // Where positions have statistics of their own, forward wrote the mask along the sets' runs.
  s.mask_row_bytes = mask_row_bytes(g.mask_run(), dtype);
  return s;
}

// Some positions of an item.
struct Range {
  int begin, end;
};

// This thread's part of one item.
template <int W>
struct ColumnsPiece {
  const ColumnsShape& shape;
  int64_t outer, piece, first_position, first_channel;
  int positions, channels;  // of the item
  int x, y;                 // this thread's column of packs and its first position
  int64_t channel;          // of this thread's first lane
  bool in;                  // this thread has channels

  // Has no positions and no channels where the item is not `valid`.
  FASTNORM_DEVICE explicit ColumnsPiece(const ColumnsShape& s, int64_t item, bool valid = true) : shape(s) {
    const int64_t fast = s.pieces_adjoin ? s.pieces : s.tiles, slow = s.pieces_adjoin ? s.tiles : s.pieces;
    const int64_t row = item / fast, in_row = item - row * fast;
    outer = row / slow;
    const int64_t in_outer = row - outer * slow, tile = s.pieces_adjoin ? in_outer : in_row;
    piece = s.pieces_adjoin ? in_row : in_outer;
    first_position = piece * s.piece_length;
    first_channel = tile * s.tile;
    positions = valid ? static_cast<int>(std::min(s.piece_length, s.positions - first_position)) : 0;
    channels = valid ? static_cast<int>(std::min(static_cast<int64_t>(s.tile), s.C - first_channel)) : 0;
    x = thread_index() % s.threads_x;
    y = thread_index() / s.threads_x;
    channel = first_channel + x * W;
    in = x * W < channels;
  }

  FASTNORM_DEVICE int64_t row(int position) const { return outer * shape.positions + first_position + position; }
  FASTNORM_DEVICE int64_t element(int position) const { return row(position) * shape.C + channel; }
  FASTNORM_DEVICE uint8_t* mask_byte(uint8_t* mask, int position) const {
    return mask + row(position) * shape.mask_row_bytes + channel / 8;
  }
  FASTNORM_DEVICE unsigned mask_bits(const uint8_t* mask, int position) const {
    if (!shape.per_position) return load_mask<W>(mask + row(position) * shape.mask_row_bytes, channel);
    const int64_t group = channel / shape.set_channels;
    return load_mask<W>(mask + (row(position) * shape.groups + group) * shape.mask_row_bytes,
                        channel - group * shape.set_channels);
  }
  // The set of lane w; it depends on the position only where per_position is set.
  FASTNORM_DEVICE int64_t set(int w, int position = 0) const {
    const int64_t group = shape.set_channels == 1 ? channel + w : (channel + w) / shape.set_channels;
    return (shape.per_position ? row(position) : outer) * shape.groups + group;
  }
  // The first element of lane w's set.
  FASTNORM_DEVICE int64_t set_base(int w) const {
    const int64_t group = shape.set_channels == 1 ? channel + w : (channel + w) / shape.set_channels;
    return outer * shape.positions * shape.C + group * shape.set_channels;
  }
  // The index among [outer, pieces, C] of the partial of this item's channel first_channel + c.
  FASTNORM_DEVICE int64_t partial(int c) const { return (outer * shape.pieces + piece) * shape.C + first_channel + c; }

  // The tile's first set.
  FASTNORM_DEVICE int64_t first_set() const { return outer * shape.groups + first_channel / shape.set_channels; }

  // The index, in a staged piece, of this thread's pack at a position. The same for every tensor.
  template <class T>
  FASTNORM_DEVICE int slot(int position, const T* /*tensor*/) const {
    return position * (shape.tile / W) + x;
  }

  // The number of positions that each thread of row row_y takes.
  FASTNORM_DEVICE int count(int row_y) const {
    return positions / shape.threads_y + (row_y < positions % shape.threads_y);
  }

  FASTNORM_DEVICE Range whole() const { return {0, positions}; }
  // The positions of one copy group. A group has whole rounds, so that a thread takes the same positions group by group
  // as it takes on a walk over the whole.
  FASTNORM_DEVICE Range copy_group(int index) const {
    const int round = kUnroll<W> * shape.threads_y;
    const int length = (positions + kCopyGroups * round - 1) / (kCopyGroups * round) * round;
    return {index * length, std::min(positions, (index + 1) * length)};
  }

  // Calls body(position[U], in[U]), from the last positions to the first where kFromEnd. All threads of the block make
  // the same number of calls.
  template <int U, bool kFromEnd = false, class Body>
  FASTNORM_DEVICE void walk(const Range& range, Body body) const {
    const int length = U * shape.threads_y, first = kFromEnd ? (range.end - 1 - range.begin) / length * length : 0;
    for (int base = range.begin + first; kFromEnd ? base >= range.begin : base < range.end;
         base += kFromEnd ? -length : length) {
      int position[U];
      bool inside[U];
#pragma unroll
      for (int u = 0; u < U; ++u) {
        position[u] = base + u * shape.threads_y + y;
        inside[u] = in && position[u] < range.end;
      }
      body(position, inside);
    }
  }
  // Calls use(position, read(position)) for every position of this thread, with U reads before the first use.
  template <int U, bool kFromEnd = false, class Read, class Use>
  FASTNORM_DEVICE void walk_read(const Range& range, Read read, Use use) const {
    walk<U, kFromEnd>(range, [&](const int (&position)[U], const bool (&inside)[U]) {
      decltype(read(0)) what[U];
#pragma unroll
      for (int u = 0; u < U; ++u) {
        if (inside[u]) what[u] = read(position[u]);
      }
#pragma unroll
      for (int u = 0; u < U; ++u) {
        if (inside[u]) use(position[u], what[u]);
      }
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

// Begins to copy one copy group of a piece of `tensor` to shared memory. Every thread copies what it reads itself.
template <int W, class T>
FASTNORM_DEVICE void stage_columns(const ColumnsPiece<W>& piece, int copy_group, const T* tensor, Pack<T, W>* staged) {
  piece.template walk<kUnroll<W>>(
      piece.copy_group(copy_group), [&](const int (&position)[kUnroll<W>], const bool (&in)[kUnroll<W>]) {
#pragma unroll
        for (int u = 0; u < kUnroll<W>; ++u) {
          if (in[u]) stage<W>(staged + piece.slot(position[u], tensor), tensor + piece.element(position[u]));
        }
      });
}

// Calls body(range) for one copy group of a piece after the other; ready(copy_group) waits until the group has landed.
template <int W, class Ready, class Body>
FASTNORM_DEVICE void for_landed(const ColumnsPiece<W>& piece, Ready ready, Body body) {
  for (int copy_group = 0; copy_group < kCopyGroups; ++copy_group) {
    ready(copy_group);
    body(piece.copy_group(copy_group));
  }
}
// Begins to bring a piece of `tensor` into L2, where later reads find it.
template <int W, class T>
FASTNORM_DEVICE void prefetch_columns(const ColumnsPiece<W>& piece, const T* tensor) {
  piece.template walk<1>(piece.whole(), [&](const int (&position)[1], const bool (&in)[1]) {
    if (in[0]) prefetch_l2(tensor + piece.element(position[0]));
  });
}

// The moments of a thread's channels, each relative to its set's origin.
template <class A, int W>
struct LaneMoments {
  A count = 0;
  Moments<A> lane[W] = {};
};

// Takes packs below one another as moments relative to `origin`, lane by lane and over their own mean, and merges them
// into the lanes' moments.
template <int W, class T, class A>
FASTNORM_DEVICE void merge_lanes(const Pack<T, W> (&packs)[kLaneUnroll<W>], const bool (&in)[kLaneUnroll<W>],
                                 const A (&origin)[W], LaneMoments<A, W>& total) {
  int rows = 0;
#pragma unroll
  for (int u = 0; u < kLaneUnroll<W>; ++u) rows += in[u];
  if (rows == 0) return;
  const A batch = static_cast<A>(rows), inverse = A(1) / batch;
  A values[kLaneUnroll<W>][W];
#pragma unroll
  for (int u = 0; u < kLaneUnroll<W>; ++u) widen<A>(packs[u], values[u]);
#pragma unroll
  for (int w = 0; w < W; ++w) {
    A x[kLaneUnroll<W>], sum = 0, m2 = 0;
#pragma unroll
    for (int u = 0; u < kLaneUnroll<W>; ++u) {
      x[u] = in[u] ? values[u][w] - origin[w] : A(0);
      sum += x[u];
    }
    const A mean = sum * inverse;
#pragma unroll
    for (int u = 0; u < kLaneUnroll<W>; ++u) m2 += in[u] ? (x[u] - mean) * (x[u] - mean) : A(0);
    if (total.count == A(0)) {
      total.lane[w] = {mean, m2};
    } else {
      total.lane[w].merge({mean, m2}, total.count, batch);
    }
  }
  total.count += batch;
}

// Merges this thread's part of a range into `total`; read(position) gives the pack of x there.
template <class T, int W, class A, class Read>
FASTNORM_DEVICE void accumulate_lanes(const ColumnsPiece<W>& piece, const Range& range, const A (&origin)[W], Read read,
                                      LaneMoments<A, W>& total) {
  constexpr int U = kLaneUnroll<W>;
  piece.template walk<U>(range, [&](const int (&position)[U], const bool (&in)[U]) {
    Pack<T, W> packs[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (in[u]) packs[u] = read(position[u]);
    }
    merge_lanes(packs, in, origin, total);
  });
}

template <int W, class T, class A>
FASTNORM_DEVICE void load_origins(const ColumnsPiece<W>& piece, const T* x, A (&origin)[W]) {
#pragma unroll
  for (int w = 0; w < W; ++w) origin[w] = piece.in ? origin_of<A>(x + piece.set_base(w)) : A(0);
}

// The coefficients of this thread's channels.
template <class T, int W, class A>
FASTNORM_DEVICE void load_lane_coefs(const ColumnsPiece<W>& piece, const SetStats<A> (&stats)[W], const Params& weight,
                                     const Params& bias, LaneCoefs<A, W>& coefs) {
  A weights[W] = {}, biases[W] = {};
  if (piece.in) {
    load_params<T>(weight, piece.channel, A(1), weights);
    load_params<T>(bias, piece.channel, A(0), biases);
  }
#pragma unroll
  for (int w = 0; w < W; ++w) coefs.lane[w] = make_affine(stats[w], weights[w], biases[w]);
}

// Writes the accumulators of all threads to `merged`, which holds W for each thread, a row for each row of threads: the
// accumulators of the item's channel c are at c, c + width, ... Returns the width.
template <int W, class Acc>
FASTNORM_DEVICE int stack_rows(const ColumnsPiece<W>& piece, const Acc (&mine)[W], Acc* merged) {
  const int width = piece.shape.threads_x * W;
#pragma unroll
  for (int w = 0; w < W; ++w) merged[piece.y * width + piece.x * W + w] = mine[w];
  sync_block();
  return width;
}

// Merges the accumulators of a channel over the rows of threads. Some thread calls use(c, total) once for each channel
// c of the item.
template <int W, class Acc, class Use>
FASTNORM_DEVICE void merge_rows(const ColumnsPiece<W>& piece, const Acc (&mine)[W], Acc* merged, Use use) {
  const int width = stack_rows(piece, mine, merged);
  for (int c = thread_index(); c < piece.channels; c += block_threads()) {
    Acc total = merged[c];
    for (int y = 1; y < piece.shape.threads_y; ++y) total.merge(merged[y * width + c]);
    use(c, total);
  }
}

// The same for moments, whose counts follow from the positions. The common mean is taken first: that needs one
// division.
template <int W, class A, class Use>
FASTNORM_DEVICE void merge_rows(const ColumnsPiece<W>& piece, const Moments<A> (&mine)[W], Moments<A>* merged,
                                Use use) {
  const int width = stack_rows(piece, mine, merged);
  for (int c = thread_index(); c < piece.channels; c += block_threads()) {
    const int rows = std::min(piece.shape.threads_y, piece.positions);
    A sum = 0;
    for (int y = 0; y < rows; ++y) sum += static_cast<A>(piece.count(y)) * merged[y * width + c].mean;
    const A mean = sum / static_cast<A>(piece.positions);
    A m2 = 0, deviations = 0;
    for (int y = 0; y < rows; ++y) {
      const Moments<A>& row = merged[y * width + c];
      m2 += row.m2;
      deviations += static_cast<A>(piece.count(y)) * (row.mean - mean) * (row.mean - mean);
    }
    use(c, Welford<A>{static_cast<A>(piece.positions), {mean, m2 + deviations}});
  }
}

// Calls body(set, lane, lanes) for the sets of a tile. As many neighbouring lanes as a set has channels, at most a
// warp, take a set together. All lanes of a warp make the same number of calls; set is -1 where no set is left.
template <int W, class Body>
FASTNORM_DEVICE void for_each_set(const ColumnsPiece<W>& piece, Body body) {
  const int channels = static_cast<int>(piece.shape.set_channels), sets = piece.channels / channels;
  int lanes = 1;
  while (lanes < channels && lanes < kWarp) lanes *= 2;
  const int lane = thread_index() % lanes, group = thread_index() / lanes, groups = block_threads() / lanes;
  for (int first = 0; first < sets; first += groups) body(first + group < sets ? first + group : -1, lane, lanes);
}

}  // namespace fastnorm::cuda
