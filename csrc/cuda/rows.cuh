// The rows traversal: a team takes a piece of a set and walks its runs, neighbouring lanes on neighbouring packs.
//
//   set     o ------------- run 0 ------------ | ------------- run 1 ------------ | ...
//   piece   whole runs, or a part of one
//   team    lane 0 1 2 ... width-1, 0 1 2 ...    one pack each, kRowsUnroll packs under way
#pragma once

#include <algorithm>

#include "element.cuh"
#include "fast_div.h"
#include "group_reduce.cuh"

namespace fastnorm::cuda {

// Packs of a tensor that a thread copies or loads before it uses the first. With two blocks per SM they are 32 KB,
// which keeps an H200's memory busy (4.8 TB/s for 0.7 us over 132 SMs is 25 KB).
template <int W>
constexpr int kRowsUnroll = W == 1 ? 8 : 4;

template <int kPower>
constexpr int kLog2 = 1 + kLog2<kPower / 2>;
template <>
constexpr int kLog2<1> = 0;

// A geometry and its grid as rows kernels need them. The elements of set s, run r begin at s * set_stride + r *
// run_stride; channels and rows of the mask likewise.
struct RowsShape {
  int64_t sets, groups;  // groups: sets per sample; batch norm: all sets
  int64_t set_stride, run_stride;
  int64_t set_channels;
  int64_t set_masks, run_masks;
  int64_t mask_row_bytes;
  int64_t runs, run_packs;  // of a set
  int64_t set_size;         // elements
  int64_t items, pieces, run_pieces;
  WideDiv by_groups, by_pieces, by_run_pieces;
  WideDiv by_sets_per_stats;  // so many of these sets share statistics: 1, or the cells of a set
  int piece_runs, piece_length;
  int length;  // steps from a run of a piece to the next: piece_length, rounded up to whole bytes of a mask
  FastDiv by_length;
  int run_channels;         // 1 where every run has a channel of its own, else 0
  uint32_t run_offset;      // from a run of a piece to the next, in packs
  uint32_t between_runs;    // likewise, beyond the steps that lie between
  uint32_t run_mask_bytes;  // likewise in the mask
  int team_shift;           // a team has 1 << team_shift threads
  bool per_element;         // the channel changes with every element of a run
  bool backwards;           // items are taken from the last to the first
  int run_slots;            // of a staged run of single elements
  FastDiv by_blocks;        // single elements: blocks of 16 bytes of a staged run
};

// whole_bytes: the kernel may write a mask, whose rows begin with a whole byte. It does not say whether the kernel
// writes one, because the order of sums must not depend on that.
inline RowsShape rows_shape(const Geometry& g, const Geometry& stats, const Grid& grid, DType dtype, bool whole_bytes) {
  const Runs runs = rows_runs(g);
  const bool batch = g.kind == Kind::kBatch;
  RowsShape s{};
  s.sets = g.sets();
  s.groups = batch ? g.C : g.G;
  s.by_groups = WideDiv(s.groups);
  s.set_stride = batch ? g.S : g.D() * g.S;
  s.run_stride = runs.stride;
  s.set_channels = g.set_channels();
  s.run_channels = batch ? 0 : 1;
  s.set_masks = batch || g.per_element() ? 1 : g.D();
  s.run_masks = batch ? g.C : 1;
  s.mask_row_bytes = mask_row_bytes(g.mask_run(), dtype);
  s.runs = runs.count;
  s.run_packs = runs.length / grid.pack;
  s.set_size = g.set_size();
  s.items = grid.items;
  s.pieces = grid.pieces;
  s.by_pieces = WideDiv(s.pieces);
  s.run_pieces = run_pieces(g, grid);
  s.by_run_pieces = WideDiv(s.run_pieces);
  s.by_sets_per_stats = WideDiv(g.sets() / stats.sets());
  s.piece_runs = static_cast<int>(grid.piece_runs);
  s.piece_length = static_cast<int>(grid.piece_length);
  const int per_byte = whole_bytes && grid.pack < 8 && s.piece_runs > 1 ? 8 / grid.pack : 1;
  s.length = (s.piece_length + per_byte - 1) / per_byte * per_byte;
  s.by_length = FastDiv(s.length);
  s.run_offset = static_cast<uint32_t>(runs.stride / grid.pack);
  s.between_runs = s.run_offset - static_cast<uint32_t>(s.length);
  s.run_mask_bytes = static_cast<uint32_t>(s.run_masks * s.mask_row_bytes);
  while (1 << s.team_shift < grid.threads_x) ++s.team_shift;
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
    if (s.pieces == 1) {
      set = item;
      piece = first_run = first_pack = 0;
      runs = s.piece_runs;
      packs = s.piece_length;
      return;
    }
    set = s.by_pieces.divide(item);
    piece = item - set * s.pieces;
    const int64_t part = s.by_run_pieces.divide(piece);
    first_run = part * s.piece_runs;
    first_pack = (piece - part * s.run_pieces) * s.piece_length;
    runs = static_cast<int>(std::min(static_cast<int64_t>(s.piece_runs), s.runs - first_run));
    packs = static_cast<int>(std::min(static_cast<int64_t>(s.piece_length), s.run_packs - first_pack));
  }
  FASTNORM_DEVICE int packs_of_runs() const { return runs * packs; }
  // Steps of the walk, including those between runs.
  FASTNORM_DEVICE int steps(const RowsShape& s) const { return runs == 1 ? packs : runs * s.length; }
  FASTNORM_DEVICE int64_t base(const RowsShape& s) const { return set * s.set_stride + first_run * s.run_stride; }
  FASTNORM_DEVICE int64_t channel(const RowsShape& s) const {
    return (set - s.by_groups.divide(set) * s.groups) * s.set_channels + first_run * s.run_channels;
  }
  FASTNORM_DEVICE int64_t mask_row(const RowsShape& s) const { return set * s.set_masks + first_run * s.run_masks; }
  FASTNORM_DEVICE int64_t stats(const RowsShape& s) const { return s.by_sets_per_stats.divide(set); }
};

