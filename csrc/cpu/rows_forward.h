// Forward where a set consists of runs of contiguous elements: planar batch and group norm, layer norm.
//
// What: takes the statistics of each set (reduce, fold), then computes y = act((x - mean) * rstd * w + b + residual)
//   (apply).
// Who: a task takes whole sets, one after the other; apply follows reduce while the set is in the task's cache. When
//   there are few sets, the plan is split: a task takes one chunk of a set in each of two passes.
// Traffic: reads x from memory once while a set fits the cache, twice otherwise; reads the residual and writes y once.
// Numerics: moments are sums of x - pivot and of its square (moments.h). A block of kBlock elements is added in A,
// blocks
//   and chunks in double, in the order of their elements.
#pragma once

#include "moments.h"
#include "task.h"

namespace fastnorm::FASTNORM_CPU_CAPABILITY {

template <class T>
class RowsForward : Call<T, ForwardCall> {
  using Base = Call<T, ForwardCall>;
  using A = Accum<T>;
  using Base::args, Base::whole, Base::g, Base::stats, Base::epilogue;

  const ElementParams<T> weights_{g, Base::weight}, biases_{g, Base::bias};
  const Runs stat_runs_ = stat_runs(g), weight_runs_ = weight_runs(g);
  const CacheBlocks stat_blocks_{stat_runs_}, weight_blocks_{weight_runs_};
  const int64_t ahead_ = Base::distance_ahead(stat_runs_);
  const int64_t mask_row_ = mask_row_bytes(g.mask_run(), args.dtype);
  const bool cells_are_short_ = Base::has_short_cells();

 public:
  using Base::Base;

  void run() {
    if (args.plan.split) {
      const int64_t chunks = stat_blocks_.chunks(), apply_chunks = weight_blocks_.chunks();
      Buffer<PivotSums> partials(g.sets() * chunks);
      Buffer<A> pivots(g.sets());
      for (int64_t set = 0; set < g.sets(); ++set) pivots[set] = pivot_of(set);
      for_each_task(args.parallel, g.sets() * chunks,
                    [&](int64_t t) { reduce(t / chunks, 1, t % chunks, pivots + t / chunks, partials + t); });
      for (int64_t set = 0; set < g.sets(); ++set) {
        fold(set, 1, pivots + set, [&](int64_t k, PivotSums* out) { *out = partials[set * chunks + k]; });
      }
      const auto apply_chunk = [&](int64_t t) {
        const int64_t first = t % apply_chunks * kChunkBlocks;
        apply(t / apply_chunks, 1, first, std::min(first + kChunkBlocks, weight_blocks_.count()));
      };
      for_each_task(args.parallel, g.sets() * apply_chunks, apply_chunk, Order::kBackwards);
      return;
    }
    const int64_t per_task = args.plan.sets_per_task;
    const bool interleaved = Base::interleaves_sets(stat_runs_);
    const int64_t batch = interleaved ? kMaxBatch : sets_per_batch(g.set_size());
    for_each_task(args.parallel, div_up(g.sets(), per_task), [&](int64_t t) {
      const int64_t end = std::min((t + 1) * per_task, g.sets());
      for (int64_t first = t * per_task; first < end; first += batch) {
        const int64_t last = std::min(first + batch, end);
        const int64_t reduced = batch > 1 ? last - first : 1, applied = interleaved ? last - first : 1;
        for (int64_t set = first; set < last; set += reduced) {
          A pivots[kMaxBatch];
          for (int64_t s = 0; s < reduced; ++s) pivots[s] = pivot_of(set + s);
          fold(set, reduced, pivots, [&](int64_t k, PivotSums* out) { reduce(set, reduced, k, pivots, out); });
        }
        for (int64_t set = first; set < last; set += applied) apply(set, applied, 0, weight_blocks_.count());
      }
    });
  }

 private:
  // The pivot of a set: the mean of some packs that are spread over it.
  A pivot_of(int64_t set) const {
    const T* x = whole.x + set_base(g, set);
    PivotSample<T> sample;
    const int64_t runs = std::min(stat_runs_.count, kPivotPacks), per_run = kPivotPacks / runs;
    for (int64_t r = 0; r < runs; ++r) {
      const T* run = x + stat_runs_.count * r / runs * stat_runs_.stride;
      for (int64_t k = 0; k < per_run; ++k) {
        const int64_t offset = stat_runs_.length * k / per_run / kLanes<A> * kLanes<A>;
        sample.add(run + offset, stat_runs_.length - offset);
      }
    }
    return sample.pivot();
  }

