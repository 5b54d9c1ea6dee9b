// Backward of rows_forward.h.
//
// What     sums of d and d (x - mean) per cell (reduce), their weighted means per set (fold), then
//          dx = rstd * (w d - mean(w d) - xhat mean(w d xhat)) (apply); dweight and dbias are the cells' sums.
// Who      a task -> whole sets; when there are few (plan.split) a task -> a chunk of a cell in each of two passes.
// Traffic  dy and x once from memory while a set fits the cache (twice otherwise), dx once; a bit per element or the
//          residual when an activation follows a residual add.
// Numerics sums of four packs in A, everything beyond in double, in the order of the elements.
#pragma once

#include "task.h"

namespace fastnorm::FASTNORM_CPU_CAPABILITY {

template <class T>
class RowsBackward : Call<T, BackwardArgs> {
  using Base = Call<T, BackwardArgs>;
  using A = Accum<T>;
  using Base::args, Base::g, Base::stats, Base::epilogue, Base::weight;
  using Sums = GradSums<double>;

  const T* dy_ = static_cast<const T*>(args.dy);
  const T* x_ = static_cast<const T*>(args.x);
  const T* residual_ = static_cast<const T*>(args.residual);
  T* dx_ = static_cast<T*>(args.dx);
  T* dresidual_ = static_cast<T*>(args.dresidual);
  const bool batch_ = g.kind == Kind::kBatch;
  const Runs cell_runs_ = batch_ ? stat_runs(g) : Runs{1, g.S, 0};
  const Blocks blocks_{cell_runs_};
  const int64_t cells_ = batch_ ? g.C : g.N * g.C;
  const int64_t cells_per_set_ = batch_ ? 1 : g.D();
  const int64_t mask_row_ = mask_row_bytes(g.S, args.dtype);
  const bool sums_ = !args.frozen || args.dweight || args.dbias;
  const bool applies_ = args.dx || args.dresidual;

 public:
  using Base::Base;

  void run() {
    Buffer<Sums> sums(cells_);
    if (args.plan.split && sums_) {
      const int64_t chunks = blocks_.chunks();
      Buffer<Sums> partials(cells_ * chunks);
      for_each_task(args.parallel, cells_ * chunks, [&](int64_t t) { partials[t] = reduce(t / chunks, t % chunks); });
      for (int64_t cell = 0; cell < cells_; ++cell) {
        sums[cell] = partials[cell * chunks];
        for (int64_t k = 1; k < chunks; ++k) sums[cell].merge(partials[cell * chunks + k]);
      }
      if (applies_) {
        for_each_task(args.parallel, cells_ * chunks, [&](int64_t t) {
          const int64_t back = cells_ * chunks - 1 - t;  // what reduce read last is still in cache
          const int64_t cell = back / chunks, first = back % chunks * kChunkBlocks;
          apply(cell, first, std::min(first + kChunkBlocks, blocks_.count()), fold(cell / cells_per_set_, sums));
        });
      }
    } else {
      const int64_t per_task = args.plan.sets_per_task;
      for_each_task(args.parallel, div_up(g.sets(), per_task), [&](int64_t t) {
        const int64_t end = std::min((t + 1) * per_task, g.sets());
        for (int64_t set = t * per_task; set < end; ++set) {
          if (set + 1 < end) prefetch(set + 1);
          run_set(set, sums);
        }
      });
    }
    if (sums_) sum_over_samples(sums);
  }

 private:
  // Only batch norm's runs are short and apart; a group's follow one another.
  void prefetch(int64_t set) const {
    if (!batch_) return;
    const int64_t base = set_base(g, set);
    prefetch_runs<false>(dy_ + base, cell_runs_);
    prefetch_runs<false>(x_ + base, cell_runs_);
    if (residual_) prefetch_runs<false>(residual_ + base, cell_runs_);
    if (dx_) prefetch_runs<true>(dx_ + base, cell_runs_);
    if (dresidual_) prefetch_runs<true>(dresidual_ + base, cell_runs_);
  }

