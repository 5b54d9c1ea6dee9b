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
  static constexpr int64_t kPart = kBlock * kChunkBlocks / 2;
  static_assert(kShortCell <= kSummedInA);
  static constexpr A kSmallVariance = 1e-37;  // of deviations that are next to float's denormal numbers

  const bool batch_ = g.kind == Kind::kBatch;
  const Runs cell_runs_ = batch_ ? stat_runs(g) : Runs{1, g.S, 0};
  const CacheBlocks blocks_{cell_runs_};
  const int64_t cells_ = batch_ ? g.C : g.N * g.C;
  const int64_t cells_per_set_ = g.set_channels();
  const int64_t mask_row_ = mask_row_bytes(g.S, args.dtype);
  const bool sums_ = Base::takes_sums();
  const bool applies_ = args.dx || args.dresidual;
  const int64_t cached_run_ = div_up(g.S, kLanes<A>) * kLanes<A>, cached_cell_ = cell_runs_.count * cached_run_;
  const bool caches_d_ = sums_ && applies_ && !args.plan.split && Base::caches_slopes(cells_per_set_ * cached_cell_);
  const bool cells_are_short_ = Base::has_short_cells();

 public:
  using Base::Base;

  void run() {
    Buffer<Sums> sums(cells_);
    if (args.plan.split) {
      run_split(sums);
    } else {
      const int64_t per_task = args.plan.sets_per_task, batch = Base::interleaves_sets(cell_runs_) ? kMaxBatch : 1;
      for_each_task(args.parallel, div_up(g.sets(), per_task), [&](int64_t t) {
        const int64_t end = std::min((t + 1) * per_task, g.sets());
        for (int64_t set = t * per_task; set < end; set += batch) run_sets(set, std::min(batch, end - set), sums);
      });
    }
    if (!sums_) return;
    Base::write_sums_of_channels(
        [&](int64_t set) { return [of_set = sums + set * cells_per_set_](int64_t i) { return of_set[i]; }; });
  }

 private:
  void run_split(Sums* sums) const {
    // A part has several short cells, or a chunk of one.
    const int64_t chunks = blocks_.chunks(), cells = cells_are_short_ ? std::max<int64_t>(1, kPart / g.S) : 1;
    const int64_t parts_of_set = div_up(cells_per_set_, cells) * chunks, parts = g.sets() * parts_of_set;
    Buffer<Sums> partials(chunks > 1 ? parts : 0);
    for_each_task(args.parallel, sums_ ? parts : 0, [&](int64_t t) {
      const int64_t set = t / parts_of_set, first = t % parts_of_set / chunks * cells;
      if (cells_are_short_) {
        reduce_cells(set, first, std::min(first + cells, cells_per_set_), sums, nullptr);
      } else {
        reduce(t / chunks, 1, t % chunks, chunks > 1 ? partials + t : sums + t);
      }
    });
    for (int64_t cell = 0; cell < cells_ && sums_ && chunks > 1; ++cell) {
      sums[cell] = partials[cell * chunks];
      for (int64_t k = 1; k < chunks; ++k) sums[cell].merge(partials[cell * chunks + k]);
    }
    if (!applies_) return;
    const Buffer<SetTerms<A>> terms(g.sets());
    for (int64_t set = 0; set < g.sets(); ++set) terms[set] = terms_of(set, sums);
    const auto apply_part = [&](int64_t t) {
      const int64_t set = t / parts_of_set, first = t % parts_of_set / chunks * cells;
      const SharedTerms<A> own = terms[set];
      if (cells_are_short_) {
        apply_cells(set, first, std::min(first + cells, cells_per_set_), own, nullptr);
      } else {
        const int64_t block = t % chunks * kChunkBlocks;
        apply(t / chunks, 1, block, std::min(block + kChunkBlocks, blocks_.count()), &own);
      }
    };
    for_each_task(args.parallel, parts, apply_part, Order::kBackwards);
  }

  // Runs one set, or several sets of batch norm (a cell each) side by side.
  void run_sets(int64_t set, int64_t sets, Sums* sums) const {
    const int64_t first = set * cells_per_set_, cells = sets * cells_per_set_;
    const Buffer<A> buffer(caches_d_ ? cells * cached_cell_ : 0);
    A* const cached = caches_d_ ? static_cast<A*>(buffer) : nullptr;
    if (cells_are_short_) {
      if (sums_) reduce_cells(set, 0, cells, sums, cached);
      if (applies_) apply_cells(set, 0, cells, terms_of(set, sums), cached);
      return;
    }
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
    for (int64_t s = 0; s < sets; ++s) terms[s] = terms_of(set + s, sums);
    for (int64_t cell = first; cell < first + cells; cell += sets) {
      if (cached) {
        apply_cached(cell, sets, cached + (cell - first) * cached_cell_, terms);
      } else {
        apply(cell, sets, 0, blocks_.count(), terms);
      }
    }
  }

  // Short cells: what those of a set share is not made anew for each. The functions below are out of line for each E:
  // GCC keeps coefficients in registers in a small function only.
  void reduce_cells(int64_t set, int64_t begin, int64_t end, Sums* sums, A* cached) const {
    const int64_t first = set * cells_per_set_;
    if (stats.var[set] < kSmallVariance) {
      for (int64_t i = begin; i < end; ++i) {
        reduce(first + i, 1, 0, sums + first + i, cached ? cached + i * cached_cell_ : nullptr);
      }
      return;
    }
    with_smooth_activation(
        epilogue, [&](const auto& e) FASTNORM_LAMBDA { reduce_cells_with(e, set, begin, end, sums + first, cached); });
  }
  void apply_cells(int64_t set, int64_t begin, int64_t end, const SharedTerms<A>& terms, const A* cached) const {
    const auto as_it_is = [](const BackwardSpan<T>& s, int64_t) FASTNORM_LAMBDA { return s; };
    if (cached) {
      const auto with_d = [&](const BackwardSpan<T>& s, int64_t i)
                              FASTNORM_LAMBDA { return s.with_d(cached + i * cached_cell_); };
      const FixedEpilogue<Activation::kNone, A> none{Pack<A>(0)};
      apply_cells_with(none, set, begin, end, terms, with_d);
    } else {
      with_activation(epilogue, [&](const auto& e) FASTNORM_LAMBDA {
        if (args.frozen) {
          apply_cells_with(e, set, begin, end, FrozenTerms<A>{}, as_it_is);
        } else {
          apply_cells_with(e, set, begin, end, terms, as_it_is);
        }
      });
    }
  }
  template <class E>
  __attribute__((noinline)) void reduce_cells_with(const E& e, int64_t set, int64_t begin, int64_t end, Sums* out,
                                                   A* cached) const {
    Base::for_cells(set, begin, end, [&](int64_t i, const SharedCoefs<A>& coefs) FASTNORM_LAMBDA {
      const BackwardSpan<T> s = span(set * cells_per_set_ + i, 0, 0);
      HalfSum<A> sum, sum_centered;
      PackD none(0);
      A* const kept = cached ? cached + i * cached_cell_ : nullptr;
      for_packs<A>(g.S, SharedGradSums<T, false, E>{s, coefs, e, kept, sum, sum_centered, none, 0});
      out[i] = {sum_lanes(sum), sum_lanes(sum_centered)};
    });
  }
  template <class E, class Terms, class F>
  __attribute__((noinline)) void apply_cells_with(const E& e, int64_t set, int64_t begin, int64_t end,
                                                  const Terms& of_set, F&& with_d) const {
    const Terms terms = of_set;
    Base::for_cells(set, begin, end, [&](int64_t i, const SharedCoefs<A>& coefs) FASTNORM_LAMBDA {
      const auto s = with_d(span(set * cells_per_set_ + i, 0, 0), i);
      using D = std::remove_cvref_t<decltype(*s.dy)>;
      const bool stream = s.streams();
      for_packs<A>(g.S, BackwardPacks<T, D, SharedCoefs<A>, Terms, E>{s, coefs, terms, e}, stream);
    });
  }

  // Divisions only where they are needed: a run of 64 elements takes no longer than two.
  int64_t channel(int64_t cell) const { return batch_ ? cell : cell % g.C; }
  int64_t cell_set(int64_t cell) const { return batch_ ? cell : cell / cells_per_set_; }

  BackwardSpan<T> span(int64_t cell, int64_t run, int64_t offset) const {
    const int64_t base = cell * g.S + run * cell_runs_.stride, at = base + offset;
    return whole.moved(at, at, whole.mask ? base / g.S * mask_row_ + offset / 8 : 0);
  }

  // Reduces one chunk of `cells` cells side by side. Writes d to `cached`, if that is not null.
  void reduce(int64_t cell, int64_t cells, int64_t chunk, Sums* out, A* cached = nullptr) const {
    bool any_wide = false;
    for (int64_t s = 0; s < cells; ++s) any_wide |= is_wide(cell + s);
    with_smooth_activation(epilogue, [&](const auto& e) FASTNORM_LAMBDA {
      if (!any_wide) return reduce_with<false>(e, cell, cells, chunk, out, cached);
      for (int64_t s = 0; s < cells; ++s) {
        A* const own = cached ? cached + s * cached_cell_ : nullptr;
        if (is_wide(cell + s)) {
          reduce_with<true>(e, cell + s, 1, chunk, out + s, own);
        } else {
          reduce_with<false>(e, cell + s, 1, chunk, out + s, own);
        }
      }
    });
  }
  bool is_wide(int64_t cell) const { return stats.var[cell_set(cell)] < kSmallVariance; }

  template <bool kWide, class E>
  __attribute__((noinline)) void reduce_with(const E& e, int64_t cell, int64_t cells, int64_t chunk, Sums* out,
                                             A* cached) const {
    const int64_t ahead = Base::distance_ahead(cell_runs_);
    SharedCoefs<A> coefs[kMaxBatch];
    coefs_of(cell, cells, coefs);
    for (int64_t s = 0; s < cells; ++s) out[s] = {0, 0};
    for (int64_t b = chunk * kChunkBlocks; b < std::min((chunk + 1) * kChunkBlocks, blocks_.count()); ++b) {
      GradSums<PackD> lanes[kMaxBatch];
      for (int64_t s = 0; s < cells; ++s) lanes[s] = {PackD(0), PackD(0)};
      for_runs(
          cell, cells, b, b + 1,
          [&](const BackwardSpan<T>& span, int64_t length, int64_t s, int64_t run, int64_t offset) FASTNORM_LAMBDA {
            A* const kept = cached ? cached_at(cached, s, run, offset) : nullptr;
            const SharedCoefs<A> own = coefs[s];
            for (int64_t i = 0; i < length; i += kSummedInA) {
              const BackwardSpan<T> part = span.moved(i, i, i / 8);
              HalfSum<A> sum, sum_centered;
              PackD wide(0);
              for_packs<A>(
                  std::min(kSummedInA, length - i),
                  SharedGradSums<T, kWide, E>{part, own, e, kept ? kept + i : nullptr, sum, sum_centered, wide, ahead});
              lanes[s].d = lanes[s].d + widen(sum);
              lanes[s].d_centered = lanes[s].d_centered + (wide + widen(sum_centered));
            }
          });
      for (int64_t s = 0; s < cells; ++s) out[s].merge({sum_lanes(lanes[s].d), sum_lanes(lanes[s].d_centered)});
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

  SetTerms<A> terms_of(int64_t set, const Sums* sums) const {
    if (args.sums) return Base::given_terms(set);
    if (!sums_) return {0, 0};
    const double low = Base::center(set).low;
    double d = 0, d_xhat = 0;
    const int64_t first = set * cells_per_set_, first_of_channels = channel(first);
    for (int64_t i = 0; i < cells_per_set_; ++i) {
      const double w = weight[first_of_channels + i];
      d += w * sums[first + i].d;
      d_xhat += w * Base::xhat_sum(set, sums[first + i], low);
    }
    return Base::set_terms(set, d, d_xhat, low);
  }

  void apply(int64_t cell, int64_t cells, int64_t first, int64_t end, const SharedTerms<A>* terms) const {
    const auto as_it_is = [](const BackwardSpan<T>& span, int64_t, int64_t, int64_t)
                              FASTNORM_LAMBDA -> const BackwardSpan<T>& { return span; };
    with_activation(epilogue, [&](const auto& e) FASTNORM_LAMBDA {
      if (args.frozen) {
        constexpr FrozenTerms<A> none[kMaxBatch]{};
        apply_with(e, cell, cells, first, end, none, as_it_is);
      } else {
        apply_with(e, cell, cells, first, end, terms, as_it_is);
      }
    });
  }

  void apply_cached(int64_t cell, int64_t cells, A* cached, const SharedTerms<A>* terms) const {
    const auto with_d = [&](const BackwardSpan<T>& span, int64_t s, int64_t run, int64_t offset)
                            FASTNORM_LAMBDA { return span.with_d(cached_at(cached, s, run, offset)); };
    const FixedEpilogue<Activation::kNone, A> none{Pack<A>(0)};
    apply_with(none, cell, cells, 0, blocks_.count(), terms, with_d);
  }

  // terms: of each cell. with_d: the span that d is in.
  template <class E, class Terms, class F>
  __attribute__((noinline)) void apply_with(const E& e, int64_t cell, int64_t cells, int64_t first, int64_t end,
                                            const Terms* terms, F&& with_d) const {
    SharedCoefs<A> coefs[kMaxBatch];
    coefs_of(cell, cells, coefs);
    for_runs(
        cell, cells, first, end,
        [&](const BackwardSpan<T>& whole_run, int64_t length, int64_t k, int64_t run, int64_t offset) FASTNORM_LAMBDA {
          const auto s = with_d(whole_run, k, run, offset);
          using D = std::remove_cvref_t<decltype(*s.dy)>;
          const SharedCoefs<A> own = coefs[k];
          const Terms own_terms = terms[k];
          store_packs<A>(length, BackwardPacks<T, D, SharedCoefs<A>, Terms, E>{s, own, own_terms, e}, s.stores(length));
        });
  }

  void coefs_of(int64_t cell, int64_t cells, SharedCoefs<A>* out) const {
    for (int64_t s = 0; s < cells; ++s) out[s] = Base::shared_coefs(cell_set(cell + s), channel(cell + s));
  }
};

}  // namespace fastnorm::FASTNORM_CPU_CAPABILITY
