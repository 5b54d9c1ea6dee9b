// Forward where a set is runs of contiguous elements: planar batch and group norm, layer norm.
//
// What     statistics of each set (reduce, fold), then y = act((x - mean) * rstd * w + b + residual) (apply).
// Who      a task -> whole sets, one after the other, apply following reduce while the set is in the task's cache;
//          when there are few sets (plan.split) a task -> one chunk of a set in each of two passes.
// Traffic  x once from memory while a set fits the cache (twice otherwise), residual once, y once.
// Numerics every block of kBlock elements: its own mean, then the squares about it with the mean's correction, in A;
//          blocks and chunks merge in double in the order of their elements.
#pragma once

#include "task.h"

namespace fastnorm::FASTNORM_CPU_CAPABILITY {

// sum[p] += packs of x, four running sums.
template <class T>
struct SumPacks {
  using A = Accum<T>;
  const T* x;
  Pack<A> (&sum)[4];
  template <int P, class Access>
  FASTNORM_INLINE void packs(int64_t i, Access access) const {
    for (int p = 0; p < P; ++p) sum[p] = sum[p] + access.get(x + i + p * kLanes<A>, p);
  }
};

// delta += x - pivot, square += (x - pivot)^2; lanes past the end count for nothing. Four packs are added in A, then
// widened, as everywhere: in A alone the mean of heavy-tailed float16 was off by half an epsilon of the spread.
template <class T>
struct DeviationPacks {
  using A = Accum<T>;
  const T* x;
  const Pack<A> pivot;
  PackD &delta, &square;
  template <int P, class Access>
  FASTNORM_INLINE void packs(int64_t i, Access access) const {
    Pack<A> d[P];
    for (int p = 0; p < P; ++p) d[p] = access.keep(access.get(x + i + p * kLanes<A>, p) - pivot, p);
    // The next block, while this one sits in L1.
    for (int64_t byte = 0; byte < P * kLanes<A> * int64_t(sizeof(T)); byte += 64) {
      __builtin_prefetch(reinterpret_cast<const char*>(x + i + kBlock) + byte);
    }
    delta = delta + widen_halves(tree_sum(d));
    square = square + widen_halves(tree_dot(d, d));
  }
};

// The mean is relative to origin.
template <class T>
Moments<double> block_moments(const T* first, int64_t runs, int64_t length, int64_t stride, double origin) {
  using A = Accum<T>;
  const double count = static_cast<double>(runs * length);
  Pack<A> sum[4] = {Pack<A>(0), Pack<A>(0), Pack<A>(0), Pack<A>(0)};
  for (int64_t r = 0; r < runs; ++r) for_packs<A>(length, SumPacks<T>{first + r * stride, sum});
  // The mean as T holds it: differences of half-precision numbers are then exact, where their rounding would be the
  // same for all of one binade and not average out.
  const Pack<A> pivot = round_to<T>(Pack<A>(sum_lanes(tree_sum(sum)) / count));
  if (!std::isfinite(pivot[0])) return {static_cast<double>(pivot[0]), std::nan("")};

  PackD delta(0), square(0);
  for (int64_t r = 0; r < runs; ++r) {
    for_packs<A>(length, DeviationPacks<T>{first + r * stride, pivot, delta, square});
  }
  const double shift = sum_lanes(delta);
  const double m2 = sum_lanes(square) - shift * shift / count;
  return {(pivot[0] - origin) + shift / count, std::max(m2, 0.0)};
}

template <class T>
class RowsForward : Call<T, ForwardArgs> {
  using Base = Call<T, ForwardArgs>;
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
  const Blocks stat_blocks_{stat_runs_}, weight_blocks_{weight_runs_};
  const int64_t mask_row_ = mask_row_bytes(mask_run(g), args.dtype);

 public:
  using Base::Base;

