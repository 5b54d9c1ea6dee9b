// Forward where a set consists of runs of contiguous elements: planar batch and group norm, layer norm.
//
// What: takes the statistics of each set (reduce, fold), then computes y = act((x - mean) * rstd * w + b + residual)
//   (apply).
// Who: a task takes whole sets, one after the other; apply follows reduce while the set is in the task's cache. When
//   there are few sets, the plan is split: a task takes one chunk of a set in each of two passes.
// Traffic: reads x from memory once while a set fits the cache, twice otherwise; reads the residual and writes y once.
// Numerics: each block of kBlock elements takes its own mean first, then the squares about it and the correction of the
//   mean, in A. Blocks and chunks are merged in double, in the order of their elements.
#pragma once

#include "task.h"

namespace fastnorm::FASTNORM_CPU_CAPABILITY {

// Adds packs of x to `sum`.
template <class T>
struct SumPacks {
  using A = Accum<T>;
  const T* x;
  Pack<A>& sum;
  template <int P, class Access>
  FASTNORM_INLINE void packs(int64_t i, Access access) const {
    Pack<A> v[P];
    for (int p = 0; p < P; ++p) v[p] = access.get(x + i + p * kLanes<A>, p);
    sum = sum + tree_sum(v);
  }
};

// Adds x - pivot to `delta` and (x - pivot)^2 to `square`; lanes past the end add zero. Four packs are added in A, then
// widened, as everywhere: with A alone the mean of heavy-tailed float16 was off by half an epsilon of the spread.
template <class T>
struct DeviationPacks {
  using A = Accum<T>;
  const T* x;
  const Pack<A> pivot;
  PackD &delta, &square;
  template <int P, class Access>
  FASTNORM_INLINE void packs(int64_t i, Access access) const {
    Pack<A> d[P];
    for (int p = 0; p < P; ++p) d[p] = access.zero_past_end(access.get(x + i + p * kLanes<A>, p) - pivot, p);
    // Prefetches the next block while this one is in L1.
    for (int64_t byte = 0; byte < P * kLanes<A> * int64_t(sizeof(T)); byte += 64) {
      __builtin_prefetch(reinterpret_cast<const char*>(x + i + kBlock) + byte);
    }
    delta = delta + widen_halves(tree_sum(d));
    square = square + widen_halves(tree_dot(d, d));
  }
};

// The moments of one block of each of `sets` sets that lie set_stride apart: all sets' first run, then all sets'
// second, and so on. The means are relative to the origins.
template <class T>
void block_moments(const T* first, int64_t sets, int64_t set_stride, const Block& block, int64_t run_stride,
                   const double* origin, Moments<double>* out) {
  using A = Accum<T>;
  const double inverse = 1 / static_cast<double>(block.size());
  Pack<A> pivot[kMaxBatch];
  PackD delta[kMaxBatch], square[kMaxBatch];
  for (int64_t s = 0; s < sets; ++s) pivot[s] = Pack<A>(0), delta[s] = PackD(0), square[s] = PackD(0);
  const auto for_runs = [&](auto&& each) {
    for (int64_t r = 0; r < block.runs; ++r) {
      for (int64_t s = 0; s < sets; ++s) each(first + r * run_stride + s * set_stride, s);
    }
  };
  for_runs([&](const T* x, int64_t s) {
    Pack<A> sum = pivot[s];
    for_packs<A>(block.length, SumPacks<T>{x, sum});
    pivot[s] = sum;
  });
  // The pivot is the mean rounded to T, so that differences of half-precision numbers are exact. Their rounding would
  // be the same for all numbers of one binade and would not average out.
  for (int64_t s = 0; s < sets; ++s) pivot[s] = round_to<T>(Pack<A>(sum_lanes(pivot[s]) * inverse));
  for_runs([&](const T* x, int64_t s) {
    PackD deltas = delta[s], squares = square[s];
    for_packs<A>(block.length, DeviationPacks<T>{x, pivot[s], deltas, squares});
    delta[s] = deltas;
    square[s] = squares;
  });
  for (int64_t s = 0; s < sets; ++s) {
    const double sum = sum_lanes(delta[s]), shift = sum * inverse, about = pivot[s][0];
    const double m2 = sum_lanes(square[s]) - sum * shift;
    // When the mean is infinite, shift is NaN: the infinite mean must stay.
    out[s] = {std::isfinite(about) ? (about - origin[s]) + shift : about, std::max(m2, 0.0)};
  }
}

template <class T>
class RowsForward : Call<T, ForwardCall> {
  using Base = Call<T, ForwardCall>;
  using A = Accum<T>;
  using Base::args, Base::g, Base::stats, Base::epilogue;

  struct Partial {
    double count;
    Moments<double> moments;
    void merge(const Partial& other) {
      moments.merge(other.moments, count, other.count);
      count += other.count;
    }
  };

