// The arithmetic on the elements of a pack: normalize and activate (forward), the gradient through the activation and
// dx (backward). Every norm, layout and strategy uses these few functions; norms differ in the coefficients they pass.
#pragma once

#include <cmath>

#include "core/accum.h"
#include "core/activation.h"
#include "core/formulas.h"
#include "stats.cuh"

namespace fastnorm::cuda {

// ---- coefficients: xhat = (x - mean) * rstd, z = (x - mean) * scale + bias, scale = rstd * weight ----

template <class A>
struct Affine {
  A mean, rstd, scale, bias;
};
// The bias takes in what rounding cut off the mean.
template <class A>
FASTNORM_DEVICE Affine<A> make_affine(const SetStats<A>& s, A weight, A bias) {
  const A scale = s.rstd * weight;
  return {s.mean, s.rstd, scale, bias - s.low * scale};
}

// Along a run: one mean, and a weight that may change with every element.
template <class A, int W>
struct RowCoefs {
  A mean, rstd, scale[W], bias[W];
  FASTNORM_DEVICE Affine<A> operator[](int w) const { return {mean, rstd, scale[w], bias[w]}; }
};
template <class A, int W>
FASTNORM_DEVICE void set_affine(const SetStats<A>& s, const A (&weight)[W], const A (&bias)[W], RowCoefs<A, W>& coefs) {
#pragma unroll
  for (int w = 0; w < W; ++w) {
    const Affine<A> c = make_affine(s, weight[w], bias[w]);
    coefs.scale[w] = c.scale;
    coefs.bias[w] = c.bias;
  }
}
// Channels side by side, each with statistics of its own.
template <class A, int W>
struct LaneCoefs {
  Affine<A> lane[W];
  FASTNORM_DEVICE const Affine<A>& operator[](int w) const { return lane[w]; }
};

template <class A>
struct SharedTerms {
  SetTerms<A> all;
  FASTNORM_DEVICE const SetTerms<A>& operator[](int) const { return all; }
};
template <class A, int W>
struct LaneTerms {
  SetTerms<A> lane[W];
  FASTNORM_DEVICE const SetTerms<A>& operator[](int w) const { return lane[w]; }
};

// ---- activation: the branch is taken once for a pack ----

template <class A>
struct Epilogue {
  Activation activation;
  A param;
};

// The residual of a pack, widened. It is always an array: a pointer that may be null would move it to local memory.
template <int W, class T, class A>
FASTNORM_DEVICE void widen_residual(bool present, const Pack<T, W>& pack, A (&residual)[W]) {
  widen<A>(pack, residual);
#pragma unroll
  for (int w = 0; w < W; ++w) residual[w] = present ? residual[w] : A(-0.0);
}

// z = (x - mean) * scale + bias + residual. An absent residual is -0, which changes no sum.
template <int W, class A, class Coefs>
FASTNORM_DEVICE void normalize(const A (&x)[W], const Coefs& coefs, const A (&residual)[W], A (&z)[W]) {
#pragma unroll
  for (int w = 0; w < W; ++w) {
    const auto c = coefs[w];
    z[w] = std::fma(x[w] - c.mean, c.scale, c.bias) + residual[w];
  }
}

// A bit per element: 1 where the derivative of a two-sided activation is 1.
template <int W, class A>
FASTNORM_DEVICE unsigned upper_side(Activation activation, const A (&z)[W]) {
  unsigned bits = 0;
#pragma unroll
  for (int w = 0; w < W; ++w) {
    const bool upper = activation == Activation::kRelu ? !(z[w] <= A(0)) : z[w] > A(0);
    bits |= static_cast<unsigned>(upper) << w;
  }
  return bits;
}

template <bool kSmooth, int W, class A>
FASTNORM_DEVICE void activate_pack(const Epilogue<A>& e, A (&z)[W]) {
  if constexpr (kSmooth) {
    dispatch_smooth(e.activation, [&](auto tag) {
#pragma unroll
      for (int w = 0; w < W; ++w) z[w] = activate<decltype(tag)::value>(z[w], e.param);
    });
  } else {
    if (e.activation == Activation::kNone) return;
#pragma unroll
    for (int w = 0; w < W; ++w) {
      z[w] = e.activation == Activation::kRelu ? activate<Activation::kRelu>(z[w], e.param)
                                               : activate<Activation::kLeakyRelu>(z[w], e.param);
    }
  }
}

// ---- backward ----

// d = dy * act'(z), in place: from the mask's bits where forward saved them, else from z, computed again from x and
// residual.
template <bool kSmooth, int W, class A, class Coefs>
FASTNORM_DEVICE void multiply_slope(const Epilogue<A>& e, const A (&x)[W], const Coefs& coefs, const A (&residual)[W],
                                    bool masked, unsigned bits, A (&d)[W]) {
  if constexpr (kSmooth) {
    A z[W];
    normalize(x, coefs, residual, z);
    dispatch_smooth(e.activation, [&](auto tag) {
#pragma unroll
      for (int w = 0; w < W; ++w) d[w] *= activation_slope<decltype(tag)::value>(z[w], e.param);
    });
  } else {
    if (e.activation == Activation::kNone) return;
    if (!masked) {
      A z[W];
      normalize(x, coefs, residual, z);
      bits = upper_side(e.activation, z);
    }
    // Where relu is 0, d is 0 even for an infinite dy.
    const bool relu = e.activation == Activation::kRelu;
#pragma unroll
    for (int w = 0; w < W; ++w) d[w] = bits >> w & 1 ? d[w] : relu ? A(0) : d[w] * e.param;
  }
}

template <int W, class A, class Coefs, class Terms>
FASTNORM_DEVICE void input_gradient(const A (&x)[W], const A (&d)[W], const Coefs& coefs, const Terms& terms,
                                    A (&dx)[W]) {
#pragma unroll
  for (int w = 0; w < W; ++w) {
    const auto c = coefs[w];
    const SetTerms<A> t = terms[w];
    dx[w] = c.scale * d[w] - std::fma((x[w] - c.mean) * c.rstd, t.slope, t.offset);
  }
}

// The sum of a pack, as a tree.
template <int W, class A>
FASTNORM_DEVICE A tree_sum(const A (&v)[W]) {
  if constexpr (W == 1) {
    return v[0];
  } else if constexpr (W == 4) {
    return (v[0] + v[1]) + (v[2] + v[3]);
  } else {
    static_assert(W == 8, "packs are of 1, 4 or 8");
    return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
  }
}

}  // namespace fastnorm::cuda
