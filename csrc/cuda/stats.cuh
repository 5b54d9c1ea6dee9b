// The statistics of a set: the last steps of computing them, and their places in the stats tensor.
#pragma once

#include <cmath>

#include "core/args.h"
#include "core/formulas.h"
#include "pack.cuh"

namespace fastnorm::cuda {

// Statistics of a set. Rounding cut `low` off the mean.
template <class A>
struct SetStats {
  A mean, rstd, low;
};

template <class A>
FASTNORM_DEVICE void store_stats(A* stats, int64_t sets, int64_t set, const SetStats<A>& s, A var) {
  store_one(stats + kMean * sets + set, s.mean);
  store_one(stats + kRstd * sets + set, s.rstd);
  store_one(stats + kVar * sets + set, var);
  store_one(stats + kMeanLow * sets + set, s.low);
}
// Moves element i of a running statistic towards `value`; null: there is none.
FASTNORM_DEVICE void move_running(const ParamGrads& running, int64_t i, double value, double momentum) {
  if (running.data == nullptr) return;
  const double old = load_number<double>(running.data, running.dtype, i);
  store_number(running.data, running.dtype, i, blend(old, value, momentum));
}
FASTNORM_DEVICE void count_batch(int64_t* num_batches_tracked) {
  if (num_batches_tracked != nullptr) store_one(num_batches_tracked, load_one(num_batches_tracked) + 1);
}
// The thread that stores a set's statistics moves the running ones of its channel by them, where moves_set_by_set():
// that saves a launch. They are computed as update_running computes them, to the bit.
template <class A>
FASTNORM_DEVICE void store_running(const RunningArgs& r, int64_t channel, A mean, A var) {
  move_running(r.running_mean, channel * r.mean_stride, static_cast<double>(mean), r.momentum);
  move_running(r.running_var, channel * r.var_stride, static_cast<double>(var) * r.unbiased, r.momentum);
  if (channel == 0) count_batch(r.num_batches_tracked);
}

template <class A>
FASTNORM_DEVICE SetStats<A> load_stats(const A* stats, int64_t sets, int64_t set) {
  return {load_one(stats + kMean * sets + set), load_one(stats + kRstd * sets + set),
          load_one(stats + kMeanLow * sets + set)};
}

// The kernels take a set's numbers relative to its first element. The differences are of the size of the spread, so
// that where the mean is large the error of its last digit does not enter the variance.
template <class A>
FASTNORM_DEVICE A as_origin(A value) {
  return value - value == A(0) ? value : A(0);  // not finite: 0
}
template <class A, class T>
FASTNORM_DEVICE A origin_of(const T* first) {
  return as_origin(widen<A>(load_one(first)));
}

// 1 / v, of a float with an error of 1 ulp: enough for the weights of a merge, which are the same for all that it adds.
template <class A>
FASTNORM_DEVICE A reciprocal_of(A v) {
  if constexpr (std::is_same_v<A, float>) {
    return reciprocal_approx(v);
  } else {
    return 1 / v;
  }
}

// The part of a + b that was lost when it was rounded to `sum` (Knuth's TwoSum).
template <class A>
FASTNORM_DEVICE A lost_in_sum(A a, A b, A sum) {
  const A part = sum - a;
  return (a - (sum - part)) + (b - part);
}

// 1 / sqrt(var + eps), correctly rounded except for the last bit of a few values: a Newton step with an exact residual.
// An error here would be an error of all elements.
template <class A>
FASTNORM_DEVICE A rstd_of(A var, A eps) {
  const A sum = var + eps;
  A rstd;
  if constexpr (std::is_same_v<A, float>) {
    rstd = rsqrt_approx(sum);
  } else {
    rstd = A(1) / std::sqrt(sum);
  }
  const A product = sum * rstd, low = std::fma(sum, rstd, -product) + lost_in_sum(var, eps, sum) * rstd;
  const A better = std::fma(A(0.5) * rstd, std::fma(-product, rstd, A(1)) - low * rstd, rstd);
  return better - better == A(0) ? better : rstd;  // 0, infinity and NaN stay as they are
}

// The statistics of a set from a mean that is relative to `origin`.
template <class A>
FASTNORM_DEVICE SetStats<A> finish_stats(A relative_mean, A var, A origin, A eps) {
  const A mean = origin + relative_mean, low = lost_in_sum(origin, relative_mean, mean);
  return {mean, rstd_of(var, eps), low - low == A(0) ? low : A(0)};
}

}  // namespace fastnorm::cuda
