// The arithmetic on one group of packs: normalize and activate (forward), or the gradient through the activation and dx
// (backward). Rows and columns, every norm and every layout call these few functions; they differ only in where the
// coefficients of an element come from.
#pragma once

#include <type_traits>

#include "core/accum.h"
#include "core/activation.h"
#include "core/formulas.h"
#include "vec_math.h"
#include "walk.h"

namespace fastnorm::FASTNORM_CPU_CAPABILITY {

// ---- coefficients: xhat = (x - mean) * rstd, z = (x - mean) * scale + bias, scale = rstd * weight ----

template <class A>
struct Affine {
  Pack<A> mean, rstd, scale, bias;
};

// Coefficients that every element of a run shares: those of one channel, or of one pack of channels while a kernel
// walks down the positions. Where a channel has one mean, the part of it that rounding cut off goes into the bias.
template <class A>
struct SharedCoefs {
  Affine<A> all;
  explicit SharedCoefs(const Affine<A>& coefs) : all(coefs) {}
  SharedCoefs(A mean, A mean_low, A rstd, A weight, A bias)
      : all{Pack<A>(mean), Pack<A>(rstd), Pack<A>(rstd * weight), Pack<A>(bias - mean_low * (rstd * weight))} {}
  FASTNORM_INLINE Affine<A> at(int64_t) const { return all; }
};

// Coefficients of neighbouring channels, as arrays that can be read a pack past their end.
template <class A>
struct ChannelCoefs {
  const A *mean, *rstd, *scale, *bias;
  FASTNORM_INLINE Affine<A> at(int64_t i) const {
    return {load(mean + i), load(rstd + i), load(scale + i), load(bias + i)};
  }
};

// Coefficients of one set in which every element has its own weight (LayerNorm).
template <class A>
struct ElementCoefs {
  Pack<A> mean, rstd;
  const A *weight, *bias;
  ElementCoefs(A mean, A rstd, const A* weight, const A* bias) : mean(mean), rstd(rstd), weight(weight), bias(bias) {}
  FASTNORM_INLINE Affine<A> at(int64_t i) const { return {mean, rstd, rstd * load(weight + i), load(bias + i)}; }
};

template <class A>
struct SharedTerms {
  Pack<A> offset, slope;
  SharedTerms() = default;
  SharedTerms(SetTerms<A> terms) : offset(terms.offset), slope(terms.slope) {}
  FASTNORM_INLINE Pack<A> dx(int64_t, const Affine<A>& c, Pack<A> d, Pack<A> centered) const {
    return c.scale * d - fma(centered * c.rstd, slope, offset);
  }
};
template <class A>
struct ChannelTerms {
  const A *offset, *slope;
  FASTNORM_INLINE Pack<A> dx(int64_t i, const Affine<A>& c, Pack<A> d, Pack<A> centered) const {
    return c.scale * d - fma(centered * c.rstd, load(slope + i), load(offset + i));
  }
};
template <class A>
struct FrozenTerms {
  FASTNORM_INLINE Pack<A> dx(int64_t, const Affine<A>& c, Pack<A> d, Pack<A>) const { return c.scale * d; }
};

// ---- activation of P packs: one branch serves all of them ----

template <class A>
struct Epilogue {
  Activation activation;
  Pack<A> param;
};

// z = act(z), and d = d * act'(z).
template <Activation kAct, class T, int P, class A = Accum<T>>
FASTNORM_INLINE void activate_each(const Epilogue<A>& e, Pack<A> (&z)[P]) {
  using V = ActivationValue<T>;
  for (int p = 0; p < P; ++p) z[p] = activate<kAct>(V(z[p]), V(e.param));
}
template <Activation kAct, class T, int P, class A = Accum<T>>
FASTNORM_INLINE void multiply_each(const Epilogue<A>& e, const Pack<A> (&z)[P], Pack<A> (&d)[P]) {
  using V = ActivationValue<T>;
  for (int p = 0; p < P; ++p) d[p] = d[p] * activation_slope<kAct>(V(z[p]), V(e.param));
}

// SiLU and GELU are inlined: a call costs as much as a third of them. These are not, so that one copy of the other long
// polynomials serves every kernel.
template <class T, int P, class A = Accum<T>>
__attribute__((noinline)) void activate_out_of_line(const Epilogue<A>& e, Pack<A> (&z)[P]) {
  dispatch_smooth(e.activation, [&](auto kind) { activate_each<decltype(kind)::value, T>(e, z); });
}
template <class T, int P, class A = Accum<T>>
__attribute__((noinline)) void multiply_out_of_line(const Epilogue<A>& e, const Pack<A> (&z)[P], Pack<A> (&d)[P]) {
  dispatch_smooth(e.activation, [&](auto kind) { multiply_each<decltype(kind)::value, T>(e, z, d); });
}
template <class T>
constexpr bool kInlineSmooth = sizeof(T) < 8;  // doubles are computed lane by lane

template <class T, int P, class A = Accum<T>>
FASTNORM_INLINE void activate_packs(const Epilogue<A>& e, Pack<A> (&z)[P]) {
  switch (e.activation) {
    case Activation::kNone: return;
    case Activation::kRelu: return activate_each<Activation::kRelu, T>(e, z);
    case Activation::kLeakyRelu: return activate_each<Activation::kLeakyRelu, T>(e, z);
    case Activation::kSilu:
      if constexpr (kInlineSmooth<T>) return activate_each<Activation::kSilu, T>(e, z);
      [[fallthrough]];
    case Activation::kGelu:
      if constexpr (kInlineSmooth<T>) return activate_each<Activation::kGelu, T>(e, z);
      [[fallthrough]];
    default:
      Pack<A> copy[P];  // so that z itself may stay in registers
      for (int p = 0; p < P; ++p) copy[p] = z[p];
      activate_out_of_line<T>(e, copy);
      for (int p = 0; p < P; ++p) z[p] = copy[p];
  }
}

// Multiplies d by act'(z).
template <class T, int P, class A = Accum<T>>
FASTNORM_INLINE void multiply_slopes(const Epilogue<A>& e, const Pack<A> (&z)[P], Pack<A> (&d)[P]) {
  switch (e.activation) {
    case Activation::kNone: return;
    case Activation::kRelu:
      for (int p = 0; p < P; ++p) d[p] = select(z[p] <= Pack<A>(0), Pack<A>(0), d[p]);
      return;
    case Activation::kLeakyRelu:
      for (int p = 0; p < P; ++p) d[p] = select(z[p] > Pack<A>(0), d[p], d[p] * e.param);
      return;
    case Activation::kSilu:
      if constexpr (kInlineSmooth<T>) return multiply_each<Activation::kSilu, T>(e, z, d);
      [[fallthrough]];
    case Activation::kGelu:
      if constexpr (kInlineSmooth<T>) return multiply_each<Activation::kGelu, T>(e, z, d);
      [[fallthrough]];
    default:
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

// ---- forward over a span of contiguous elements ----

template <class T>
struct ForwardSpan {
  const T* x;
  const T* residual;
  T* y;
  uint8_t* mask;
  bool stream;  // y is too large to stay in the cache
};

template <class T, class Coefs>
struct ForwardPacks {
  using A = Accum<T>;
  const ForwardSpan<T>& s;
  const Coefs& coefs;
  const Epilogue<A>& epilogue;

  template <int P, class Access>
  FASTNORM_INLINE void packs(int64_t i, Access access) const {
    constexpr int64_t L = kLanes<A>;
    Pack<A> z[P];
    for (int p = 0; p < P; ++p) {
      const Affine<A> c = coefs.at(i + p * L);
      z[p] = fma(access.get(s.x + i + p * L, p) - c.mean, c.scale, c.bias);
    }
    if (s.residual) {
      for (int p = 0; p < P; ++p) z[p] = z[p] + access.get(s.residual + i + p * L, p);
    }
    if (s.mask) {
      for (int p = 0; p < P; ++p) {
        store_mask(s.mask + (i / L + p) * kMaskBytes<A>,
                   access.zero_past_end(upper_side(epilogue.activation, z[p]), p));
      }
    }
    activate_packs<T>(epilogue, z);
    for (int p = 0; p < P; ++p) access.put(s.y + i + p * L, z[p], p);
  }
};

template <class T, class Coefs>
FASTNORM_INLINE void forward_span(const ForwardSpan<T>& s, int64_t n, const Coefs& coefs,
                                  const Epilogue<Accum<T>>& epilogue) {
  for_packs<Accum<T>>(n, ForwardPacks<T, Coefs>{s, coefs, epilogue}, s.stream && can_stream(s.y));
}

// ---- backward ----

// D is the storage type of dy: T or, where dy is the d that the first pass cached, A.
template <class T, class D = T>
struct BackwardSpan {
  const D* dy;
  const T* x;
  const T* residual;
  const uint8_t* mask;
  T* dx;
  T* dresidual;
  bool stream;  // dx and dresidual are too large to stay in the cache

  // The same span for a second pass that finds d in `cached`.
  BackwardSpan<T, Accum<T>> with_d(const Accum<T>* cached) const {
    return {cached, x, nullptr, nullptr, dx, dresidual, stream};
  }
};

// Where pack p of a group lies: behind the one before it, or below it at the next position.
template <class A>
struct Adjacent {
  FASTNORM_INLINE int64_t element(int p) const { return p * kLanes<A>; }
  FASTNORM_INLINE int64_t coef(int p) const { return p * kLanes<A>; }
  FASTNORM_INLINE int64_t mask(int p) const { return p * kMaskBytes<A>; }
};
template <class A>
struct Strided {
  int64_t stride, mask_stride;
  FASTNORM_INLINE int64_t element(int p) const { return p * stride; }
  FASTNORM_INLINE int64_t coef(int) const { return 0; }
  FASTNORM_INLINE int64_t mask(int p) const { return p * mask_stride; }
};

// Loads P packs at element i and gives d = dy * act'(z) and x - mean.
template <int P, class T, class D, class Coefs, class Access, class Layout, class A = Accum<T>>
FASTNORM_INLINE void load_grad(const BackwardSpan<T, D>& s, int64_t i, const Coefs& coefs, const Epilogue<A>& e,
                               Access access, Layout layout, Pack<A> (&d)[P], Pack<A> (&centered)[P]) {
  for (int p = 0; p < P; ++p) {
    centered[p] = access.get(s.x + i + layout.element(p), p) - coefs.at(i + layout.coef(p)).mean;
    d[p] = access.get(s.dy + i + layout.element(p), p);
  }
  if (e.activation == Activation::kNone) return;
  if (s.mask) {
    const Pack<A> lower = e.activation == Activation::kRelu ? Pack<A>(0) : e.param;
    for (int p = 0; p < P; ++p) {
      const Mask<A> upper = load_mask<A>(s.mask + i / kLanes<A> * kMaskBytes<A> + layout.mask(p));
      d[p] = select(upper, d[p], e.activation == Activation::kRelu ? lower : d[p] * lower);
    }
    return;
  }
  Pack<A> z[P];
  for (int p = 0; p < P; ++p) {
    const Affine<A> c = coefs.at(i + layout.coef(p));
    z[p] = fma(centered[p], c.scale, c.bias);
  }
  if (s.residual) {
    for (int p = 0; p < P; ++p) z[p] = z[p] + access.get(s.residual + i + layout.element(p), p);
  }
  multiply_slopes<T>(e, z, d);
}

// The sum of P packs, and the sum of their products, as a tree.
template <int P, class A>
FASTNORM_INLINE Pack<A> tree_sum(const Pack<A> (&v)[P]) {
  if constexpr (P == 1) return v[0];
  if constexpr (P == 2) return v[0] + v[1];
  if constexpr (P == 3) return (v[0] + v[1]) + v[2];
  if constexpr (P == 4) return (v[0] + v[1]) + (v[2] + v[3]);
}
template <int P, class A>
FASTNORM_INLINE Pack<A> tree_dot(const Pack<A> (&a)[P], const Pack<A> (&b)[P]) {
  if constexpr (P == 1) return a[0] * b[0];
  if constexpr (P == 2) return fma(a[0], b[0], a[1] * b[1]);
  if constexpr (P == 3) return fma(a[0], b[0], a[1] * b[1]) + a[2] * b[2];
  if constexpr (P == 4) return fma(a[0], b[0], a[1] * b[1]) + fma(a[2], b[2], a[3] * b[3]);
}

// Adds d and d (x - mean) over a span of one channel to `sums`. Four packs are added in A, then widened. With kExact
// the second sum is in double from the difference on, as in torch.nn's planar batch norm; it costs 0.8 ns a pack. The
// rounding of x - mean is the same for all half-precision x of one binade, so it does not average out.
template <class T, bool kExact>
struct SharedGradSums {
  using A = Accum<T>;
  const BackwardSpan<T>& s;
  const SharedCoefs<A>& coefs;
  const Epilogue<A>& epilogue;
  A* cached;  // receives d for the second pass; or null
  GradSums<PackD>& sums;

  template <int P, class Access>
  FASTNORM_INLINE void packs(int64_t i, Access access) const {
    Pack<A> d[P], centered[P];
    load_grad(s, i, coefs, epilogue, access, Adjacent<A>{}, d, centered);
    // Past the end dy is zero, but the slope can be Inf or NaN, and their product is NaN.
    for (int p = 0; p < P; ++p) d[p] = access.zero_past_end(d[p], p);
    if (cached) {
      for (int p = 0; p < P; ++p) store(cached + i + p * kLanes<A>, d[p]);
    }
    sums.d = sums.d + widen_halves(tree_sum(d));
    if constexpr (kExact) {
      const PackD mean = widen_lower(coefs.all.mean);
      PackD dot(0);
      for (int p = 0; p < P; ++p) dot = widen_dot(d[p], access.get(s.x + i + p * kLanes<A>, p), mean, dot);
      sums.d_centered = sums.d_centered + dot;
    } else {
      sums.d_centered = sums.d_centered + widen_halves(tree_dot(d, centered));
    }
  }
};

// Writes dx and dresidual over a span.
template <class T, class D, class Coefs, class Terms>
struct BackwardPacks {
  using A = Accum<T>;
  const BackwardSpan<T, D>& s;
  const Coefs& coefs;
  const Terms& terms;
  const Epilogue<A>& epilogue;

  template <int P, class Access>
  FASTNORM_INLINE void packs(int64_t i, Access access) const {
    constexpr int64_t L = kLanes<A>;
    Pack<A> d[P], centered[P];
    load_grad(s, i, coefs, epilogue, access, Adjacent<A>{}, d, centered);
    if (s.dresidual) {
      for (int p = 0; p < P; ++p) access.put(s.dresidual + i + p * L, d[p], p);
    }
    if (s.dx) {
      for (int p = 0; p < P; ++p) {
        access.put(s.dx + i + p * L, terms.dx(i + p * L, coefs.at(i + p * L), d[p], centered[p]), p);
      }
    }
  }
};

template <class T, class D, class Coefs, class Terms>
FASTNORM_INLINE void backward_span(const BackwardSpan<T, D>& s, int64_t n, const Coefs& coefs, const Terms& terms,
                                   const Epilogue<Accum<T>>& epilogue) {
  const bool stream = s.stream && can_stream(s.dx) && can_stream(s.dresidual);
  for_packs<Accum<T>>(n, BackwardPacks<T, D, Coefs, Terms>{s, coefs, terms, epilogue}, stream);
}

}  // namespace fastnorm::FASTNORM_CPU_CAPABILITY
