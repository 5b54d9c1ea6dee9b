// Activations of 16-bit elements: a float whose division, exp, tanh and normal distribution are those of the hardware's
// approximations. Their relative error is below 2^-18 (tests/test_activation.py), and the element is rounded to 2^-9
// (bfloat16) or 2^-12 (float16) afterwards. The exact forms take two to four times the instructions.
#pragma once

#include <cmath>

#include "platform.cuh"

namespace fastnorm::cuda {

struct Approx {
  float value;

  Approx() = default;
  template <class Number>
  FASTNORM_DEVICE constexpr explicit Approx(Number v) : value(static_cast<float>(v)) {}

  friend FASTNORM_DEVICE Approx operator+(Approx a, Approx b) { return Approx(a.value + b.value); }
  friend FASTNORM_DEVICE Approx operator-(Approx a, Approx b) { return Approx(a.value - b.value); }
  friend FASTNORM_DEVICE Approx operator*(Approx a, Approx b) { return Approx(a.value * b.value); }
  friend FASTNORM_DEVICE Approx operator/(Approx a, Approx b) { return Approx(a.value * reciprocal_approx(b.value)); }
  friend FASTNORM_DEVICE bool operator<=(Approx a, Approx b) { return a.value <= b.value; }
  friend FASTNORM_DEVICE bool operator>=(Approx a, Approx b) { return a.value >= b.value; }
  friend FASTNORM_DEVICE bool operator>(Approx a, Approx b) { return a.value > b.value; }
  friend FASTNORM_DEVICE Approx fma(Approx a, Approx b, Approx c) {
    return Approx(std::fma(a.value, b.value, c.value));
  }

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

  // exp(-z^2 / 2). Value and slope of GELU share it.
  static FASTNORM_DEVICE float bell(Approx z) { return exp2_approx(z.value * z.value * -0.72134752044448170368f); }
  friend FASTNORM_DEVICE Approx normal_density(Approx z) { return Approx(0.39894228040143267794f * bell(z)); }
  // P(Z <= -|z|) = bell(z) t p(t) with t = 1 / (1 + 0.35 |z|): Mills' ratio, which is accurate in the tail, too. The
  // coefficients of p are a least-maximum fit of the relative error for |z| <= 12: 2^-19.8.
  friend FASTNORM_DEVICE Approx normal_cdf(Approx z) {
    const float t = reciprocal_approx(std::fma(std::abs(z.value), 0.35f, 1.0f));
    float p = 0.043942649f;
    p = std::fma(p, t, -0.182794115f);
    p = std::fma(p, t, 0.210017613f);
    p = std::fma(p, t, 0.008659477f);
    p = std::fma(p, t, 0.143695814f);
    p = std::fma(p, t, 0.136681207f);
    p = std::fma(p, t, 0.139796822f);
    const float tail = bell(z) * t * p;
    return Approx(z.value <= 0 ? tail : 1 - tail);
  }
};

// The type that an activation of elements of T is computed in, and its number.
template <class T>
using ActivationValue = std::conditional_t<sizeof(T) == 2, Approx, T>;
template <class V>
FASTNORM_DEVICE auto value_of(V v) {
  if constexpr (std::is_same_v<V, Approx>) {
    return v.value;
  } else {
    return v;
  }
}

}  // namespace fastnorm::cuda