  void run_set(int64_t set, Sums* sums) const {
    const int64_t first = set * cells_per_set_, end = first + cells_per_set_;
    for (int64_t cell = first; cell < end && sums_; ++cell) {
      sums[cell] = reduce(cell, 0);
      for (int64_t k = 1; k < blocks_.chunks(); ++k) sums[cell].merge(reduce(cell, k));
    }
    if (!applies_) return;
    const SharedTerms<A> terms = sums_ ? fold(set, sums) : SharedTerms<A>(SetTerms<A>{0, 0});
    for (int64_t cell = end - 1; cell >= first; --cell) apply(cell, 0, blocks_.count(), terms);
  }

  int64_t channel(int64_t cell) const { return cell % g.C; }
  SharedCoefs<A> coefs(int64_t cell) const { return Base::shared_coefs(cell / cells_per_set_, channel(cell)); }

  BackwardStretch<T> stretch(int64_t cell, int64_t run, int64_t offset) const {
    const int64_t base = cell * g.S + run * cell_runs_.stride, at = base + offset;
    return {dy_ + at,
            x_ + at,
            residual_ ? residual_ + at : nullptr,
            args.mask ? args.mask + base / g.S * mask_row_ + offset / 8 : nullptr,
            dx_ ? dx_ + at : nullptr,
            dresidual_ ? dresidual_ + at : nullptr,
            args.plan.stream};
  }

  Sums reduce(int64_t cell, int64_t chunk) const {
    const SharedCoefs<A> c = coefs(cell);
    GradSums<PackD> lanes{PackD(0), PackD(0)};
    const int64_t end = std::min((chunk + 1) * kChunkBlocks, blocks_.count());
    for (int64_t b = chunk * kChunkBlocks; b < end; ++b) {
      const Block k = blocks_[b];
      for (int64_t r = k.first_run; r < k.first_run + k.runs; ++r) {
        const BackwardStretch<T> s = stretch(cell, r, k.offset);
        if (batch_) {
          for_packs<A>(k.length, SharedGradSums<T, true>{s, c, epilogue, lanes});
        } else {
          for_packs<A>(k.length, SharedGradSums<T, false>{s, c, epilogue, lanes});
        }
      }
    }
    return {sum_lanes(lanes.d), sum_lanes(lanes.d_centered)};
  }

  SharedTerms<A> fold(int64_t set, const Sums* sums) const {
    double d = 0, d_xhat = 0;
    for (int64_t cell = set * cells_per_set_; cell < (set + 1) * cells_per_set_; ++cell) {
      const double w = weight[channel(cell)];
      d += w * sums[cell].d;
      d_xhat += w * Base::xhat_sum(set, sums[cell]);
    }
    return Base::set_terms(set, d, d_xhat);
  }

  void apply(int64_t cell, int64_t first, int64_t end, const SharedTerms<A>& terms) const {
    const SharedCoefs<A> c = coefs(cell);
    for (int64_t b = end - 1; b >= first; --b) {
      const Block k = blocks_[b];
      for (int64_t r = k.first_run; r < k.first_run + k.runs; ++r) {
        const BackwardStretch<T> s = stretch(cell, r, k.offset);
        if (args.frozen) {
          backward_stretch(s, k.length, c, FrozenTerms<A>{}, epilogue);
        } else {
          backward_stretch(s, k.length, c, terms, epilogue);
        }
      }
    }
  }

  void sum_over_samples(const Sums* sums) const {
    for (int64_t c = 0; c < g.C; ++c) {
      double d = 0, d_xhat = 0;
      for (int64_t cell = c; cell < cells_; cell += g.C) {
        d += sums[cell].d;
        d_xhat += Base::xhat_sum(cell / cells_per_set_, sums[cell]);
      }
      if (args.dbias) args.dbias[c] = d;
      if (args.dweight) args.dweight[c] = d_xhat;
    }
  }
};

}  // namespace fastnorm::FASTNORM_CPU_CAPABILITY
