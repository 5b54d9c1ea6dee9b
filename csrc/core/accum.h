// The accumulators. Each can take in a partial of its own kind and knows nothing of the reduction's shape. V is a
// number, or a pack of numbers where many sets are merged side by side.
#pragma once

#include <cstddef>
#include <type_traits>

#include "dtype.h"

namespace fastnorm {

// Two plain numbers are read and written as one.
template <class V>
constexpr std::size_t pair_alignment = std::is_arithmetic_v<V> ? 2 * sizeof(V) : alignof(V);

// Mean and sum of squared deviations of `count` values, merged after Chan, Golub and LeVeque (1979).
template <class V>
struct alignas(pair_alignment<V>) Moments {
  V mean;
  V m2;

  // Takes in `other`, the moments of other_count values. The caller keeps the counts, because side-by-side sets share
  // them.
  template <class Count>
  FASTNORM_HOST_DEVICE void merge(const Moments& other, Count count, Count other_count) {
    const Count total = count + other_count, weight = other_count / total;
    const V delta = other.mean - mean;
    m2 = m2 + other.m2 + delta * delta * V(count * weight);
    // Where delta is not finite, the weighted sum keeps an infinite mean infinite.
    const V weighted = mean * V(count / total) + other.mean * V(weight);
    mean = select(delta * V(0) >= V(0), mean + delta * V(weight), weighted);
  }
};

// Moments that carry their count: partials of a reduction whose parts differ in size. All zeros are the moments of
// nothing. Of plain numbers it takes the room of four.
template <class V>
struct Welford {
  V count;
  Moments<V> moments;

  FASTNORM_HOST_DEVICE void merge(const Welford& other) {
    if (other.count == V(0)) return;
    if (count == V(0)) {
      *this = other;
      return;
    }
    moments.merge(other.moments, count, other.count);
    count = count + other.count;
  }
};
static_assert(sizeof(Welford<float>) == 4 * sizeof(float) && sizeof(Welford<double>) == 4 * sizeof(double));

template <class V>
struct Sum {
  V value;
  FASTNORM_HOST_DEVICE void merge(const Sum& other) { value = value + other.value; }
};

// The sums over d = dy * act'(z) that backward needs. d (x - mean) instead of d xhat saves one rounding per element;
// rstd is multiplied in once, where the sums are used.
template <class V>
struct alignas(pair_alignment<V>) GradSums {
  V d;
  V d_centered;

  FASTNORM_HOST_DEVICE void merge(const GradSums& other) {
    d = d + other.d;
    d_centered = d_centered + other.d_centered;
  }
};

}  // namespace fastnorm
