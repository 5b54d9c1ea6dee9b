// The arithmetic on the elements of a pack: normalize and activate (forward), the gradient through the activation and
// dx (backward). Every norm, layout and strategy uses these few functions; norms differ in the coefficients they pass.
#pragma once

#include <cmath>

#include "activation_value.cuh"
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

// dx = scale * d - (offset + (x - mean) * slope): the terms of core/formulas.h, whose slope is that of xhat, times
// rstd.
template <class A>
struct InputTerms {
  A offset, slope;

  InputTerms() = default;
  FASTNORM_DEVICE InputTerms(const SetTerms<A>& t, A rstd) : offset(t.offset), slope(t.slope * rstd) {}
};
template <class A>
struct SharedTerms {
  InputTerms<A> all;
  FASTNORM_DEVICE const InputTerms<A>& operator[](int) const { return all; }
};
template <class A, int W>
struct LaneTerms {
  InputTerms<A> lane[W];
  FASTNORM_DEVICE const InputTerms<A>& operator[](int w) const { return lane[w]; }
};

// z = (x - mean) * scale + bias.
template <int W, class A, class Coefs>
FASTNORM_DEVICE void normalize(const A (&x)[W], const Coefs& coefs, A (&z)[W]) {
#pragma unroll
  for (int w = 0; w < W; ++w) {
    const auto c = coefs[w];
    z[w] = std::fma(x[w] - c.mean, c.scale, c.bias);
  }
}
template <int W, class T, class A>
FASTNORM_DEVICE void add_residual(const Pack<T, W>& pack, A (&z)[W]) {
  A residual[W];
  widen<A>(pack, residual);
#pragma unroll
  for (int w = 0; w < W; ++w) z[w] += residual[w];
}

// ---- activation ----

template <class A>
struct Epilogue {
  Activation activation;
  A param;
};

// Calls f with the tag of the activation. Call it around a loop over packs, not in it.
template <bool kSmooth, class F>
FASTNORM_DEVICE void dispatch_activation(Activation a, F f) {
  if constexpr (kSmooth) {
    dispatch_smooth(a, f);
  } else {
    dispatch_plain(a, f);
  }
}

// A bit per element: 1 where the derivative of a two-sided activation is 1.
template <Activation kAct, class A>
FASTNORM_DEVICE bool is_upper(A z) {
  return kAct == Activation::kRelu ? !(z <= A(0)) : z > A(0);
}
template <Activation kAct, int W, class A>
FASTNORM_DEVICE unsigned upper_side(const A (&z)[W]) {
  unsigned bits = 0;
#pragma unroll
  for (int w = 0; w < W; ++w) bits |= static_cast<unsigned>(is_upper<kAct>(z[w])) << w;
  return bits;
}

// act(z) of elements of T, in place.
template <Activation kAct, class T, int W, class A>
FASTNORM_DEVICE void activate_pack(A param, A (&z)[W]) {
#pragma unroll
  for (int w = 0; w < W; ++w) {
    if constexpr (kAct == Activation::kRelu) {
      z[w] = relu_of(z[w]);
    } else if constexpr (is_two_sided(kAct)) {
      z[w] = activate<kAct>(z[w], param);
    } else if constexpr (kAct != Activation::kNone) {
      using V = ActivationValue<kAct, T>;
      z[w] = value_of(activate<kAct>(V(z[w]), V(param)));
    }
  }
}

// d *= the slope of a two-sided activation. Where relu's is 0, d is 0 even for an infinite dy.
template <Activation kAct, class A>
FASTNORM_DEVICE A times_slope(A d, bool upper, A param) {
  return upper ? d : kAct == Activation::kRelu ? A(0) : d * param;
}
template <Activation kAct, int W, class A>
FASTNORM_DEVICE void multiply_slope_bits(A param, unsigned bits, A (&d)[W]) {
#pragma unroll
  for (int w = 0; w < W; ++w) d[w] = times_slope<kAct>(d[w], bits >> w & 1, param);
}

// d *= act'(z) of elements of T.
template <Activation kAct, class T, int W, class A>
FASTNORM_DEVICE void multiply_slope(A param, const A (&z)[W], A (&d)[W]) {
#pragma unroll
  for (int w = 0; w < W; ++w) {
    if constexpr (is_two_sided(kAct)) {
      d[w] = times_slope<kAct>(d[w], is_upper<kAct>(z[w]), param);
    } else if constexpr (kAct != Activation::kNone) {
      using V = ActivationValue<kAct, T>;
      d[w] *= value_of(activation_slope<kAct>(V(z[w]), V(param)));
    }
  }
}

// ---- dx ----

template <int W, class A, class Coefs, class Terms>
FASTNORM_DEVICE void input_gradient(const A (&x)[W], const A (&d)[W], const Coefs& coefs, const Terms& terms,
                                    A (&dx)[W]) {
#pragma unroll
  for (int w = 0; w < W; ++w) {
    const auto c = coefs[w];
    const InputTerms<A> t = terms[w];
    dx[w] = std::fma(c.scale, d[w], -std::fma(x[w] - c.mean, t.slope, t.offset));
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