// The index of a piece's partial among [outer, pieces, sets of an outer].
FASTNORM_DEVICE int64_t partial_of(const RowsShape& s, const Span& span) {
  const int64_t outer = s.by_groups.divide(span.set);
  return (outer * s.pieces + span.piece) * s.groups + span.set - outer * s.groups;
}

// One step of the walk: one pack, or nothing where it is not `in`.
struct Step {
  int index, run, pack;  // pack: within the piece's part of the run
  uint32_t offset;       // from the first pack of the piece, in packs
  bool in;
};

// `count` steps of a piece, from `begin` on, that neighbouring threads walk together. A thread takes one step a round.
// Where the walk is not `valid`, the threads make the same rounds, but are never `in`.
struct ThreadSteps {
  int begin, count;
  bool valid;
  int lane, width, shift;  // width: of a round, 1 << shift threads
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

  // Whether some steps between runs have no pack. Runs of packs of 8 end with a whole byte of the mask.
  FASTNORM_DEVICE bool has_gaps() const { return W < 8 && shape.length != shape.piece_length; }
  FASTNORM_DEVICE int64_t elements() const { return static_cast<int64_t>(span.runs) * span.packs * W; }

  // The address of a step's pack. The first sum is the same for all steps.
  template <class T>
  FASTNORM_DEVICE T* at(T* tensor, const Step& p) const {
    return tensor + base + static_cast<int64_t>(p.offset) * W;
  }
  FASTNORM_DEVICE int64_t mask_byte(const Step& p) const {
    return mask_base + (static_cast<uint32_t>(p.run) * shape.run_mask_bytes + static_cast<uint32_t>(p.pack * W / 8));
  }
  FASTNORM_DEVICE unsigned mask_bits(const uint8_t* mask, const Step& p) const {
    return load_mask<W>(mask + mask_byte(p), W >= 8 ? 0 : p.pack * W % 8);
  }

