// Activations and their derivatives, written once for any value type V: a float in a CUDA thread, a pack of lanes on
// the CPU. V needs + - * /, comparisons that give a mask, and, found by argument-dependent lookup, select(mask, a, b),
// exp or exp_of_minus, or sigmoid with silu; tanh, fma; and erf, or gelu with gelu_slope, or normal_cdf with
// normal_density. At a kink the values are those of torch.nn.
#pragma once

#include <cmath>

#include "dtype.h"

namespace fastnorm {

// The list of activations: the constant of each and its name in Python. The derivative of a TWO_SIDED one is one of two
// constants, so that backward needs only a bit per element. A SMOOTH one takes more than a comparison.
#define FASTNORM_ACTIVATIONS(TWO_SIDED, SMOOTH) \
  TWO_SIDED(kRelu, "relu")                      \
  TWO_SIDED(kLeakyRelu, "leaky_relu")           \
  SMOOTH(kSilu, "silu")                         \
  SMOOTH(kGelu, "gelu")                         \
  SMOOTH(kGeluTanh, "gelu_tanh")                \
  SMOOTH(kHardswish, "hardswish")               \
  SMOOTH(kSigmoid, "sigmoid")                   \
  SMOOTH(kTanh, "tanh")

#define FASTNORM_SKIP(...)

// The number of an activation is its place in the list, counted from 1. The ops take it as `activation`.
#define FASTNORM_CONSTANT(constant, name) constant,
enum class Activation : int { kNone, FASTNORM_ACTIVATIONS(FASTNORM_CONSTANT, FASTNORM_CONSTANT) };
#undef FASTNORM_CONSTANT

#define FASTNORM_NAME(constant, name) name,
constexpr const char* kActivationNames[] = {"none", FASTNORM_ACTIVATIONS(FASTNORM_NAME, FASTNORM_NAME)};
#undef FASTNORM_NAME
constexpr int kActivations = sizeof(kActivationNames) / sizeof(kActivationNames[0]);

FASTNORM_HOST_DEVICE constexpr bool is_two_sided(Activation a) {
#define FASTNORM_IS(constant, name) a == Activation::constant ||
  return FASTNORM_ACTIVATIONS(FASTNORM_IS, FASTNORM_SKIP) false;
#undef FASTNORM_IS
}
constexpr bool is_smooth(Activation a) { return a != Activation::kNone && !is_two_sided(a); }

template <Activation kAct>
struct ActivationTag {
  static constexpr Activation value = kAct;
};

// Calls f with the tag of a smooth activation, or of any other. CUDA kernels are compiled with and without smooth ones,
// so that kernels for two-sided activations carry none of the polynomials.
template <class F>
FASTNORM_HOST_DEVICE void dispatch_smooth(Activation a, F&& f) {
#define FASTNORM_CASE(constant, name) \
  case Activation::constant: return f(ActivationTag<Activation::constant>{});
#define FASTNORM_OTHER(constant, name) case Activation::constant:
  switch (a) {
    FASTNORM_ACTIVATIONS(FASTNORM_SKIP, FASTNORM_CASE)
    FASTNORM_ACTIVATIONS(FASTNORM_OTHER, FASTNORM_SKIP)
    case Activation::kNone: break;
  }
  __builtin_unreachable();
}
template <class F>
FASTNORM_HOST_DEVICE void dispatch_plain(Activation a, F&& f) {
  switch (a) {
    FASTNORM_ACTIVATIONS(FASTNORM_CASE, FASTNORM_SKIP)
    FASTNORM_ACTIVATIONS(FASTNORM_SKIP, FASTNORM_OTHER)
    case Activation::kNone: return f(ActivationTag<Activation::kNone>{});
  }
  __builtin_unreachable();
}
#undef FASTNORM_CASE
#undef FASTNORM_OTHER

template <class V>
FASTNORM_FORMULA V exp_of_minus(V z) {
  using std::exp;
  return exp(V(0) - z);
}
template <class V>
FASTNORM_FORMULA V sigmoid(V z) {
  return V(1) / (V(1) + exp_of_minus(z));
}
template <class V>
FASTNORM_FORMULA V silu(V z) {
  return z / (V(1) + exp_of_minus(z));
}

// The standard normal distribution: P(Z <= z), and its density at z.
template <class V>
FASTNORM_FORMULA V normal_cdf(V z) {
  using std::erf;
  return V(0.5) * (V(1) + erf(z * V(0.70710678118654752440)));
}
template <class V>
FASTNORM_FORMULA V normal_density(V z) {
  using std::exp;
  return V(0.39894228040143267794) * exp(V(-0.5) * z * z);
}
template <class V>
FASTNORM_FORMULA V gelu(V z) {
  return z * normal_cdf(z);
}
template <class V>
FASTNORM_FORMULA V gelu_slope(V z) {
  using std::fma;
  return fma(z, normal_density(z), normal_cdf(z));
}

// The argument of tanh in the tanh form of GELU: sqrt(2/pi) (z + 0.044715 z^3).
constexpr double kGeluTanhScale = 0.79788456080286535588;
constexpr double kGeluTanhCubic = 0.044715;

// act(z). `param` is leaky_relu's slope.
template <Activation kAct, class V>
FASTNORM_FORMULA V activate(V z, V param) {
  using std::fma, std::tanh;
  if constexpr (kAct == Activation::kRelu)
    return select(z <= V(0), V(0), z);  // NaN stays NaN
  else if constexpr (kAct == Activation::kLeakyRelu)
    return select(z > V(0), z, z * param);
  else if constexpr (kAct == Activation::kSilu)
    return silu(z);
  else if constexpr (kAct == Activation::kGelu)
    return gelu(z);
  else if constexpr (kAct == Activation::kGeluTanh) {
    const V inner = V(kGeluTanhScale) * fma(V(kGeluTanhCubic) * z * z, z, z);
    return V(0.5) * z * (V(1) + tanh(inner));
  } else if constexpr (kAct == Activation::kHardswish) {
    const V gate = select(z <= V(-3), V(0), select(z >= V(3), V(6), z + V(3)));
    return z * gate * V(1.0 / 6);
  } else if constexpr (kAct == Activation::kSigmoid)
    return sigmoid(z);
  else if constexpr (kAct == Activation::kTanh)
    return tanh(z);
  else {
    static_assert(kAct == Activation::kNone, "FASTNORM_ACTIVATIONS lists an activation that has no formula here");
    return z;
  }
}

// d act(z) / dz.
template <Activation kAct, class V>
FASTNORM_FORMULA V activation_slope(V z, V param) {
  using std::fma, std::tanh;
  if constexpr (kAct == Activation::kRelu)
    return select(z <= V(0), V(0), V(1));
  else if constexpr (kAct == Activation::kLeakyRelu)
    return select(z > V(0), V(1), param);
  else if constexpr (kAct == Activation::kSilu) {
    const V s = sigmoid(z);
    return s * (V(1) + z * (V(1) - s));
  } else if constexpr (kAct == Activation::kGelu) {
    return gelu_slope(z);
  } else if constexpr (kAct == Activation::kGeluTanh) {
    const V t = tanh(V(kGeluTanhScale) * fma(V(kGeluTanhCubic) * z * z, z, z));
    const V inner_slope = V(kGeluTanhScale) * fma(V(3 * kGeluTanhCubic) * z, z, V(1));
    return V(0.5) * fma(z * (V(1) - t * t), inner_slope, V(1) + t);
  } else if constexpr (kAct == Activation::kHardswish) {
    return select(z <= V(-3), V(0), select(z >= V(3), V(1), fma(z, V(1.0 / 3), V(0.5))));
  } else if constexpr (kAct == Activation::kSigmoid) {
    const V s = sigmoid(z);
    return s * (V(1) - s);
  } else if constexpr (kAct == Activation::kTanh) {
    const V t = tanh(z);
    return V(1) - t * t;
  } else {
    static_assert(kAct == Activation::kNone, "FASTNORM_ACTIVATIONS lists an activation that has no formula here");
    return V(1);
  }
}

}  // namespace fastnorm
