// Every walk needs this around the arithmetic: the parallel loop, parameters as arrays of A, the division of a set into
// blocks and chunks.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "api.h"
#include "core/accum.h"
#include "element.h"
#include "scratch.h"

namespace fastnorm::FASTNORM_CPU_CAPABILITY {

using cpu::BackwardCall, cpu::ForwardCall, cpu::ImageCall, cpu::Order, cpu::Parallel;

template <class F>
void for_each_task(const Parallel& parallel, int64_t tasks, F f, Order order = Order::kForwards) {
  if (parallel.threads <= 1 || tasks <= 1) {
    for (int64_t t = 0; t < tasks; ++t) f(order == Order::kForwards ? t : tasks - 1 - t);
    finish_streaming();
    return;
  }
  const auto run = [](void* context, int64_t t) {
    (*static_cast<F*>(context))(t);
    finish_streaming();
  };
  parallel.run(tasks, order, run, &f);
}

// Reads parameters of any type into an array of A; fills it with `absent` where there are none. NaNs become the
// processor's own, as join_bfloat16 needs them.
template <class A>
void read_params(const Params& params, int64_t n, A absent, A* out) {
  if (params.data == nullptr) {
    std::fill_n(out, n, absent);
    return;
  }
  dispatch(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T* p = static_cast<const T*>(params.data);
    constexpr int64_t L = kLanes<Accum<T>>;
    for (int64_t i = 0; i < n; i += L) {
      const int64_t count = std::min(L, n - i);
      alignas(kPackBytes) Accum<T> lane[L];
      store(lane, count < L ? load_first(p + i, count) : load(p + i));
      for (int64_t k = 0; k < count; ++k) {
        const A value = static_cast<A>(lane[lane_of<T>(k)]);
        out[i + k] = value == value ? value : std::numeric_limits<A>::quiet_NaN();
      }
    }
  });
}

// The rows of the stats tensor. mean + mean_low is the mean with twice the digits of A.
template <class A>
struct Stats {
  A *mean, *rstd, *var, *mean_low;
  Stats(void* base, int64_t sets)
      : mean(static_cast<A*>(base)), rstd(mean + sets), var(rstd + sets), mean_low(var + sets) {}

  // Of `1 / share` values: divisions took a third of the time of a group norm of 8x8.
  void finish(int64_t set, const Moments<double>& m, double share, double eps) const {
    const double variance = m.m2 * share;
    mean[set] = static_cast<A>(m.mean);
    mean_low[set] = static_cast<A>(m.mean - mean[set]);
    var[set] = static_cast<A>(variance);
    rstd[set] = static_cast<A>(1 / std::sqrt(variance + eps));
  }
};

constexpr int64_t kShortCell = 1024;  // elements; their sums stay in A
constexpr int64_t kRowsInL1 = 24576;  // bytes of the rows that a layer norm works on at a time
// Numbers, as float32, that fill a half of a common L2; and those that a common L3 holds beside x, dy and dx of half
// types (group norm + SiLU of 2x320x64x64 channels_last, backward: 0.65 times as long as without them).
constexpr int64_t kCachedInL2 = 1 << 17, kCachedInL3 = 3 << 20;

// An array of n numbers in the order of lanes ends with a whole pack.
template <class A>
constexpr int64_t lane_pitch(int64_t n) {
  return div_up(n, kLanes<A>) * kLanes<A>;
}

// Parameters where every element of a set has its own: those of each of G groups, in the order of lanes.
template <class T>
class ElementParams {
  using A = Accum<T>;

 public:
  ElementParams(const Geometry& g, const A* params)
      : pitch_(lane_pitch<A>(g.D())), lanes_(g.per_element() ? g.G * pitch_ : 0) {
    if (!g.per_element()) return;
    std::fill_n(static_cast<A*>(lanes_), g.G * pitch_, A(0));
    for (int64_t group = 0; group < g.G; ++group) {
      for (int64_t i = 0; i < g.D(); ++i) lanes_[group * pitch_ + lane_of<T>(i)] = params[group * g.D() + i];
    }
  }
  const A* of_group(int64_t group) const { return lanes_ + group * pitch_; }

 private:
  const int64_t pitch_;
  const Buffer<A> lanes_;
};

// The rows of all channels of a position, and those of a d that is kept.
template <class T>
Strided position_rows(const Geometry& g, bool together, int64_t mask_row) {
  const int64_t rows = rows_to_fetch(together ? kRowGroup : 1, g.C * static_cast<int64_t>(sizeof(T)));
  return Strided{g.C, mask_row, g.C, lane_pitch<Accum<T>>(g.C), together}.fetching(rows);
}

