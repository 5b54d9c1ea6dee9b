// Backward of rows_forward.h.
//
// What: takes the sums of d and d (x - mean) of each cell (reduce) and their weighted means over each set (fold), then
//   computes dx = rstd * (w d - mean(w d) - xhat mean(w d xhat)) (apply). dweight and dbias are the sums of the cells.
// Who: a task takes whole sets. When there are few sets, the plan is split: a task takes a chunk of a cell in each of
//   two passes.
// Traffic: reads dy and x from memory once while a set fits the cache, twice otherwise; writes dx once. When an
//   activation follows a residual add, it also reads a bit per element or the residual.
// Numerics: kSummedInA elements are added in A, everything beyond in double, in the order of the elements. (With 4096
//   dweight of float32 was off by 2.7 epsilons where torch's was by 1.4.)
#pragma once

#include "task.h"

namespace fastnorm::FASTNORM_CPU_CAPABILITY {

template <class T>
class RowsBackward : Call<T, BackwardCall> {
  using Base = Call<T, BackwardCall>;
  using A = Accum<T>;
  using Base::args, Base::whole, Base::g, Base::stats, Base::epilogue, Base::weight;
  using Sums = GradSums<double>;
  static constexpr int64_t kSummedInA = 1024;
  static constexpr A kSmallVariance = 1e-37;  // of deviations that are next to float's denormal numbers

  const bool batch_ = g.kind == Kind::kBatch;
  const Runs cell_runs_ = batch_ ? stat_runs(g) : Runs{1, g.S, 0};
  const CacheBlocks blocks_{cell_runs_};
  const int64_t cells_ = batch_ ? g.C : g.N * g.C;
  const int64_t cells_per_set_ = g.set_channels();
  const int64_t mask_row_ = mask_row_bytes(g.S, args.dtype);
  const bool sums_ = !args.frozen || args.dweight || args.dbias;
  const bool applies_ = args.dx || args.dresidual;
  const int64_t cached_run_ = div_up(g.S, kLanes<A>) * kLanes<A>, cached_cell_ = cell_runs_.count * cached_run_;
  const bool caches_d_ = sums_ && applies_ && !args.plan.split && Base::caches_slopes(cells_per_set_ * cached_cell_);

 public:
  using Base::Base;

  void run() {
    Buffer<Sums> sums(cells_);
    if (args.plan.split && sums_) {
      const int64_t chunks = blocks_.chunks();
      Buffer<Sums> partials(cells_ * chunks);
      for_each_task(args.parallel, cells_ * chunks,
                    [&](int64_t t) { reduce(t / chunks, 1, t % chunks, partials + t); });
      for (int64_t cell = 0; cell < cells_; ++cell) {
        sums[cell] = partials[cell * chunks];
        for (int64_t k = 1; k < chunks; ++k) sums[cell].merge(partials[cell * chunks + k]);
      }
      if (applies_) {
        for_each_task(args.parallel, cells_ * chunks, [&](int64_t t) {
          const int64_t back = cells_ * chunks - 1 - t;  // reduce left it in the cache
          const int64_t cell = back / chunks, first = back % chunks * kChunkBlocks;
          const SharedTerms<A> terms = fold(cell / cells_per_set_, sums);
          apply(cell, 1, first, std::min(first + kChunkBlocks, blocks_.count()), &terms);
        });
      }
    } else {
      const int64_t per_task = args.plan.sets_per_task, batch = Base::interleaves_sets(cell_runs_) ? kMaxBatch : 1;
      for_each_task(args.parallel, div_up(g.sets(), per_task), [&](int64_t t) {
        const int64_t end = std::min((t + 1) * per_task, g.sets());
        for (int64_t set = t * per_task; set < end; set += batch) run_sets(set, std::min(batch, end - set), sums);
      });
    }
    if (sums_) sum_over_samples(sums);
  }

 private:
  // Runs one set, or several sets of batch norm (a cell each) side by side.
  void run_sets(int64_t set, int64_t sets, Sums* sums) const {
    const int64_t first = set * cells_per_set_, cells = sets * cells_per_set_;
    const Buffer<A> buffer(caches_d_ ? cells * cached_cell_ : 0);
    A* const cached = caches_d_ ? static_cast<A*>(buffer) : nullptr;
    for (int64_t cell = first; cell < first + cells && sums_; cell += sets) {
      A* const cell_cached = cached ? cached + (cell - first) * cached_cell_ : nullptr;
      reduce(cell, sets, 0, sums + cell, cell_cached);
      for (int64_t k = 1; k < blocks_.chunks(); ++k) {
        Sums chunk[kMaxBatch];
        reduce(cell, sets, k, chunk, cell_cached);
        for (int64_t s = 0; s < sets; ++s) sums[cell + s].merge(chunk[s]);
      }
    }
    if (!applies_) return;
    SharedTerms<A> terms[kMaxBatch];
    for (int64_t s = 0; s < sets; ++s) terms[s] = sums_ ? fold(set + s, sums) : SetTerms<A>{0, 0};
    for (int64_t cell = first; cell < first + cells; cell += sets) {
      if (cached) {
        apply_cached(cell, sets, cached + (cell - first) * cached_cell_, terms);
      } else {
        apply(cell, sets, 0, blocks_.count(), terms);
      }
    }
  }

  int64_t channel(int64_t cell) const { return cell % g.C; }
  int64_t cell_set(int64_t cell) const { return cell / cells_per_set_; }
  SharedCoefs<A> coefs(int64_t cell) const { return Base::shared_coefs(cell_set(cell), channel(cell)); }

