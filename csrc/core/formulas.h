// Formulas that the CPU and the CUDA kernels share.
#pragma once

#include "accum.h"

namespace fastnorm {

FASTNORM_HOST_DEVICE constexpr int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// dx = scale * d - (offset + xhat * slope). The terms come from the statistics' dependence on x; they are zeros where
// statistics are given.
template <class A>
struct SetTerms {
  A offset, slope;  // rstd * mean(w d), rstd * mean(w d xhat)
};

// The sum of d xhat from the sums of d and d (x - mean). Rounding cut `low` off the mean.
template <class V>
FASTNORM_HOST_DEVICE V xhat_sum(V d, V d_centered, V rstd, V low) {
  return (d_centered - low * d) * rstd;
}

// d, d_xhat: sums over a set. Times `scale` they are the means of rstd w d and rstd w d xhat.
template <class A, class V>
FASTNORM_HOST_DEVICE SetTerms<A> set_terms(V d, V d_xhat, V rstd, V low, V scale) {
  const V slope = d_xhat * scale;
  return {static_cast<A>(d * scale - low * rstd * slope), static_cast<A>(slope)};
}

template <class A, class V>
FASTNORM_HOST_DEVICE SetTerms<A> set_terms(const GradSums<V>& sums, V rstd, V low, V scale) {
  return set_terms<A>(sums.d, xhat_sum(sums.d, sums.d_centered, rstd, low), rstd, low, scale);
}

// A running statistic after a step towards `value`.
FASTNORM_HOST_DEVICE inline double blend(double running, double value, double momentum) {
  return (1 - momentum) * running + momentum * value;
}
// The factor that makes a variance of `count` values unbiased.
FASTNORM_HOST_DEVICE inline double unbiased(double count) { return count / (count - 1); }

}  // namespace fastnorm