  void run() {
    if (args.plan.split) {
      const int64_t chunks = stat_blocks_.chunks(), apply_chunks = weight_blocks_.chunks();
      Buffer<Partial> partials(g.sets() * chunks);
      for_each_task(args.parallel, g.sets() * chunks, [&](int64_t t) { partials[t] = reduce(t / chunks, t % chunks); });
      for (int64_t set = 0; set < g.sets(); ++set) fold(set, [&](int64_t k) { return partials[set * chunks + k]; });
      for_each_task(args.parallel, g.sets() * apply_chunks, [&](int64_t t) {
        const int64_t back = g.sets() * apply_chunks - 1 - t;  // what reduce read last is still in cache
        const int64_t first = back % apply_chunks * kChunkBlocks;
        apply(back / apply_chunks, first, std::min(first + kChunkBlocks, weight_blocks_.count()));
      });
      return;
    }
    const int64_t per_task = args.plan.sets_per_task, batch = sets_per_batch(g.set_size());
    for_each_task(args.parallel, div_up(g.sets(), per_task), [&](int64_t t) {
      const int64_t end = std::min((t + 1) * per_task, g.sets());
      for (int64_t first = t * per_task; first < end; first += batch) {
        const int64_t last = std::min(first + batch, end);
        for (int64_t set = last; set < std::min(last + batch, end); ++set) prefetch(set);
        for (int64_t set = first; set < last; ++set) fold(set, [&](int64_t k) { return reduce(set, k); });
        for (int64_t set = first; set < last; ++set) apply(set, 0, weight_blocks_.count());
      }
    });
  }

 private:
  Partial reduce(int64_t set, int64_t chunk) const {
    const T* base = x_ + set_base(g, set);
    const double origin = origin_of(base);
    const int64_t end = std::min((chunk + 1) * kChunkBlocks, stat_blocks_.count());
    const auto block = [&](int64_t b) {
      const Block k = stat_blocks_[b];
      const T* first = base + k.first_run * stat_runs_.stride + k.offset;
      return Partial{static_cast<double>(k.size()), block_moments(first, k.runs, k.length, stat_runs_.stride, origin)};
    };
    Partial total = block(chunk * kChunkBlocks);
    for (int64_t b = chunk * kChunkBlocks + 1; b < end; ++b) total.merge(block(b));
    return total;
  }

  template <class F>
  void fold(int64_t set, F&& partial) const {
    Partial total = partial(0);
    for (int64_t k = 1; k < stat_blocks_.chunks(); ++k) total.merge(partial(k));
    total.moments.mean += origin_of(x_ + set_base(g, set));
    stats.finish(set, total.moments, total.count, args.eps);
  }

  // Only batch norm's runs are short and apart; a group's follow one another.
  void prefetch(int64_t set) const {
    if (g.kind != Kind::kBatch) return;
    const int64_t base = set_base(g, set);
    prefetch_runs<false>(x_ + base, stat_runs_);
    if (residual_) prefetch_runs<false>(residual_ + base, stat_runs_);
    if (y_) prefetch_runs<true>(y_ + base, stat_runs_);
  }

  // Blocks [first, end) of a set, backwards: the last ones were read last.
  void apply(int64_t set, int64_t first, int64_t end) const {
    if (!y_) return;  // only the statistics are wanted
    const int64_t base = set_base(g, set), channel = first_channel(g, set);
    for (int64_t b = end - 1; b >= first; --b) {
      const Block k = weight_blocks_[b];
      for (int64_t r = k.first_run; r < k.first_run + k.runs; ++r) {
        const int64_t run = base + r * weight_runs_.stride;
        if (g.per_element()) {
          const ElementCoefs<A> coefs = Base::element_coefs(set);
          forward_stretch(stretch(run, k.offset), k.length, offset_coefs(coefs, k.offset), epilogue);
        } else {
          const int64_t c = g.kind == Kind::kBatch ? channel : channel + r;
          forward_stretch(stretch(run, k.offset), k.length, Base::shared_coefs(set, c), epilogue);
        }
      }
    }
  }

  static ElementCoefs<A> offset_coefs(ElementCoefs<A> coefs, int64_t offset) {
    coefs.weight += offset;
    coefs.bias += offset;
    return coefs;
  }

  ForwardStretch<T> stretch(int64_t run, int64_t offset) const {
    const int64_t at = run + offset;
    uint8_t* mask = args.mask ? args.mask + run / mask_run(g) * mask_row_ + offset / 8 : nullptr;
    return {x_ + at, residual_ ? residual_ + at : nullptr, y_ + at, mask, args.plan.stream};
  }
};

}  // namespace fastnorm::FASTNORM_CPU_CAPABILITY
