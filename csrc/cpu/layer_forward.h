// Forward where every element of a set has its own weight: layer norm, and group norm of (N, C).
//
// What: does what rows_forward.h does, with kRowGroup sets at a time where the plan says so and they are short: their
//   sums are folded next to each other, and weight and bias are loaded once for all of them. Sets longer than a chunk
//   are left to rows_forward.h.
// Who: a task takes whole sets.
// Traffic: reads x from memory once, three times in all; reads the residual and writes y once.
// Numerics: the mean comes first and the squares about it after, both in A over kBlock elements and in double beyond.
#pragma once

#include "moments.h"
#include "task.h"

namespace fastnorm::FASTNORM_CPU_CAPABILITY {

// Adds rows of x, a sum for each.
template <class T, int kRows>
struct RowSums {
  using A = Accum<T>;
  const T* x;
  Pack<A> (&sum)[kRows];
  template <int P, class Access>
  FASTNORM_INLINE void packs(int64_t i, Access access, Strided layout) const {
    for (int p = 0; p < P; ++p) sum[p] = sum[p] + access.get(x + i + layout.element(p));
  }
};

// Adds x - pivot of each row to its `delta`, and the square to `square`.
template <class T, int kRows>
struct RowDeviations {
  using A = Accum<T>;
  const T* x;
  const A (&pivot)[kRows];
  Pack<A> (&delta)[kRows], (&square)[kRows];
  template <int P, class Access>
  FASTNORM_INLINE void packs(int64_t i, Access access, Strided layout) const {
    for (int p = 0; p < P; ++p) {
      const T* at = x + i + layout.element(p);
      const Pack<A> d = access.template zero_past_end<T>(access.get(at) - Pack<A>(pivot[p]));
      delta[p] = delta[p] + d;
      square[p] = fma(d, d, square[p]);
      prefetch(x + i + layout.later_element(p));
    }
  }
};

template <class T>
class LayerForward : Call<T, ForwardCall> {
  using Base = Call<T, ForwardCall>;
  using A = Accum<T>;
  using Base::args, Base::whole, Base::g, Base::stats, Base::epilogue;

  const ElementParams<T> weights_{g, Base::weight}, biases_{g, Base::bias};
  const int64_t D_ = g.D(), mask_row_ = mask_row_bytes(D_, args.dtype);
  static constexpr int64_t kOverlapBytes = 8192;  // of a group

 public:
  using Base::Base;

  void run() {
    const int64_t per_task = args.plan.sets_per_task;
    const bool together =
        args.plan.rows_together && g.G == 1 && kRowGroup * D_ * static_cast<int64_t>(sizeof(T)) <= kRowsInL1;
    for_each_task(args.parallel, div_up(g.sets(), per_task), [&](int64_t t) {
      int64_t set = t * per_task;
      const int64_t end = std::min(set + per_task, g.sets());
      if constexpr (kRowGroup > 1) {
        if (together) set = run_groups(set, end);
      }
      for (; set < end; ++set) {
        take_statistics<1>(set);
        apply<1>(set);
      }
    });
  }

 private:
  int64_t rows_ahead(int rows) const { return rows_to_fetch(rows, D_ * static_cast<int64_t>(sizeof(T))); }

  template <class F>
  FASTNORM_INLINE void for_blocks(F&& each) const {
    for (int64_t offset = 0; offset < D_; offset += kBlock) each(offset, std::min(kBlock, D_ - offset));
  }

  // Returns the first set that makes no group. The statistics of a group wait for its sums, a root and a division: the
  // elements of the group before fill the time, where both stay in L1 (16384x128 float32: 0.8 times as long).
  int64_t run_groups(int64_t set, int64_t end) const {
    const bool overlap = kRowGroup * D_ * static_cast<int64_t>(sizeof(T)) <= kOverlapBytes;
    const int64_t lag = overlap ? kRowGroup : 0, first = set;
    for (; set + kRowGroup <= end; set += kRowGroup) {
      take_statistics<kRowGroup>(set);
      if (set - lag >= first) apply<kRowGroup>(set - lag);
    }
    if (overlap && set > first) apply<kRowGroup>(set - kRowGroup);
    return set;
  }

  template <int kRows>
  void take_statistics(int64_t set) const {
    const T* x = whole.x + set * D_;
    const Strided layout = Strided{D_, 0, 0, 0}.fetching(rows_ahead(kRows));
    const double count = static_cast<double>(D_), share = 1 / count;
    double total[kRows] = {};
    for_blocks([&](int64_t offset, int64_t n) {
      Pack<A> sum[kRows];
      for (int p = 0; p < kRows; ++p) sum[p] = Pack<A>(0);
      across_rows<kRows, A>(n, RowSums<T, kRows>{x + offset, sum}, layout, false);
      for (int p = 0; p < kRows; ++p) total[p] += sum_lanes(sum[p]);
    });
    A pivot[kRows];
    PivotSums sums[kRows] = {};
    for (int p = 0; p < kRows; ++p) pivot[p] = round_pivot<T>(total[p] / count);
    for_blocks([&](int64_t offset, int64_t n) {
      Pack<A> delta[kRows], square[kRows];
      for (int p = 0; p < kRows; ++p) delta[p] = square[p] = Pack<A>(0);
      across_rows<kRows, A>(n, RowDeviations<T, kRows>{x + offset, pivot, delta, square}, layout, false);
      for (int p = 0; p < kRows; ++p) sums[p].merge({sum_lanes(delta[p]), sum_lanes(square[p])});
    });
    for (int p = 0; p < kRows; ++p) stats.finish(set + p, sums[p].moments(pivot[p], share), share, args.eps);
  }

  template <int kRows>
  void apply(int64_t set) const {
    if (!whole.y) return;  // the caller wants only the statistics
    const Strided layout{D_, mask_row_, D_, D_};
    const int64_t group = set % g.G;
    const ForwardSpan<T> s = whole.moved(set * D_, set * mask_row_).fetching(rows_ahead(kRows) * D_);
    const ElementCoefs<A, kRows> coefs(stats.mean + set, stats.rstd + set, weights_.of_group(group),
                                       biases_.of_group(group));
    with_smooth_activation(epilogue, [&](const auto& e) FASTNORM_LAMBDA {
      const ForwardPacks<T, ElementCoefs<A, kRows>, std::decay_t<decltype(e)>> packs{s, coefs, e};
      across_rows<kRows, A>(D_, packs, layout, s.streams());
    });
  }
};

}  // namespace fastnorm::FASTNORM_CPU_CAPABILITY
