// What every forward kernel takes, typed; and the statistics of a set, from wherever they come.
#pragma once

#include "element.cuh"

namespace fastnorm::cuda {

template <class T>
struct ForwardTensors {
  using A = Accum<T>;
  const T* x;
  const T* residual;  // or null
  T* y;               // or null: statistics alone
  uint8_t* mask;      // or null
  Params weight, bias;
  Params running_mean, running_var;  // frozen statistics, or null
  A* stats;                          // [4, sets]
  int64_t sets;
  A eps;
  Epilogue<A> epilogue;

  ForwardTensors() = default;
  explicit ForwardTensors(const ForwardArgs& a)
      : x(static_cast<const T*>(a.x)),
        residual(static_cast<const T*>(a.residual)),
        y(static_cast<T*>(a.y)),
        mask(a.mask),
        weight(a.weight),
        bias(a.bias),
        running_mean(a.running_mean),
        running_var(a.running_var),
        stats(static_cast<A*>(a.stats)),
        sets(a.geometry.sets()),
        eps(static_cast<A>(a.eps)),
        epilogue{a.activation, static_cast<A>(a.activation_param)} {}

  FASTNORM_DEVICE bool frozen() const { return running_mean.data != nullptr; }
};

template <class A>
FASTNORM_DEVICE void store_stats(A* stats, int64_t sets, int64_t set, const SetStats<A>& s, A var) {
  store_one(stats + set, s.mean);
  store_one(stats + sets + set, s.rstd);
  store_one(stats + 2 * sets + set, var);
  store_one(stats + 3 * sets + set, s.low);
}
template <class A>
FASTNORM_DEVICE SetStats<A> load_stats(const A* stats, int64_t sets, int64_t set) {
  return {load_one(stats + set), load_one(stats + sets + set), load_one(stats + 3 * sets + set)};
}

// What a + b lost when it was rounded to `sum` (Knuth's TwoSum).
template <class A>
FASTNORM_DEVICE A lost_in_sum(A a, A b, A sum) {
  const A part = sum - a;
  return (a - (sum - part)) + (b - part);
}

// 1 / sqrt(var + eps), correctly rounded but for the last bit of a few: a Newton step with the residual taken exactly.
// Every error here is one of all elements.
template <class A>
FASTNORM_DEVICE A rstd_of(A var, A eps) {
  const A sum = var + eps, rstd = A(1) / std::sqrt(sum);
  const A product = sum * rstd, low = std::fma(sum, rstd, -product) + lost_in_sum(var, eps, sum) * rstd;
  const A better = std::fma(A(0.5) * rstd, std::fma(-product, rstd, A(1)) - low * rstd, rstd);
  return better - better == A(0) ? better : rstd;  // 0, infinity and NaN as they are
}

// The statistics of a set whose mean was taken relative to `origin`.
template <class A>
FASTNORM_DEVICE SetStats<A> finish_stats(A relative_mean, A var, A origin, A eps) {
  const A mean = origin + relative_mean, low = lost_in_sum(origin, relative_mean, mean);
  return {mean, rstd_of(var, eps), low - low == A(0) ? low : A(0)};
}

// Statistics that are given: passed on in `stats` by the thread for which `writes` holds.
template <class T, class A = Accum<T>>
FASTNORM_DEVICE SetStats<A> given_stats(const ForwardTensors<T>& t, int64_t set, A mean, A var, bool writes) {
  const SetStats<A> s{mean, rstd_of(var, t.eps), A(0)};
  if (writes) store_stats(t.stats, t.sets, set, s, var);
  return s;
}

}  // namespace fastnorm::cuda