  const T* x_ = static_cast<const T*>(args.x);
  const T* residual_ = static_cast<const T*>(args.residual);
  T* y_ = static_cast<T*>(args.y);
  const Runs stat_runs_ = stat_runs(g), weight_runs_ = weight_runs(g);
  const CacheBlocks stat_blocks_{stat_runs_}, weight_blocks_{weight_runs_};
  const int64_t mask_row_ = mask_row_bytes(g.mask_run(), args.dtype);

 public:
  using Base::Base;

  void run() {
    if (args.plan.split) {
      const int64_t chunks = stat_blocks_.chunks(), apply_chunks = weight_blocks_.chunks();
      Buffer<Partial> partials(g.sets() * chunks);
      for_each_task(args.parallel, g.sets() * chunks,
                    [&](int64_t t) { reduce(t / chunks, 1, t % chunks, partials + t); });
      for (int64_t set = 0; set < g.sets(); ++set) {
        fold(set, 1, [&](int64_t k, Partial* out) { *out = partials[set * chunks + k]; });
      }
      for_each_task(args.parallel, g.sets() * apply_chunks, [&](int64_t t) {
        const int64_t back = g.sets() * apply_chunks - 1 - t;  // reduce left it in the cache
        const int64_t first = back % apply_chunks * kChunkBlocks;
        apply(back / apply_chunks, 1, first, std::min(first + kChunkBlocks, weight_blocks_.count()));
      });
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
          fold(set, reduced, [&](int64_t k, Partial* out) { reduce(set, reduced, k, out); });
        }
        for (int64_t set = first; set < last; set += applied) apply(set, applied, 0, weight_blocks_.count());
      }
    });
  }

 private:
  // Reduces one chunk of `sets` sets side by side.
  void reduce(int64_t set, int64_t sets, int64_t chunk, Partial* out) const {
    double origin[kMaxBatch];
    Moments<double> moments[kMaxBatch];
    for (int64_t s = 0; s < sets; ++s) origin[s] = origin_of_set(set + s);
    const int64_t begin = chunk * kChunkBlocks, end = std::min(begin + kChunkBlocks, stat_blocks_.count());
    for (int64_t b = begin; b < end; ++b) {
      const Block k = stat_blocks_[b];
      const T* first = x_ + set_base(g, set) + k.first_run * stat_runs_.stride + k.offset;
      block_moments(first, sets, set_base(g, 1), k, stat_runs_.stride, origin, moments);
      for (int64_t s = 0; s < sets; ++s) {
        const Partial block{static_cast<double>(k.size()), moments[s]};
        if (b == begin) {
          out[s] = block;
        } else {
          out[s].merge(block);
        }
      }
    }
  }

  // Merges chunks into sets and finishes their statistics; partial(k, out) gives the moments of chunk k.
  template <class F>
  void fold(int64_t set, int64_t sets, F&& partial) const {
    Partial total[kMaxBatch], chunk[kMaxBatch];
    partial(0, total);
    for (int64_t k = 1; k < stat_blocks_.chunks(); ++k) {
      partial(k, chunk);
      for (int64_t s = 0; s < sets; ++s) total[s].merge(chunk[s]);
    }
    for (int64_t s = 0; s < sets; ++s) {
      total[s].moments.mean += origin_of_set(set + s);
      stats.finish(set + s, total[s].moments, total[s].count, args.eps);
    }
  }

  // A set of a single block merges nothing, so it needs no origin.
  double origin_of_set(int64_t set) const { return stat_blocks_.count() == 1 ? 0 : origin_of(x_ + set_base(g, set)); }

  // Writes y in the blocks [first, end) of `sets` sets side by side.
  void apply(int64_t set, int64_t sets, int64_t first, int64_t end) const {
    if (!y_) return;  // the caller wants only the statistics
    for (int64_t b = first; b < end; ++b) {
      const Block k = weight_blocks_[b];
      for (int64_t r = k.first_run; r < k.first_run + k.runs; ++r) {
        for (int64_t s = set; s < set + sets; ++s) apply_run(s, r, k.offset, k.length);
      }
    }
  }

  FASTNORM_INLINE void apply_run(int64_t set, int64_t r, int64_t offset, int64_t length) const {
    const ForwardSpan<T> s = span(set_base(g, set) + r * weight_runs_.stride, offset);
    if (g.per_element()) {
      forward_span(s, length, offset_coefs(Base::element_coefs(set), offset), epilogue);
    } else {
      const int64_t c = first_channel(g, set) + (g.kind == Kind::kBatch ? 0 : r);
      forward_span(s, length, Base::shared_coefs(set, c), epilogue);
    }
  }

  static ElementCoefs<A> offset_coefs(ElementCoefs<A> coefs, int64_t offset) {
    coefs.weight += offset;
    coefs.bias += offset;
    return coefs;
  }

  ForwardSpan<T> span(int64_t run, int64_t offset) const {
    const int64_t at = run + offset;
    uint8_t* mask = args.mask ? args.mask + run / g.mask_run() * mask_row_ + offset / 8 : nullptr;
    return {x_ + at, residual_ ? residual_ + at : nullptr, y_ + at, mask, args.plan.stream};
  }
};

}  // namespace fastnorm::FASTNORM_CPU_CAPABILITY