  // Reduces one chunk of `sets` sets side by side: all sets' first run, then all sets' second, and so on.
  void reduce(int64_t set, int64_t sets, int64_t chunk, const A* pivots, PivotSums* out) const {
    for (int64_t s = 0; s < sets; ++s) out[s] = {0, 0};
    const int64_t begin = chunk * kChunkBlocks, end = std::min(begin + kChunkBlocks, stat_blocks_.count());
    for (int64_t b = begin; b < end; ++b) {
      const Block k = stat_blocks_[b];
      Pack<A> delta[kMaxBatch], square[kMaxBatch];
      for (int64_t s = 0; s < sets; ++s) delta[s] = square[s] = Pack<A>(0);
      for (int64_t r = k.first_run; r < k.first_run + k.runs; ++r) {
        for (int64_t s = 0; s < sets; ++s) {
          const T* x = whole.x + set_base(g, set + s) + r * stat_runs_.stride + k.offset;
          Pack<A> d = delta[s], q = square[s];
          for_packs<A>(k.length, DeviationPacks<T>{x, Pack<A>(pivots[s]), d, q, ahead_});
          delta[s] = d, square[s] = q;
        }
      }
      for (int64_t s = 0; s < sets; ++s) out[s].merge({sum_lanes(delta[s]), sum_lanes(square[s])});
    }
  }

  // Merges chunks into sets and finishes their statistics; partial(k, out) gives the sums of chunk k.
  template <class F>
  void fold(int64_t set, int64_t sets, const A* pivots, F&& partial) const {
    const double count = static_cast<double>(g.set_size()), share = 1 / count;
    PivotSums total[kMaxBatch], chunk[kMaxBatch];
    partial(0, total);
    for (int64_t k = 1; k < stat_blocks_.chunks(); ++k) {
      partial(k, chunk);
      for (int64_t s = 0; s < sets; ++s) total[s].merge(chunk[s]);
    }
    for (int64_t s = 0; s < sets; ++s) {
      Moments<double> moments = total[s].moments(pivots[s], share);
      if (total[s].far_off(moments, share, count)) moments = reduce_again(set + s, moments.mean);
      stats.finish(set + s, moments, share, args.eps);
    }
  }

  // The moments of a set whose pivot was far from its mean.
  Moments<double> reduce_again(int64_t set, double mean) const {
    const A pivot = round_pivot<T>(mean);
    PivotSums total{0, 0}, chunk;
    for (int64_t k = 0; k < stat_blocks_.chunks(); ++k) {
      reduce(set, 1, k, &pivot, &chunk);
      total.merge(chunk);
    }
    return total.moments(pivot, 1 / static_cast<double>(g.set_size()));
  }

  // Writes y in the blocks [first, end) of `sets` sets side by side.
  void apply(int64_t set, int64_t sets, int64_t first, int64_t end) const {
    if (!whole.y) return;  // the caller wants only the statistics
    if (cells_are_short_) {
      const Block last = weight_blocks_[end - 1];
      with_smooth_activation(epilogue, [&](const auto& e) FASTNORM_LAMBDA {
        for (int64_t s = set; s < set + sets; ++s) {
          apply_cells(s, weight_blocks_[first].first_run, last.first_run + last.runs, e);
        }
      });
      return;
    }
    for (int64_t b = first; b < end; ++b) {
      const Block k = weight_blocks_[b];
      for (int64_t r = k.first_run; r < k.first_run + k.runs; ++r) {
        for (int64_t s = set; s < set + sets; ++s) apply_run(s, r, k.offset, k.length);
      }
    }
  }

  // The same where cells are short: what a set's cells share is not made anew for each. It is out of line for each E:
  // GCC keeps coefficients in registers in a small function only.
  template <class E>
  __attribute__((noinline)) void apply_cells(int64_t set, int64_t begin, int64_t end, const E& e) const {
    Base::for_cells(set, begin, end, [&](int64_t i, const SharedCoefs<A>& coefs) FASTNORM_LAMBDA {
      const ForwardSpan<T> s = span(set_base(g, set) + i * g.S, 0);
      for_packs<A>(g.S, ForwardPacks<T, SharedCoefs<A>, E>{s, coefs, e}, s.streams());
    });
  }

  FASTNORM_INLINE void apply_run(int64_t set, int64_t r, int64_t offset, int64_t length) const {
    const ForwardSpan<T> s = span(set_base(g, set) + r * weight_runs_.stride, offset).fetching(ahead_);
    if (g.per_element()) {
      const int64_t group = set % g.G;
      const A *w = weights_.of_group(group) + offset, *b = biases_.of_group(group) + offset;
      forward_span(s, length, ElementCoefs<A, 1>(stats.mean + set, stats.rstd + set, w, b), epilogue);
    } else {
      const int64_t c = first_channel(g, set) + (g.kind == Kind::kBatch ? 0 : r);
      forward_span(s, length, Base::shared_coefs(set, c), epilogue);
    }
  }

  ForwardSpan<T> span(int64_t run, int64_t offset) const {
    return whole.moved(run + offset, whole.mask ? run / g.mask_run() * mask_row_ + offset / 8 : 0);
  }
};

}  // namespace fastnorm::FASTNORM_CPU_CAPABILITY
