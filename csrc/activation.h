// Activations and their derivatives, written once for any value type V: a float in a CUDA thread, a pack of lanes
// on the CPU. V needs + - *, comparisons that give a mask, and by argument-dependent lookup: select(mask, a, b),
// exp, erf, tanh, fma. Where torch.nn defines a value at a kink, so does this file.
#pragma once

#include <cmath>

#include "dtype.h"

namespace fastnorm {

// The numbers are the ops' `activation` argument (fastnorm/ops.py holds the same table).
enum class Activation : int {
  kNone = 0,
  kRelu = 1,
  kLeakyRelu = 2,
  kSilu = 3,
  kGelu = 4,
  kGeluTanh = 5,
  kHardswish = 6,
  kSigmoid = 7,
  kTanh = 8,
};
constexpr int kActivations = 9;

// True for activations whose derivative is one of two constants, so that a bit per element is all backward needs.
FASTNORM_HOST_DEVICE constexpr bool is_two_sided(Activation a) {
  return a == Activation::kRelu || a == Activation::kLeakyRelu;
}

template <class V>
FASTNORM_HOST_DEVICE V sigmoid(V z) {
  using std::exp;
  return V(1) / (V(1) + exp(V(0) - z));
}

// The argument of tanh in the tanh form of GELU: sqrt(2/pi) (z + 0.044715 z^3).
constexpr double kGeluTanhScale = 0.79788456080286535588;
constexpr double kGeluTanhCubic = 0.044715;

// act(z). `param` is leaky_relu's slope.
template <Activation kAct, class V>
FASTNORM_HOST_DEVICE V activate(V z, V param) {
  using std::erf, std::exp, std::fma, std::tanh;
  if constexpr (kAct == Activation::kRelu) return select(z <= V(0), V(0), z);  // NaN stays NaN
  if constexpr (kAct == Activation::kLeakyRelu) return select(z > V(0), z, z * param);
  if constexpr (kAct == Activation::kSilu) return z / (V(1) + exp(V(0) - z));
  if constexpr (kAct == Activation::kGelu) {
    return V(0.5) * z * (V(1) + erf(z * V(0.70710678118654752440)));
  }
  if constexpr (kAct == Activation::kGeluTanh) {
    const V inner = V(kGeluTanhScale) * fma(V(kGeluTanhCubic) * z * z, z, z);
    return V(0.5) * z * (V(1) + tanh(inner));
  }
  if constexpr (kAct == Activation::kHardswish) {
    const V gate = select(z <= V(-3), V(0), select(z >= V(3), V(6), z + V(3)));
    return z * gate * V(1.0 / 6);
  }
  if constexpr (kAct == Activation::kSigmoid) return sigmoid(z);
  if constexpr (kAct == Activation::kTanh) return tanh(z);
  return z;
}

// d act(z) / dz.
template <Activation kAct, class V>
FASTNORM_HOST_DEVICE V activation_slope(V z, V param) {
  using std::erf, std::exp, std::fma, std::tanh;
  if constexpr (kAct == Activation::kRelu) return select(z <= V(0), V(0), V(1));
  if constexpr (kAct == Activation::kLeakyRelu) return select(z > V(0), V(1), param);
  if constexpr (kAct == Activation::kSilu) {
    const V s = sigmoid(z);
    return s * (V(1) + z * (V(1) - s));
  }
  if constexpr (kAct == Activation::kGelu) {
    const V cdf = V(0.5) * (V(1) + erf(z * V(0.70710678118654752440)));
    const V pdf = V(0.39894228040143267794) * exp(V(-0.5) * z * z);
    return fma(z, pdf, cdf);
  }
  if constexpr (kAct == Activation::kGeluTanh) {
    const V t = tanh(V(kGeluTanhScale) * fma(V(kGeluTanhCubic) * z * z, z, z));
    const V inner_slope = V(kGeluTanhScale) * fma(V(3 * kGeluTanhCubic) * z, z, V(1));
    return V(0.5) * fma(z * (V(1) - t * t), inner_slope, V(1) + t);
  }
  if constexpr (kAct == Activation::kHardswish) {
    return select(z <= V(-3), V(0), select(z >= V(3), V(1), fma(z, V(1.0 / 3), V(0.5))));
  }
  if constexpr (kAct == Activation::kSigmoid) {
    const V s = sigmoid(z);
    return s * (V(1) - s);
  }
  if constexpr (kAct == Activation::kTanh) {
    const V t = tanh(z);
    return V(1) - t * t;
  }
  return V(1);
}

}  // namespace fastnorm
