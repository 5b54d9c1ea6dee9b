// The two accumulators. Both know how to take in a partial of the same kind and nothing of the reduction's shape;
// V is double, or a pack of doubles when many sets are merged side by side.
#pragma once

namespace fastnorm {

// Mean and sum of squared deviations of `count` values, merged after Chan, Golub and LeVeque (1979).
template <class V>
struct Moments {
  V mean;
  V m2;

  // Takes in `other` of other_count values; the caller keeps the counts, which side-by-side sets share.
  // The mean is a weighted sum, not mean + delta * weight, so that an infinite mean stays infinite.
  void merge(const Moments& other, double count, double other_count) {
    const double total = count + other_count;
    const double weight = other_count / total;
    const V delta = other.mean - mean;
    mean = mean * V(count / total) + other.mean * V(weight);
    m2 = m2 + other.m2 + delta * delta * V(count * weight);
  }
};

// Sums over d = dy * act'(z) that backward needs.
template <class V>
struct GradSums {
  V d;
  V d_xhat;

  void merge(const GradSums& other) {
    d = d + other.d;
    d_xhat = d_xhat + other.d_xhat;
  }
};

}  // namespace fastnorm
