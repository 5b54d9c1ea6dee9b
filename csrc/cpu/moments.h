// Mean and variance from one pass: sums of x - pivot and of its square, about a pivot that is known beforehand.
//
// The pivot is the mean of a sample, rounded to T, so that differences of half-precision numbers are exact: their
// rounding would be the same for all numbers of one binade and would not average out. Where the mean turns out to lie
// more than two standard deviations from the pivot, squares about it would cost the variance digits, and the set is
// reduced again about its mean. That happens to no set whose sample is any like it, and the choice depends on the data
// alone, not on threads.
#pragma once

#include <cmath>

#include "element.h"

namespace fastnorm::FASTNORM_CPU_CAPABILITY {

// A sample for the pivot takes so many packs of a set.
constexpr int64_t kPivotPacks = 4;

// The pivot next to `mean`. Sums about an infinite one would lose the infinities of x.
template <class T>
Accum<T> round_pivot(double mean) {
  const Accum<T> pivot = round_to<T>(Pack<Accum<T>>(mean))[0];
  return std::isfinite(pivot) ? pivot : 0;
}

template <class T>
class PivotSample {
 public:
  // Adds the first n elements at x, at most a pack of them.
  FASTNORM_INLINE void add(const T* x, int64_t n) {
    constexpr int64_t L = kLanes<Accum<T>>;
    sum_ += sum_lanes(n < L ? load_first(x, n) : load(x));
    count_ += std::min(n, L);
  }
  Accum<T> pivot() const { return round_pivot<T>(sum_ / static_cast<double>(count_)); }

 private:
  double sum_ = 0;
  int64_t count_ = 0;
};

// The sums of x - pivot and of its square.
struct PivotSums {
  double delta, square;

  void merge(const PivotSums& other) {
    delta += other.delta;
    square += other.square;
  }
  // The moments of `1 / share` values.
  Moments<double> moments(double pivot, double share) const {
    const double shift = delta * share, m2 = square - delta * shift;
    return {pivot + shift, m2 <= 0 ? 0 : m2};  // NaN stays
  }
  // Whether the mean of them is far from their pivot, as the moments of their set (of set_count values) go.
  bool far_off(const Moments<double>& set, double share, double set_count) const {
    const double shift = delta * share;
    return shift * shift * set_count > 4 * set.m2 && std::isfinite(square);
  }
};

// Adds x - pivot to `delta` and its square to `square`; elements past the end add zero. Fetches what lies `ahead`
// of it, unless that is 0.
template <class T>
struct DeviationPacks {
  using A = Accum<T>;
  const T* x;
  const Pack<A> pivot;
  Pack<A>&delta, &square;
  int64_t ahead;
  template <int P, class Access, class Layout>
  FASTNORM_INLINE void packs(int64_t i, Access access, Layout layout) const {
    Pack<A> d[P];
    for (int p = 0; p < P; ++p) {
      const T* const at = x + i + layout.element(p);
      d[p] = access.template zero_past_end<T>(access.get(at) - pivot);
      if (ahead != 0) prefetch(at + ahead);
    }
    delta = delta + tree_sum(d);
    square = square + tree_dot(d, d);
  }
};

}  // namespace fastnorm::FASTNORM_CPU_CAPABILITY
