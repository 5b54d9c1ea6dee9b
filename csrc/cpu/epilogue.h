// The activation of a loop: what of it the loop is compiled for, and its value and slope for a few packs.
#pragma once

#include <type_traits>

#include "core/activation.h"
#include "vec_math.h"

namespace fastnorm::FASTNORM_CPU_CAPABILITY {

// Any activation, known at run time.
template <class A>
struct Epilogue {
  Activation activation;
  Pack<A> param;
  bool masked;  // the mask of a two-sided activation is written, or read
};
// An activation that the code of a loop is compiled for, kNone among them: it calls nothing and has no branches.
template <Activation kAct, class A, bool kMasked = false>
struct FixedEpilogue {
  static constexpr Activation activation = kAct;
  static constexpr bool masked = kMasked;
  Pack<A> param;
};
template <class E>
constexpr bool kIsFixed = requires { std::bool_constant<(E::activation == E::activation)>{}; };
template <class E>
constexpr bool kActivates = true;
template <class A>
constexpr bool kActivates<FixedEpilogue<Activation::kNone, A>> = false;
template <class E>
constexpr bool kIsRelu = false;
template <class A, bool kMasked>
constexpr bool kIsRelu<FixedEpilogue<Activation::kRelu, A, kMasked>> = true;

// Calls f with the epilogue: with its absence and ReLU fixed.
template <class A, class F>
FASTNORM_INLINE void with_activation(const Epilogue<A>& e, F&& f) {
  if (e.activation == Activation::kNone) {
    f(FixedEpilogue<Activation::kNone, A>{e.param});
  } else if (e.activation == Activation::kRelu && e.masked) {
    f(FixedEpilogue<Activation::kRelu, A, true>{e.param});
  } else if (e.activation == Activation::kRelu) {
    f(FixedEpilogue<Activation::kRelu, A>{e.param});
  } else {
    f(e);
  }
}
// The same for the passes that most of the time with SiLU and GELU goes to: in their loops these are fixed, too.
template <class A, class F>
FASTNORM_INLINE void with_smooth_activation(const Epilogue<A>& e, F&& f) {
  if constexpr (sizeof(A) == 4 && kParts <= 4) {
    if (e.activation == Activation::kSilu) return f(FixedEpilogue<Activation::kSilu, A>{e.param});
    if (e.activation == Activation::kGelu) return f(FixedEpilogue<Activation::kGelu, A>{e.param});
  }
  with_activation(e, f);
}

// z = act(z), and d = d * act'(z).
template <Activation kAct, class T, int P, class A = Accum<T>>
FASTNORM_INLINE void activate_each(Pack<A> param, Pack<A> (&z)[P]) {
  using V = ActivationValue<T>;
  for (int p = 0; p < P; ++p) z[p] = activate<kAct>(V(z[p]), V(param));
}
template <Activation kAct, class T, int P, class A = Accum<T>>
FASTNORM_INLINE void multiply_each(Pack<A> param, const Pack<A> (&z)[P], Pack<A> (&d)[P]) {
  using V = ActivationValue<T>;
  for (int p = 0; p < P; ++p) d[p] = d[p] * activation_slope<kAct>(V(z[p]), V(param));
}

// These are not inlined, so that one copy of the long polynomials serves the kernels that do not fix them.
template <class T, int P, class A = Accum<T>>
__attribute__((noinline)) void activate_out_of_line(const Epilogue<A>& e, Pack<A> (&z)[P]) {
  dispatch_smooth(e.activation, [&](auto kind) { activate_each<decltype(kind)::value, T>(e.param, z); });
}
template <class T, int P, class A = Accum<T>>
__attribute__((noinline)) void multiply_out_of_line(const Epilogue<A>& e, const Pack<A> (&z)[P], Pack<A> (&d)[P]) {
  dispatch_smooth(e.activation, [&](auto kind) { multiply_each<decltype(kind)::value, T>(e.param, z, d); });
}

template <class T, class E, int P, class A = Accum<T>>
FASTNORM_INLINE void activate_packs(const E& e, Pack<A> (&z)[P]) {
  if constexpr (kIsFixed<E>) {
    activate_each<E::activation, T>(e.param, z);
  } else if (e.activation == Activation::kLeakyRelu) {
    activate_each<Activation::kLeakyRelu, T>(e.param, z);
  } else {
    Pack<A> copy[P];  // so that z itself may stay in registers
    for (int p = 0; p < P; ++p) copy[p] = z[p];
    activate_out_of_line<T>(e, copy);
    for (int p = 0; p < P; ++p) z[p] = copy[p];
  }
}

// Multiplies d by act'(z).
template <class T, class E, int P, class A = Accum<T>>
FASTNORM_INLINE void multiply_slopes(const E& e, const Pack<A> (&z)[P], Pack<A> (&d)[P]) {
  if constexpr (kIsRelu<E>) {
    for (int p = 0; p < P; ++p) d[p] = select(z[p] <= Pack<A>(0), Pack<A>(0), d[p]);
  } else if constexpr (kIsFixed<E>) {
    multiply_each<E::activation, T>(e.param, z, d);
  } else if (e.activation == Activation::kLeakyRelu) {
    for (int p = 0; p < P; ++p) d[p] = select(z[p] > Pack<A>(0), d[p], d[p] * e.param);
  } else {
    Pack<A> z_copy[P], d_copy[P];
    for (int p = 0; p < P; ++p) z_copy[p] = z[p], d_copy[p] = d[p];
    multiply_out_of_line<T>(e, z_copy, d_copy);
    for (int p = 0; p < P; ++p) d[p] = d_copy[p];
  }
}

// The side of a two-sided activation on which z lies: set where the derivative is 1.
template <class A>
FASTNORM_INLINE Mask<A> upper_side(Activation activation, Pack<A> z) {
  return activation == Activation::kRelu ? !(z <= Pack<A>(0)) : z > Pack<A>(0);
}

}  // namespace fastnorm::FASTNORM_CPU_CAPABILITY