  // The whole piece, walked by a team.
  FASTNORM_DEVICE ThreadSteps whole(const Team& team, bool valid) const {
    return {0, span.steps(shape), valid, team.lane, team.width, shape.team_shift};
  }
  // The steps of a copy group: whole batches of kRowsUnroll rounds, so that a thread takes the same steps group by
  // group as it takes on a walk over the whole. Single elements are all in the first group.
  FASTNORM_DEVICE int group_length() const {
    const int shift = shape.team_shift + kLog2<kRowsUnroll<W> * kCopyGroups>, steps = span.steps(shape);
    return W == 1 ? steps : ((steps + (1 << shift) - 1) >> shift) << (shift - kLog2<kCopyGroups>);
  }
  FASTNORM_DEVICE ThreadSteps first_group(const Team& team, bool valid, int length) const {
    ThreadSteps range = whole(team, valid);
    range.count = std::min(length, range.count);
    return range;
  }
  FASTNORM_DEVICE void move_to_next_group(ThreadSteps& range, int length) const {
    range.begin += length;
    range.count = std::min(length, span.steps(shape) - range.begin);
  }
  // Calls body(range, copy group) for the copy groups that are not empty.
  template <class Body>
  FASTNORM_DEVICE void for_copy_groups(const Team& team, bool valid, Body body) const {
    const int length = group_length();
    ThreadSteps range = first_group(team, valid, length);
#pragma unroll 1
    for (int group = 0; range.count > 0; ++group, move_to_next_group(range, length)) body(range, group);
  }

  FASTNORM_DEVICE Step step_at(int index) const {
    Step step{};
    step.index = index;
    step.run = static_cast<int>(shape.by_length.divide(static_cast<uint32_t>(index)));
    step.pack = step.run * -shape.length + index;
    step.offset = static_cast<uint32_t>(step.run) * shape.between_runs + static_cast<uint32_t>(index);
    return step;
  }
  FASTNORM_DEVICE bool has_pack(const Step& step) const { return W == 8 || step.pack < span.packs; }

  // Calls body(steps) for N rounds: U at a time as long as they are full, then one at a time; from the last to the
  // first where kFromEnd. In full rounds `in` needs no comparison with the range's end.
  template <int U, bool kFromEnd = false, class Body>
  FASTNORM_DEVICE void walk(const ThreadSteps& range, Body body) const {
    const int rounds = (range.count + range.width - 1) >> range.shift;
    const int batches = U == 1 ? 0 : (range.count >> range.shift) / U;
    const int last = kFromEnd ? rounds - 1 : 0, move = kFromEnd ? -range.width : range.width;
    int index = range.begin + range.lane + (last << range.shift);
    const auto full_rounds = [&] {
#pragma unroll 1
      for (int batch = 0; batch < batches; ++batch) {
        Step steps[U];
#pragma unroll
        for (int u = 0; u < U; ++u, index += move) {
          steps[u] = step_at(index);
          steps[u].in = range.valid && has_pack(steps[u]);
        }
        body(steps);
      }
    };
    const auto other_rounds = [&] {
#pragma unroll 1
      for (int round = batches * U; round < rounds; ++round, index += move) {
        Step steps[1] = {step_at(index)};
        steps[0].in = range.valid && index < range.begin + range.count && has_pack(steps[0]);
        body(steps);
      }
    };
    if (!kFromEnd && U > 1) full_rounds();
    other_rounds();
    if (kFromEnd && U > 1) full_rounds();
  }
  // Calls body(step) for this thread's steps. Other threads may make fewer calls or more: no shuffles in it.
  template <class Body>
  FASTNORM_DEVICE void for_steps(const ThreadSteps& range, Body body) const {
    const int end = range.valid ? range.begin + range.count : 0;
    for (int index = range.begin + range.lane; index < end; index += range.width) {
      Step step = step_at(index);
      step.in = true;
      if (has_pack(step)) body(step);
    }
  }
  // Calls use(step, read(step)) for this thread's steps, with U reads before the first use.
  template <int U, bool kFromEnd = false, class Read, class Use>
  FASTNORM_DEVICE void walk_read(const ThreadSteps& range, Read read, Use use) const {
    walk<U, kFromEnd>(range, [&]<int N>(const Step(&steps)[N]) {
      if constexpr (N == 1) {
        if (steps[0].in) use(steps[0], read(steps[0]));
      } else {
        decltype(read(steps[0])) what[N]{};  // zero, else packs that are not read would be kept from an earlier call
#pragma unroll
        for (int u = 0; u < N; ++u) {
          if (steps[u].in) what[u] = read(steps[u]);
        }
#pragma unroll
        for (int u = 0; u < N; ++u) {
          if (steps[u].in) use(steps[u], what[u]);
        }
      }
    });
  }
};

