// The rows traversal: a team takes a piece of a set and walks its runs, neighbouring lanes on neighbouring packs.
//
//   set     o ------------- run 0 ------------ | ------------- run 1 ------------ | ...
//   piece   whole runs, or a part of one
//   team    lane 0 1 2 ... width-1, 0 1 2 ...    one pack each, kUnroll packs under way
#pragma once

#include <algorithm>

#include "core/accum.h"
#include "element.cuh"
#include "fast_div.h"
#include "group_reduce.cuh"
#include "moments.cuh"

namespace fastnorm::cuda {

// A geometry and its grid as rows kernels need them. The elements of set s, run r begin at s * set_stride + r *
// run_stride; channels and rows of the mask likewise.
struct RowsShape {
  int64_t sets, groups;  // groups: sets per sample; batch norm: all sets
  int64_t set_stride, run_stride;
  int64_t set_channels, run_channels;
  int64_t set_masks, run_masks;
  int64_t mask_row_bytes;
  int64_t runs, run_packs;  // of a set
  int64_t set_size;         // elements
  int64_t items, pieces, run_pieces;
  int64_t sets_per_stats;  // so many of these sets share statistics: 1, or the cells of a set
  int piece_runs, piece_length;
  int length;  // steps from a run of a piece to the next: piece_length, rounded up to whole bytes of a mask
  FastDiv by_length;
  int team;
  bool per_element;   // the channel changes with every element of a run
  bool backwards;     // items are taken from the last to the first
  int run_slots;      // of a staged run
  FastDiv by_blocks;  // single elements: blocks of 16 bytes of a staged run
};

// whole_bytes: the kernel may write a mask, whose rows begin with a whole byte. It does not say whether the kernel
// writes one, because the order of sums must not depend on that.
inline RowsShape rows_shape(const Geometry& g, const Geometry& stats, const Grid& grid, DType dtype, bool whole_bytes) {
  const Runs runs = rows_runs(g);
  const bool batch = g.kind == Kind::kBatch;
  RowsShape s{};
  s.sets = g.sets();
  s.groups = batch ? g.C : g.G;
  s.set_stride = batch ? g.S : g.D() * g.S;
  s.run_stride = runs.stride;
  s.set_channels = g.set_channels();
  s.run_channels = batch || g.per_element() ? 0 : 1;
  s.set_masks = batch || g.per_element() ? 1 : g.D();
  s.run_masks = batch ? g.C : 1;
  s.mask_row_bytes = mask_row_bytes(g.mask_run(), dtype);
  s.runs = runs.count;
  s.run_packs = runs.length / grid.pack;
  s.set_size = g.set_size();
  s.items = grid.items;
  s.pieces = grid.pieces;
  s.run_pieces = run_pieces(g, grid);
  s.sets_per_stats = g.sets() / stats.sets();
  s.piece_runs = static_cast<int>(grid.piece_runs);
  s.piece_length = static_cast<int>(grid.piece_length);
  const int per_byte = whole_bytes && grid.pack < 8 && s.piece_runs > 1 ? 8 / grid.pack : 1;
  s.length = (s.piece_length + per_byte - 1) / per_byte * per_byte;
  s.by_length = FastDiv(s.length);
  s.team = grid.threads_x;
  s.per_element = g.per_element();
  s.run_slots = static_cast<int>(grid.run_slots(dtype));
  s.by_blocks = FastDiv(std::max<int64_t>(1, s.run_slots * size_of(dtype) / 16));
  return s;
}

// One item: a piece of a set.
struct Span {
  int64_t set, piece, first_run, first_pack;
  int runs, packs;  // whole runs, and packs of each in this piece

