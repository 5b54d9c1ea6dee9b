// The two accumulators. Both know how to take in a partial of the same kind and nothing of the reduction's shape;
// V is double, or a pack of doubles when many sets are merged side by side.
#pragma once

namespace fastnorm {

inline double select(bool condition, double a, double b) { return condition ? a : b; }

// Mean and sum of squared deviations of `count` values, merged after Chan, Golub and LeVeque (1979).
template <class V>
struct Moments {
  V mean;
  V m2;

  // Takes in `other` of other_count values; the caller keeps the counts, which side-by-side sets share.
  void merge(const Moments& other, double count, double other_count) {
    const double total = count + other_count, weight = other_count / total;
    const V delta = other.mean - mean;
    m2 = m2 + other.m2 + delta * delta * V(count * weight);
    // The weighted sum only where delta is not finite: it keeps an infinite mean infinite.
    const V weighted = mean * V(count / total) + other.mean * V(weight);
    mean = select(delta * V(0) >= V(0), mean + delta * V(weight), weighted);
  }
};

// Sums over d = dy * act'(z) that backward needs. d (x - mean) instead of d xhat: one rounding less an element; rstd is
// multiplied in once, where the sums are used.
template <class V>
struct GradSums {
  V d;
  V d_centered;

  void merge(const GradSums& other) {
    d = d + other.d;
    d_centered = d_centered + other.d_centered;
  }
};

}  // namespace fastnorm