// Calls body(team, piece, valid) for the items of these blocks' teams. All threads make the same number of calls: where
// a team has no item left, `valid` is false and the piece is another team's.
template <int W, class Body>
FASTNORM_DEVICE void for_rows(const RowsShape& shape, const BlockRange& blocks, Body body) {
  const Team team(shape.team_shift);
  const int teams = block_threads() >> shape.team_shift;
  for (int64_t first = blocks.index * teams; first < shape.items; first += blocks.count * teams) {
    const bool valid = first + team.index < shape.items;
    const int64_t item = valid ? first + team.index : first;
    body(team, RowsPiece<W>(shape, shape.backwards ? shape.items - 1 - item : item), valid);
  }
}

// ---- coefficients ----

// One channel along a run.
template <class A>
struct RunCoefs {
  Affine<A> all;
  FASTNORM_DEVICE const Affine<A>& operator[](int) const { return all; }
};

// The weight and bias of a piece's first channel. Load them before a barrier that the statistics wait for.
template <class A>
struct ChannelParams {
  A weight, bias;
};
template <class T, int W, class A = Accum<T>>
FASTNORM_DEVICE ChannelParams<A> channel_params(const RowsPiece<W>& piece, const Params& weight, const Params& bias,
                                                int channel = 0) {
  return {load_param_of<T>(weight, piece.channel + channel, A(1)),
          load_param_of<T>(bias, piece.channel + channel, A(0))};
}

// The coefficients at one step after another, of runs of one channel. It loads them when the channel changes.
template <class T, int W, class A = Accum<T>>
class RunCoefsReader {
 public:
  FASTNORM_DEVICE RunCoefsReader(const RowsPiece<W>& piece, const SetStats<A>& stats, const Params& weight,
                                 const Params& bias, const ChannelParams<A>& first)
      : piece_(piece),
        stats_(stats),
        weight_(weight),
        bias_(bias),
        coefs_{make_affine(stats, first.weight, first.bias)} {}
  FASTNORM_DEVICE void move_to(const Step& step) {
    const int channel = W == 1 && piece_.shape.per_element ? step.pack : step.run * piece_.shape.run_channels;
    if (channel == channel_ || !step.in) return;
    channel_ = channel;
    const ChannelParams<A> params = channel_params<T>(piece_, weight_, bias_, channel);
    coefs_.all = make_affine(stats_, params.weight, params.bias);
  }
  FASTNORM_DEVICE const RunCoefs<A>& now() const { return coefs_; }

 private:
  const RowsPiece<W>& piece_;
  const SetStats<A>& stats_;
  const Params &weight_, &bias_;
  int channel_ = 0;
  RunCoefs<A> coefs_;
};

// The same where weights change with every element.
template <class T, int W, class A = Accum<T>>
class ElementCoefsReader {
 public:
  FASTNORM_DEVICE ElementCoefsReader(const RowsPiece<W>& piece, const SetStats<A>& stats, const Params& weight,
                                     const Params& bias)
      : piece_(piece), stats_(stats), weight_(weight), bias_(bias), coefs_{stats.mean, stats.rstd, {}, {}} {}
  FASTNORM_DEVICE void move_to(const Step& step) {
    if (!step.in) return;
    A weight[W], bias[W];
    load_params<T>(weight_, piece_.channel + step.pack * W, A(1), weight);
    load_params<T>(bias_, piece_.channel + step.pack * W, A(0), bias);
    set_affine(stats_, weight, bias, coefs_);
  }
  FASTNORM_DEVICE const RowCoefs<A, W>& now() const { return coefs_; }

 private:
  const RowsPiece<W>& piece_;
  const SetStats<A>& stats_;
  const Params &weight_, &bias_;
  RowCoefs<A, W> coefs_;
};

// Calls f(reader of the coefficients).
template <class T, int W, class A, class F>
FASTNORM_DEVICE void with_coefs(const RowsPiece<W>& piece, const SetStats<A>& stats, const Params& weight,
                                const Params& bias, const ChannelParams<A>& first, F f) {
  if (W > 1 && piece.shape.per_element) {
    f(ElementCoefsReader<T, W>(piece, stats, weight, bias));
  } else {
    f(RunCoefsReader<T, W>(piece, stats, weight, bias, first));
  }
}

}  // namespace fastnorm::cuda