  FASTNORM_DEVICE Span(const RowsShape& s, int64_t item) {
    set = s.pieces == 1 ? item : item / s.pieces;
    piece = s.pieces == 1 ? 0 : item - set * s.pieces;
    const int64_t part = s.run_pieces == 1 ? piece : piece / s.run_pieces;
    first_run = part * s.piece_runs;
    first_pack = s.run_pieces == 1 ? 0 : (piece - part * s.run_pieces) * s.piece_length;
    runs = static_cast<int>(std::min(static_cast<int64_t>(s.piece_runs), s.runs - first_run));
    packs = static_cast<int>(std::min(static_cast<int64_t>(s.piece_length), s.run_packs - first_pack));
  }
  // Steps of the walk, including those between runs.
  FASTNORM_DEVICE int steps(const RowsShape& s) const { return runs == 1 ? packs : runs * s.length; }
  FASTNORM_DEVICE int64_t base(const RowsShape& s) const { return set * s.set_stride + first_run * s.run_stride; }
  FASTNORM_DEVICE int64_t channel(const RowsShape& s) const {
    return (s.groups == 1 ? 0 : set % s.groups) * s.set_channels + first_run * s.run_channels;
  }
  FASTNORM_DEVICE int64_t mask_row(const RowsShape& s) const { return set * s.set_masks + first_run * s.run_masks; }
  FASTNORM_DEVICE int64_t stats(const RowsShape& s) const {
    return s.sets_per_stats == 1 ? set : set / s.sets_per_stats;
  }
};

// The index of a piece's partial among [outer, pieces, sets of an outer].
FASTNORM_DEVICE int64_t partial_of(const RowsShape& s, const Span& span) {
  const int64_t outer = span.set / s.groups;
  return (outer * s.pieces + span.piece) * s.groups + span.set - outer * s.groups;
}

// One step of the walk: one pack, or nothing where it is not `in`.
struct Step {
  int index, run, pack;  // pack: within the piece's part of the run
  bool in;
};
FASTNORM_DEVICE Step step_of(const RowsShape& s, const Span& span, int index, bool in) {
  Step step{index, 0, index, in};
  if (span.runs > 1) {
    step.run = static_cast<int>(s.by_length.divide(static_cast<uint32_t>(index)));
    step.pack = index - step.run * s.length;
  }
  step.in = in && step.run < span.runs && step.pack < span.packs;
  return step;
}

// `count` steps of a piece, from `begin` on, that `width` neighbouring threads walk together. `longest` is the largest
// count among the ranges that are walked at the same time: all threads make as many rounds as that one needs.
struct ThreadSteps {
  int begin, count, longest, lane, width;
};

// A piece in memory: the addresses of its packs, channels and bytes of the mask.
template <int W>
struct RowsPiece {
  const RowsShape& shape;
  Span span;
  int64_t base, channel, mask_base;  // of its first step: element, channel, byte of the mask

  // Where a piece is a part of a run, it begins with a whole byte of the mask.
  FASTNORM_DEVICE RowsPiece(const RowsShape& s, int64_t item) : shape(s), span(s, item) {
    const int64_t first = span.first_pack * W;
    base = span.base(s) + first;
    channel = span.channel(s) + (s.per_element ? first : 0);
    mask_base = span.mask_row(s) * s.mask_row_bytes + first / 8;
  }

  FASTNORM_DEVICE int64_t element(const Step& p) const { return base + p.run * shape.run_stride + p.pack * W; }
  FASTNORM_DEVICE int64_t channel_of(const Step& p) const {
    return channel + p.run * shape.run_channels + (shape.per_element ? p.pack * W : 0);
  }
  FASTNORM_DEVICE int64_t mask_byte(const Step& p) const {
    return mask_base + p.run * shape.run_masks * shape.mask_row_bytes + p.pack * W / 8;
  }
  FASTNORM_DEVICE unsigned mask_bits(const uint8_t* mask, const Step& p) const {
    return load_mask<W>(mask + mask_base + p.run * shape.run_masks * shape.mask_row_bytes, p.pack * W);
  }

  // The index, in a staged piece of `tensor`, of a step's pack. Single elements lie as far past a multiple of 16 bytes
  // as in global memory.
  template <class T>
  FASTNORM_DEVICE int slot(const Step& p, const T* tensor) const {
    if constexpr (W > 1) return p.run * shape.run_slots + p.pack;
    return p.run * shape.run_slots + shift(tensor, p.run) + p.pack;
  }
  template <class T>
  FASTNORM_DEVICE int shift(const T* tensor, int run) const {
    const uint32_t first = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(tensor) / sizeof(T)) +
                           static_cast<uint32_t>(base) +
                           static_cast<uint32_t>(run) * static_cast<uint32_t>(shape.run_stride);
    return static_cast<int>(first % (16 / sizeof(T)));
  }