// The whole tensors of a call.
template <class T>
ForwardSpan<T> whole_span(const ForwardCall& args) {
  return {static_cast<const T*>(args.x), static_cast<const T*>(args.residual), static_cast<T*>(args.y), args.mask,
          args.plan.stream};
}
template <class T>
BackwardSpan<T> whole_span(const BackwardCall& args) {
  return {static_cast<const T*>(args.dy),
          static_cast<const T*>(args.x),
          static_cast<const T*>(args.residual),
          args.mask,
          static_cast<T*>(args.dx),
          static_cast<T*>(args.dresidual),
          args.plan.stream};
}

// The arguments that forward and backward share.
template <class T, class Args>
struct Call {
  using A = Accum<T>;
  const Args& args;
  const decltype(whole_span<T>(std::declval<const Args&>())) whole;
  const Geometry g;
  const Buffer<A> weight, bias;  // [C]
  const Stats<A> stats;
  const Epilogue<A> epilogue;

  explicit Call(const Args& call_args)
      : args(call_args),
        whole(whole_span<T>(args)),
        g(args.geometry),
        weight(g.C),
        bias(g.C),
        stats(const_cast<void*>(args.stats), g.sets()),
        epilogue{args.activation, Pack<A>(args.activation_param), args.mask != nullptr} {
    read_params<A>(args.weight, g.C, A(1), weight);
    read_params<A>(args.bias, g.C, A(0), bias);
  }

  // The pool for a step over so many numbers: a single thread where waking the others takes longer.
  Parallel parallel_over(int64_t numbers) const {
    Parallel parallel = args.parallel;
    if (numbers < kMinParallelElements) parallel.threads = 1;
    return parallel;
  }

  // What a kernel subtracts from x: the mean in a form that leaves no rounding errors, and what it lacks. Differences
  // from a number of T are exact for half precision; the rounding of others would be the same for all x of one binade.
  // A mean that no number of T is near, such as a running one of 7e4 for float16, is subtracted as it is.
  struct Center {
    A value;
    double low;
  };
  Center center(int64_t set) const {
    const A mean = stats.mean[set], rounded = round_to<T>(Pack<A>(mean))[0];
    if (!std::isfinite(rounded)) return {mean, stats.mean_low[set]};
    return {rounded, (static_cast<double>(mean) - rounded) + stats.mean_low[set]};
  }

  // The sum of d xhat from that of d (x - center), for a set or a part of it.
  double xhat_sum(int64_t set, const GradSums<double>& sums, double low) const {
    return fastnorm::xhat_sum<double>(sums.d, sums.d_centered, stats.rstd[set], low);
  }
  // Writes dweight and dbias, over all samples. sums_of(set)(i) are the sums of the set's i-th channel.
  template <class F>
  void write_sums_of_channels(F&& sums_of) const {
    if (args.dbias) std::fill_n(args.dbias, g.C, 0.0);
    if (args.dweight) std::fill_n(args.dweight, g.C, 0.0);
    const int64_t channels = g.set_channels();
    for (int64_t set = 0; set < g.sets(); ++set) {
      const double low = center(set).low;
      const int64_t first = first_channel(g, set);
      const auto sums_at = sums_of(set);
      for (int64_t i = 0; i < channels; ++i) {
        const GradSums<double> sums = sums_at(i);
        if (args.dbias) args.dbias[first + i] += sums.d;
        if (args.dweight) args.dweight[first + i] += xhat_sum(set, sums, low);
      }
    }
  }
  // The terms that dx subtracts. `d` and `d_xhat` are the sums of w d and w d xhat over the set.
  SetTerms<A> set_terms(int64_t set, double d, double d_xhat, double low) const {
    const double rstd = stats.rstd[set];
    return fastnorm::set_terms<A>(d, d_xhat, rstd, low, rstd / static_cast<double>(g.set_size()));
  }

  // The same where the sums over all ranks are given.
  SetTerms<A> given_terms(int64_t set) const {
    const A* const sums = static_cast<const A*>(args.sums);
    const double rstd = stats.rstd[set], w = weight[set];
    return fastnorm::set_terms<A>(w * sums[set], w * sums[g.C + set], rstd, center(set).low, rstd / *args.count);
  }
  // Whether backward has sums to take.
  bool takes_sums() const { return !args.sums && (!args.frozen || args.dweight || args.dbias); }

  // Whether backward computes d in its first pass and keeps it for the second, where it has to keep so many: a
  // derivative that takes more than a load and a store is computed once.
  bool caches_slopes(int64_t elements, int64_t most = kCachedInL2) const {
    return is_smooth(args.activation) && !args.frozen && elements <= most;
  }

  // Whether batch norm walks several sets side by side, run by run: its runs end before the prefetcher has found their
  // stream. Memory is then walked in its own order, and no store meets the loads of the next run at the same offset of
  // another page (32x2048x7x7 float32 backward took 31 ns a pack set by set).
  bool interleaves_sets(const Runs& runs) const {
    return g.kind == Kind::kBatch && runs.count > 1 && runs.length * static_cast<int64_t>(sizeof(T)) <= kShortRunBytes;
  }

