// The arguments of every backward kernel, typed; the gradient of one pack through the activation, its sums, and dx.
#pragma once

#include "element.cuh"

namespace fastnorm::cuda {

template <class T>
struct BackwardTensors {
  using A = Accum<T>;
  const T* dy;
  const T* x;
  const T* residual;    // or null
  const uint8_t* mask;  // or null
  Params weight, bias;
  const A* stats;  // [kStatsRows, sets]
  int64_t sets;
  bool frozen;
  Epilogue<A> epilogue;
  T* dx;         // or null
  T* dresidual;  // or null

  BackwardTensors() = default;
  explicit BackwardTensors(const BackwardArgs& a)
      : dy(static_cast<const T*>(a.dy)),
        x(static_cast<const T*>(a.x)),
        residual(static_cast<const T*>(a.residual)),
        mask(a.mask),
        weight(a.weight),
        bias(a.bias),
        stats(static_cast<const A*>(a.stats)),
        sets(a.geometry.sets()),
        frozen(a.frozen),
        epilogue{a.activation, static_cast<A>(a.activation_param)},
        dx(static_cast<T*>(a.dx)),
        dresidual(static_cast<T*>(a.dresidual)) {}
};

// The packs that backward reads for one step or position.
template <class T, int W>
struct GradientPacks {
  Pack<T, W> x, dy, residual;
  unsigned bits;
};

// x and d = dy * act'(z) of a pack, widened: from the mask's bits where forward saved them, else from z, computed again
// from x and residual.
template <Activation kAct, int W, class T, class Coefs, class A>
FASTNORM_DEVICE void gradient(const BackwardTensors<T>& t, const GradientPacks<T, W>& packs, const Coefs& coefs,
                              A (&x)[W], A (&d)[W]) {
  widen<A>(packs.x, x);
  widen<A>(packs.dy, d);
  if constexpr (kAct != Activation::kNone) {
    if (is_two_sided(kAct) && t.mask != nullptr) return multiply_slope_bits<kAct>(t.epilogue.param, packs.bits, d);
    A z[W];
    normalize(x, coefs, z);
    if (t.residual != nullptr) add_residual(packs.residual, z);
    multiply_slope<kAct, T>(t.epilogue.param, z, d);
  }
}

// The sums of d and of d (x - mean) over a pack.
template <int W, class A, class Coefs>
FASTNORM_DEVICE GradSums<A> pack_sums(const A (&x)[W], const A (&d)[W], const Coefs& coefs) {
  A products[W];
#pragma unroll
  for (int w = 0; w < W; ++w) products[w] = d[w] * (x[w] - coefs[w].mean);
  return {tree_sum(d), tree_sum(products)};
}

// dx and dresidual of a pack.
template <int W, class T, class A, class Coefs, class Terms>
FASTNORM_DEVICE void store_gradients(const BackwardTensors<T>& t, const A (&x)[W], const A (&d)[W], const Coefs& coefs,
                                     const Terms& terms, int64_t element) {
  if (t.dresidual != nullptr) store(t.dresidual + element, narrow<T>(d));
  if (t.dx == nullptr) return;
  A dx[W];
  if (t.frozen) {  // dx does not depend on x, not even on an infinite one
#pragma unroll
    for (int w = 0; w < W; ++w) dx[w] = coefs[w].scale * d[w];
  } else {
    input_gradient(x, d, coefs, terms, dx);
  }
  store(t.dx + element, narrow<T>(dx));
}

// Reads all that backward needs of one pack from global memory; bits() gives the mask's bits.
template <int W, class T, class Bits>
FASTNORM_DEVICE GradientPacks<T, W> load_gradient(const BackwardTensors<T>& t, int64_t element, Bits bits) {
  GradientPacks<T, W> packs{};
  packs.x = load<W>(t.x + element);
  packs.dy = load<W>(t.dy + element);
  if (t.residual != nullptr) packs.residual = load<W>(t.residual + element);
  if (t.mask != nullptr) packs.bits = bits();
  return packs;
}

}  // namespace fastnorm::cuda