  // The whole piece, walked by a team. No steps where the item is not `valid`.
  FASTNORM_DEVICE ThreadSteps whole(const Team& team, bool valid) const {
    const int steps = span.steps(shape);
    return {0, valid ? steps : 0, steps, team.lane, team.width};
  }
  // The steps of one copy group. A group has whole rounds, so that a thread takes the same steps group by group as it
  // takes on a walk over the whole.
  FASTNORM_DEVICE ThreadSteps copy_group(const Team& team, bool valid, int index) const {
    const int steps = span.steps(shape), round = kUnroll<W> * team.width;
    const int length = (steps + kCopyGroups * round - 1) / (kCopyGroups * round) * round, begin = index * length;
    const int here = std::max(0, std::min(length, steps - begin));
    return {begin, valid ? here : 0, here, team.lane, team.width};
  }

  // Calls body(steps) for U steps at a time, from the last to the first where kFromEnd.
  template <int U, bool kFromEnd = false, class Body>
  FASTNORM_DEVICE void walk(const ThreadSteps& range, Body body) const {
    const int length = U * range.width, first = kFromEnd ? (range.longest - 1) / length * length : 0;
    for (int begin = first; kFromEnd ? begin >= 0 : begin < range.longest; begin += kFromEnd ? -length : length) {
      Step steps[U];
#pragma unroll
      for (int u = 0; u < U; ++u) {
        const int index = begin + u * range.width + range.lane;
        steps[u] = step_of(shape, span, range.begin + index, index < range.count);
      }
      body(steps);
    }
  }
  // Calls use(step, read(step)) for every step, with U reads before the first use.
  template <int U, bool kFromEnd = false, class Read, class Use>
  FASTNORM_DEVICE void walk_read(const ThreadSteps& range, Read read, Use use) const {
    walk<U, kFromEnd>(range, [&](const Step(&steps)[U]) {
      decltype(read(steps[0])) what[U];
#pragma unroll
      for (int u = 0; u < U; ++u) {
        if (steps[u].in) what[u] = read(steps[u]);
      }
#pragma unroll
      for (int u = 0; u < U; ++u) {
        if (steps[u].in) use(steps[u], what[u]);
      }
    });
  }
};

// Calls body(team, piece, valid) for the items of these blocks' teams. All threads make the same number of calls: where
// a team has no item left, `valid` is false and the piece is another team's.
template <int W, class Body>
FASTNORM_DEVICE void for_rows(const RowsShape& shape, const BlockRange& blocks, Body body) {
  const Team team(shape.team);
  const int teams = block_threads() / team.width;
  for (int64_t first = blocks.index * teams; first < shape.items; first += blocks.count * teams) {
    const bool valid = first + team.index < shape.items;
    const int64_t item = valid ? first + team.index : first;
    body(team, RowsPiece<W>(shape, shape.backwards ? shape.items - 1 - item : item), valid);
  }
}

// Begins to copy runs of single elements to shared memory, in aligned blocks of 16 bytes except at the ends of a run.
// The threads that read the elements are not those that copy them.
template <class T>
FASTNORM_DEVICE void stage_runs(const RowsPiece<1>& piece, const Team& team, const T* tensor, Pack<T, 1>* staged) {
  constexpr int kLanes = 16 / sizeof(T);
  const RowsShape& shape = piece.shape;
  const int blocks = shape.run_slots / kLanes, packs = piece.span.packs;
  for (int step = team.lane; step < piece.span.runs * blocks; step += team.width) {
    const int run = static_cast<int>(shape.by_blocks.divide(static_cast<uint32_t>(step)));
    const int begin = (step - run * blocks) * kLanes - piece.shift(tensor, run);
    const T* from = tensor + piece.base + run * shape.run_stride + begin;
    Pack<T, 1>* to = staged + step * kLanes;
    if (begin >= 0 && begin + kLanes <= packs) {
      stage<kLanes>(reinterpret_cast<Pack<T, kLanes>*>(to), from);
    } else {
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane) {
        if (begin + lane >= 0 && begin + lane < packs) stage<1>(to + lane, from + lane);
      }
    }
  }
}

