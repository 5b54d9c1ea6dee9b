// Formulas that the CPU and the CUDA kernels share.
#pragma once

#include <cmath>

#include "accum.h"
#include "args.h"

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

// Channel c of a rank's partial; load(i) gives its number i. Where the mean is not finite, what rounding cut off it may
// be NaN.
template <class Load>
FASTNORM_HOST_DEVICE Welford<double> welford_of_partial(Load load, int64_t channels, int64_t c) {
  const double mean = load(c), low = load(channels + c), var = load(2 * channels + c), count = load(3 * channels);
  return {count, {low - low == 0 ? mean + low : mean, var * count}};
}
// The statistics of a channel from its merged partials; zeros where there is no element.
template <class A>
struct FoldedStats {
  A mean, rstd, var, mean_low;

  FASTNORM_HOST_DEVICE FoldedStats(const Welford<double>& total, double eps) : mean(0), rstd(0), var(0), mean_low(0) {
    if (total.count == 0) return;
    const double variance = total.moments.m2 / total.count;
    mean = static_cast<A>(total.moments.mean);
    const A low = static_cast<A>(total.moments.mean - mean);
    mean_low = low - low == 0 ? low : 0;
    var = static_cast<A>(variance);
    rstd = static_cast<A>(1 / std::sqrt(variance + eps));
  }
};

// A running statistic after a step towards `value`.
FASTNORM_HOST_DEVICE inline double blend(double running, double value, double momentum) {
  return (1 - momentum) * running + momentum * value;
}
// The factor that makes a variance of `count` values unbiased.
FASTNORM_HOST_DEVICE inline double unbiased(double count) { return count / (count - 1); }
// Whether a running variance moves. A count that the device alone knows may be 1, which has no unbiased variance; every
// other was checked before.
FASTNORM_HOST_DEVICE inline bool has_variance(const RunningArgs& args, double count) {
  return args.given_count == nullptr || count > 1;
}

}  // namespace fastnorm