  BackwardSpan<T> span(int64_t cell, int64_t run, int64_t offset) const {
    const int64_t base = cell * g.S + run * cell_runs_.stride, at = base + offset;
    return whole.moved(at, at, base / g.S * mask_row_ + offset / 8);
  }

  // Reduces one chunk of `cells` cells side by side. Writes d to `cached`, if that is not null.
  void reduce(int64_t cell, int64_t cells, int64_t chunk, Sums* out, A* cached = nullptr) const {
    for (int64_t s = 0; s < cells; ++s) out[s] = {0, 0};
    for (int64_t b = chunk * kChunkBlocks; b < std::min((chunk + 1) * kChunkBlocks, blocks_.count()); ++b) {
      GradSums<PackD> lanes[kMaxBatch];
      for (int64_t s = 0; s < cells; ++s) lanes[s] = {PackD(0), PackD(0)};
      for_runs(cell, cells, b, b + 1,
               [&](const BackwardSpan<T>& span, int64_t length, int64_t s, int64_t run, int64_t offset) {
                 reduce_run(span, length, cell + s, cached ? cached_at(cached, s, run, offset) : nullptr, lanes[s]);
               });
      for (int64_t s = 0; s < cells; ++s) out[s].merge({sum_lanes(lanes[s].d), sum_lanes(lanes[s].d_centered)});
    }
  }

  FASTNORM_INLINE void reduce_run(const BackwardSpan<T>& span, int64_t length, int64_t cell, A* cached,
                                  GradSums<PackD>& lanes) const {
    const SharedCoefs<A> c = coefs(cell);
    const bool wide = stats.var[cell_set(cell)] < kSmallVariance;
    for (int64_t i = 0; i < length; i += kSummedInA) {
      const BackwardSpan<T> part = span.moved(i, i, i / 8);
      const int64_t n = std::min(kSummedInA, length - i);
      A* const kept = cached ? cached + i : nullptr;
      HalfSum<A> sum, sum_centered;
      PackD wide_sum(0);
      with_smooth_activation(epilogue, [&](const auto& e) FASTNORM_LAMBDA {
        using E = std::decay_t<decltype(e)>;
        if (wide) {
          for_packs<A>(n, SharedGradSums<T, true, E>{part, c, e, kept, sum, sum_centered, wide_sum});
        } else {
          for_packs<A>(n, SharedGradSums<T, false, E>{part, c, e, kept, sum, sum_centered, wide_sum});
        }
      });
      lanes.d = lanes.d + widen(sum);
      lanes.d_centered = lanes.d_centered + (wide_sum + widen(sum_centered));
    }
  }

  // Every cached run begins at a whole pack, so that storing a pack past the end of one run spoils no other.
  FASTNORM_INLINE A* cached_at(A* cached, int64_t s, int64_t run, int64_t offset) const {
    return cached + s * cached_cell_ + run * cached_run_ + offset;
  }

  // Calls f(span, length, s, run, offset) for the runs of the blocks [first, end) of each cell + s: all cells' first
  // run, then all cells' second, and so on.
  template <class F>
  FASTNORM_INLINE void for_runs(int64_t cell, int64_t cells, int64_t first, int64_t end, F&& f) const {
    for (int64_t b = first; b < end; ++b) {
      const Block k = blocks_[b];
      for (int64_t r = k.first_run; r < k.first_run + k.runs; ++r) {
        for (int64_t s = 0; s < cells; ++s) f(span(cell + s, r, k.offset), k.length, s, r, k.offset);
      }
    }
  }

  SharedTerms<A> fold(int64_t set, const Sums* sums) const {
    const double low = Base::center(set).low;
    double d = 0, d_xhat = 0;
    for (int64_t cell = set * cells_per_set_; cell < (set + 1) * cells_per_set_; ++cell) {
      const double w = weight[channel(cell)];
      d += w * sums[cell].d;
      d_xhat += w * Base::xhat_sum(set, sums[cell], low);
    }
    return Base::set_terms(set, d, d_xhat, low);
  }

  void apply(int64_t cell, int64_t cells, int64_t first, int64_t end, const SharedTerms<A>* terms) const {
    for_runs(cell, cells, first, end, [&](const BackwardSpan<T>& span, int64_t length, int64_t s, int64_t, int64_t) {
      if (args.frozen) {
        backward_span(span, length, coefs(cell + s), FrozenTerms<A>{}, epilogue);
      } else {
        backward_span(span, length, coefs(cell + s), terms[s], epilogue);
      }
    });
  }

  void apply_cached(int64_t cell, int64_t cells, A* cached, const SharedTerms<A>* terms) const {
    const Epilogue<A> none{Activation::kNone, Pack<A>(0)};
    const auto each = [&](const BackwardSpan<T>& s, int64_t length, int64_t k, int64_t run, int64_t offset) {
      backward_span(s.with_d(cached_at(cached, k, run, offset)), length, coefs(cell + k), terms[k], none);
    };
    for_runs(cell, cells, 0, blocks_.count(), each);
  }

  void sum_over_samples(const Sums* sums) const {
    for (int64_t c = 0; c < g.C; ++c) {
      double d = 0, d_xhat = 0;
      for (int64_t cell = c; cell < cells_; cell += g.C) {
        d += sums[cell].d;
        const int64_t set = cell_set(cell);
        d_xhat += Base::xhat_sum(set, sums[cell], Base::center(set).low);
      }
      if (args.dbias) args.dbias[c] = d;
      if (args.dweight) args.dweight[c] = d_xhat;
    }
  }
};

}  // namespace fastnorm::FASTNORM_CPU_CAPABILITY