// Begins to copy one copy group of a team's piece to shared memory. Every thread copies what it reads itself on a walk
// over the same group. Runs of single elements are all in the first group.
template <int W, class T>
FASTNORM_DEVICE void stage_rows(const RowsPiece<W>& piece, const Team& team, int copy_group, const T* tensor,
                                Pack<T, W>* staged) {
  if constexpr (W == 1) {
    if (copy_group == 0) stage_runs(piece, team, tensor, staged);
  } else {
    piece.template walk<kUnroll<W>>(piece.copy_group(team, true, copy_group), [&](const Step(&steps)[kUnroll<W>]) {
#pragma unroll
      for (int u = 0; u < kUnroll<W>; ++u) {
        if (steps[u].in) stage<W>(staged + piece.slot(steps[u], tensor), tensor + piece.element(steps[u]));
      }
    });
  }
}
// Calls body(range) for one copy group of a team's piece after the other; ready(copy_group) waits until the group has
// landed.
template <int W, class Ready, class Body>
FASTNORM_DEVICE void for_landed(const RowsPiece<W>& piece, const Team& team, bool valid, Ready ready, Body body) {
  if constexpr (W == 1) {
    ready(kCopyGroups - 1);
    team.sync();  // other threads copied it
    body(piece.whole(team, valid));
  } else {
    for (int copy_group = 0; copy_group < kCopyGroups; ++copy_group) {
      ready(copy_group);
      body(piece.copy_group(team, valid, copy_group));
    }
  }
}
// Call before another piece is copied over this one.
template <int W>
FASTNORM_DEVICE void release_staged(const Team& team) {
  if constexpr (W == 1) team.sync();  // other threads copy over what this one has read
}
// Begins to bring a team's piece of `tensor` into L2, where later reads find it.
template <int W, class T>
FASTNORM_DEVICE void prefetch_rows(const RowsPiece<W>& piece, const Team& team, const T* tensor) {
  piece.template walk<1>(piece.whole(team, true), [&](const Step(&steps)[1]) {
    // One element of every 16 bytes brings the others with it.
    const bool brings = W > 1 || steps[0].pack % (16 / static_cast<int>(sizeof(T))) == 0;
    if (steps[0].in && brings) prefetch_l2(tensor + piece.element(steps[0]));
  });
}

// Merges the moments of this thread's part of a range, relative to `origin`, into `total`; read(step) gives the pack of
// x there.
template <int U, class T, int W, class A, class Read>
FASTNORM_DEVICE void accumulate_moments(const RowsPiece<W>& piece, const ThreadSteps& range, A origin, Read read,
                                        Welford<A>& total) {
  piece.template walk<U>(range, [&](const Step(&steps)[U]) {
    Pack<T, W> packs[U];
    bool in[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      in[u] = steps[u].in;
      if (in[u]) packs[u] = read(steps[u]);
    }
    total.merge(batch_moments(packs, in, origin));
  });
}

// The coefficients at one step after another. It loads them when the channel changes.
template <class T, int W, class A = Accum<T>>
class RowCoefsReader {
 public:
  FASTNORM_DEVICE RowCoefsReader(const SetStats<A>& stats, const Params& weight, const Params& bias)
      : weight_(weight), bias_(bias), low_(stats.low) {
    coefs_ = {stats.mean, stats.rstd, {}, {}};
  }
  FASTNORM_DEVICE const RowCoefs<A, W>& at(const RowsPiece<W>& piece, const Step& step) {
    const int64_t channel = piece.channel_of(step);
    if (channel == channel_) return coefs_;
    channel_ = channel;
    A weight[W], bias[W];
    if (W == 1 || piece.shape.per_element) {
      load_params<T>(weight_, channel, A(1), weight);
      load_params<T>(bias_, channel, A(0), bias);
    } else {
      weight[0] = load_param_of<T>(weight_, channel, A(1));
      bias[0] = load_param_of<T>(bias_, channel, A(0));
#pragma unroll
      for (int w = 1; w < W; ++w) weight[w] = weight[0], bias[w] = bias[0];
    }
    set_affine({coefs_.mean, coefs_.rstd, low_}, weight, bias, coefs_);
    return coefs_;
  }
  FASTNORM_DEVICE const RowCoefs<A, W>& last() const { return coefs_; }

 private:
  const Params &weight_, &bias_;
  A low_;
  int64_t channel_ = -1;
  RowCoefs<A, W> coefs_;
};

}  // namespace fastnorm::cuda