  // How far ahead of a set's elements those lie that are to be fetched; 0 for none.
  int64_t distance_ahead(const Runs& runs) const { return args.plan.fetches_next_run ? runs.stride : 0; }

  // Whether the cells of a set are runs so short that what is done once for each takes longer than their elements.
  bool has_short_cells() const { return g.cells_are_runs() && g.S <= kShortCell; }

  // Calls f(i, coefs) for the cells [begin, end) of a set.
  template <class F>
  FASTNORM_INLINE void for_cells(int64_t set, int64_t begin, int64_t end, F&& f) const {
    const Center c = center(set);
    const A low = static_cast<A>(c.low), rstd = stats.rstd[set];
    const int64_t channel = first_channel(g, set);
    for (int64_t i = begin; i < end; ++i)
      f(i, SharedCoefs<A>(c.value, low, rstd, weight[channel + i], bias[channel + i]));
  }

  SharedCoefs<A> shared_coefs(int64_t set, int64_t channel) const {
    const Center c = center(set);
    return {c.value, static_cast<A>(c.low), stats.rstd[set], weight[channel], bias[channel]};
  }
};

// The coefficients of every channel of every sample as arrays in the order of lanes. The mean and rstd of a set are
// repeated for each of its channels.
template <class T>
class ChannelArrays {
  using A = Accum<T>;

 public:
  explicit ChannelArrays(const Geometry& g) : g_(g), pitch_(lane_pitch<A>(g.C)), arrays_(g.outer() * pitch_) {}

  // Fills the channels [first, first + channels) of sample n, which are whole sets.
  template <class Args>
  void fill(const Call<T, Args>& call, int64_t n, int64_t first, int64_t channels) const {
    const int64_t D = g_.set_channels();
    for (int64_t c = first; c < first + channels; c += D) {
      const int64_t set = (n * g_.C + c) / D;
      const auto center = call.center(set);
      const A rstd = call.stats.rstd[set], low = static_cast<A>(center.low);
      for (int64_t i = c; i < c + D; ++i) {
        const int64_t lane = n * pitch_ + lane_of<T>(i);
        const A scale = rstd * call.weight[i];
        arrays_[0][lane] = center.value;
        arrays_[1][lane] = rstd;
        arrays_[2][lane] = scale;
        arrays_[3][lane] = call.bias[i] - low * scale;
      }
    }
    for (int64_t i = g_.C; i < pitch_ && first + channels == g_.C; ++i) {  // numbers that no store writes
      for (int k = 0; k < 4; ++k) arrays_[k][n * pitch_ + lane_of<T>(i)] = 0;
    }
  }
  template <class Args>
  void fill_all(const Call<T, Args>& call) const {
    for (int64_t n = 0; n < g_.outer(); ++n) fill(call, n, 0, g_.C);
  }

  ChannelCoefs<A> at(int64_t n) const {
    const int64_t i = n * pitch_;
    return {arrays_[0] + i, arrays_[1] + i, arrays_[2] + i, arrays_[3] + i};
  }

 private:
  const Geometry g_;
  const int64_t pitch_;
  const Arrays<A, 4> arrays_;
};

// Small sets go through a pass in batches: the processor works on the long chain from the sums of one set to its first
// result while it still reads the next set (LayerNorm of 96 float32: 14 ns a pack one by one, 9 in batches).
constexpr int64_t kMaxBatch = 8;
inline int64_t sets_per_batch(int64_t set_size) { return std::clamp<int64_t>(kBlock / set_size, 1, kMaxBatch); }

// ---- blocks ----

// The elements [offset, offset + length) of each of `runs` runs from first_run on.
struct Block {
  int64_t first_run, runs, offset, length;
  int64_t size() const { return runs * length; }
};

// Divides runs into blocks of about kBlock elements: parts of a long run, or several short runs.
class CacheBlocks {
 public:
  explicit CacheBlocks(const Runs& runs)
      : runs_(runs),
        per_run_(std::max<int64_t>(1, div_up(runs.length, kBlock))),
        runs_per_block_(per_run_ > 1 ? 1 : std::max<int64_t>(1, kBlock / std::max<int64_t>(1, runs.length))) {}
  int64_t count() const { return per_run_ > 1 ? runs_.count * per_run_ : div_up(runs_.count, runs_per_block_); }
  int64_t chunks() const { return div_up(count(), kChunkBlocks); }
  Block operator[](int64_t b) const {
    if (per_run_ > 1) {
      const int64_t offset = b % per_run_ * kBlock;
      return {b / per_run_, 1, offset, std::min(kBlock, runs_.length - offset)};
    }
    const int64_t first = b * runs_per_block_;
    return {first, std::min(runs_per_block_, runs_.count - first), 0, runs_.length};
  }

 private:
  Runs runs_;
  int64_t per_run_, runs_per_block_;
};

}  // namespace fastnorm::FASTNORM_CPU_CAPABILITY
