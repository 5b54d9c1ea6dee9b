// The types that activations (core/activation.h) are computed in: floats with functions of their own.
#pragma once

#include <cmath>
#include <type_traits>

#include "core/accum.h"
#include "core/activation.h"
#include "platform.cuh"

namespace fastnorm::cuda {

// A float whose arithmetic gives Self.
template <class Self>
struct FloatOf {
  float value;

  FloatOf() = default;
  template <class Number>
  FASTNORM_DEVICE constexpr explicit FloatOf(Number v) : value(static_cast<float>(v)) {}

  friend FASTNORM_DEVICE Self operator+(Self a, Self b) { return Self(a.value + b.value); }
  friend FASTNORM_DEVICE Self operator-(Self a, Self b) { return Self(a.value - b.value); }
  friend FASTNORM_DEVICE Self operator*(Self a, Self b) { return Self(a.value * b.value); }
  friend FASTNORM_DEVICE bool operator<=(Self a, Self b) { return a.value <= b.value; }
  friend FASTNORM_DEVICE bool operator>=(Self a, Self b) { return a.value >= b.value; }
  friend FASTNORM_DEVICE bool operator>(Self a, Self b) { return a.value > b.value; }
  friend FASTNORM_DEVICE Self fma(Self a, Self b, Self c) { return Self(std::fma(a.value, b.value, c.value)); }
};

// Of 32-bit elements, for what is made of a sigmoid.
struct Precise : FloatOf<Precise> {
  using FloatOf::FloatOf;

  // exp(-|z|) is at most 1, so that a Newton step makes the reciprocal as exact as a division, which branches for large
  // and small divisors.
  friend FASTNORM_DEVICE Precise sigmoid(Precise z) {
    const float e = exp_of_minus_size(z.value), approx = reciprocal_approx(1 + e);
    const float inverse = std::fma(std::fma(-e, approx, 1 - approx), approx, approx);
    return Precise(z.value >= 0 ? inverse : e * inverse);
  }
  friend FASTNORM_DEVICE Precise silu(Precise z) { return z * sigmoid(z); }

  // exp(-|z|), by 2^t and what rounding cuts off t. 0 below 2^-126.
  static FASTNORM_DEVICE float exp_of_minus_size(float z) {
    const float size = std::abs(z), t = size * -1.44269504088896340736f, power = exp2_approx(t);
    const float rest = std::fma(t, 1.90465421e-9f, std::fma(t, -0.693147182464599609375f, -size));
    return std::fma(power, std::fmin(rest, 1.0f), power);  // rest is NaN where size is infinite
  }
};

// Of 16-bit elements: division, exp, tanh and the normal distribution are those of the hardware's approximations. Their
// relative error is below 2^-16 (tests/test_activation.py), and the element is rounded to 2^-9 (bfloat16) or 2^-12
// (float16) afterwards. The precise forms take two to four times the instructions.
struct Approx : FloatOf<Approx> {
  using FloatOf::FloatOf;

  friend FASTNORM_DEVICE Approx operator/(Approx a, Approx b) { return Approx(a.value * reciprocal_approx(b.value)); }

  friend FASTNORM_DEVICE Approx exp_of_minus(Approx z) {
    return Approx(exp2_approx(z.value * -1.44269504088896340736f));
  }

  // tanh z = 1 - 2 / (1 + exp 2z), which loses the digits of a small z.
  friend FASTNORM_DEVICE Approx tanh(Approx z) {
    const float square = z.value * z.value;
    const float small = std::fma(z.value * square, std::fma(square, 0.13333333f, -0.33333333f), z.value);
    const float large = std::fma(-2.0f, reciprocal_approx(1 + exp2_approx(z.value * 2.88539008177792681472f)), 1.0f);
    return Approx(square < 0.015625f ? small : large);
  }

  // P(Z <= -|z|) is 2 to the power of a polynomial in |z|, whose first coefficient is negative, so that it goes to 0
  // with |z|. That takes neither a division nor the density.
  //
  // The coefficients of normal_cdf are a least-maximum fit of the relative error, since the value of a GELU is z times
  // it: 2^-16 for |z| <= 5.6, where a float16 ends, and 2^-11 up to 8, where the value is -5e-15.
  friend FASTNORM_DEVICE Approx normal_cdf(Approx z) {
    const float size = std::abs(z.value);
    float p = -1.4910222e-06f;
    p = std::fma(p, size, 5.4029395e-05f);
    p = std::fma(p, size, -0.00086506817f);
    p = std::fma(p, size, 0.0082265446f);
    p = std::fma(p, size, -0.0533351414f);
    p = std::fma(p, size, -0.459136009f);
    p = std::fma(p, size, -1.15096927f);
    p = std::fma(p, size, -1.00001776f);
    return Approx(cdf_of_tail(z.value, exp2_approx(p)));
  }
  // The slope is P(Z <= z) and z times the density, so the error of the former matters by its size, and in the tail it
  // is the smaller part: fewer coefficients have an absolute error of 2^-21, which the weights' gradients, of
  // float32, need. The factor of the density is in its exponent.
  friend FASTNORM_DEVICE Approx gelu_slope(Approx z) {
    const float size = std::abs(z.value);
    float p = -0.000518869725f;
    p = std::fma(p, size, 0.00738725625f);
    p = std::fma(p, size, -0.0525381118f);
    p = std::fma(p, size, -0.459276617f);
    p = std::fma(p, size, -1.15108311f);
    p = std::fma(p, size, -1.00000083f);
    const float density = exp2_approx(std::fma(z.value * z.value, -0.72134752044448170368f, -1.32574806473616425f));
    return Approx(std::fma(z.value, density, cdf_of_tail(z.value, exp2_approx(p))));
  }
  static FASTNORM_DEVICE float cdf_of_tail(float z, float tail) { return z <= 0 ? tail : 1 - tail; }
};

// The type that an activation of elements of T is computed in, and its number.
template <Activation kAct, class T>
using ActivationValue =
    std::conditional_t<kAct == Activation::kHardswish, Accum<T>,  // a polynomial
                       std::conditional_t<sizeof(T) == 2, Approx,
                                          std::conditional_t<std::is_same_v<T, float> && (kAct == Activation::kSilu ||
                                                                                          kAct == Activation::kSigmoid),
                                                             Precise, T>>>;
template <class V>
FASTNORM_DEVICE auto value_of(V v) {
  if constexpr (std::is_floating_point_v<V>) {
    return v;
  } else {
    return v.value;
  }
}

}  // namespace fastnorm::cuda
