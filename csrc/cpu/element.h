// The arithmetic on one group of packs: normalize and activate (forward), or the gradient through the activation and dx
// (backward). Rows and columns, every norm and every layout call these few functions; they differ only in where the
// coefficients of an element come from.
#pragma once

#include <type_traits>

#include "core/accum.h"
#include "core/formulas.h"
#include "epilogue.h"
#include "walk.h"

namespace fastnorm::FASTNORM_CPU_CAPABILITY {

// ---- coefficients: xhat = (x - mean) * rstd, z = (x - mean) * scale + bias, scale = rstd * weight ----

template <class A>
struct Affine {
  Pack<A> mean, rstd, scale, bias;
};

// Coefficients that every element of a run shares. Where a channel has one mean, the part of it that rounding cut off
// goes into the bias. Here and in SharedTerms they are numbers, and who loops keeps a copy of its own: packs of several
// equal registers, or numbers that a store might change, would be loaded from memory again and again.
template <class A>
struct SharedCoefs {
  A mean, rstd, scale, bias;
  SharedCoefs() = default;
  SharedCoefs(A mean, A mean_low, A rstd, A weight, A bias)
      : mean(mean), rstd(rstd), scale(rstd * weight), bias(bias - mean_low * scale) {}
  FASTNORM_INLINE Affine<A> at(int64_t, int) const {
    return {Pack<A>(mean), Pack<A>(rstd), Pack<A>(scale), Pack<A>(bias)};
  }
};

// Coefficients of neighbouring channels, as arrays in the order of lanes, of whole packs.
template <class A>
struct ChannelCoefs {
  const A *mean, *rstd, *scale, *bias;
  FASTNORM_INLINE Affine<A> at(int64_t i, int) const {
    return {load(mean + i), load(rstd + i), load(scale + i), load(bias + i)};
  }
};

// Coefficients of sets, one below the other, in which every element has its own weight (LayerNorm): of up to P sets,
// whose packs are the packs of a group. weight and bias are in the order of lanes. What a set shares are numbers, not
// packs of several equal registers.
template <class A, int P>
struct ElementCoefs {
  A mean[P], rstd[P];
  const A *weight, *bias;
  ElementCoefs(const A* means, const A* rstds, const A* weight, const A* bias) : weight(weight), bias(bias) {
    for (int p = 0; p < P; ++p) mean[p] = means[p], rstd[p] = rstds[p];
  }
  ElementCoefs moved(int64_t offset) const {
    ElementCoefs r = *this;
    r.weight += offset;
    r.bias += offset;
    return r;
  }
  FASTNORM_INLINE Affine<A> at(int64_t i, int p) const {
    const Pack<A> each(rstd[p]);
    return {Pack<A>(mean[p]), each, each * load(weight + i), load(bias + i)};
  }
};

// Coefficients of rows of channels over neighbouring positions, each of which is a set (LayerNorm2d): a position's as
// arrays in the order of lanes, a row's as numbers, those of row p of a group at [p].
template <class A>
struct PositionCoefs {
  const A *mean, *rstd;
  const A *weight, *bias;
  FASTNORM_INLINE Affine<A> at(int64_t i, int p) const {
    const Pack<A> each = load(rstd + i);
    return {load(mean + i), each, each * Pack<A>(weight[p]), Pack<A>(bias[p])};
  }
};

template <class A>
struct SharedTerms {
  A offset, slope;
  SharedTerms() = default;
  SharedTerms(SetTerms<A> terms) : offset(terms.offset), slope(terms.slope) {}
  FASTNORM_INLINE Pack<A> dx(int64_t, int, const Affine<A>& c, Pack<A> d, Pack<A> centered) const {
    return c.scale * d - fma(centered * c.rstd, Pack<A>(slope), Pack<A>(offset));
  }
};
template <class A, int P>
struct ElementTerms {
  A offset[P], slope[P];
  FASTNORM_INLINE Pack<A> dx(int64_t, int p, const Affine<A>& c, Pack<A> d, Pack<A> centered) const {
    return c.scale * d - fma(centered * c.rstd, Pack<A>(slope[p]), Pack<A>(offset[p]));
  }
};
template <class A>
struct ChannelTerms {
  const A *offset, *slope;
  FASTNORM_INLINE Pack<A> dx(int64_t i, int, const Affine<A>& c, Pack<A> d, Pack<A> centered) const {
    return c.scale * d - fma(centered * c.rstd, load(slope + i), load(offset + i));
  }
};
template <class A>
struct FrozenTerms {
  FASTNORM_INLINE Pack<A> dx(int64_t, int, const Affine<A>& c, Pack<A> d, Pack<A>) const { return c.scale * d; }
};

// ---- forward over a span of contiguous elements ----

template <class T>
struct ForwardSpan {
  const T* x;
  const T* residual;
  T* y;
  uint8_t* mask;
  bool stream;                 // y is too large to stay in the cache
  int64_t residual_ahead = 0;  // what lies so far behind a residual is fetched, unless that is 0

  // Whether all packs from the first element on are stored past the cache.
  FASTNORM_INLINE bool streams() const { return stream && can_stream(y); }
  // Of n elements. whole_packs: what is read beside x lies in whole packs from the first element on, as the bytes of a
  // mask do.
  FASTNORM_INLINE Stores stores(int64_t n, bool whole_packs) const {
    if (!stream || ((whole_packs || mask) && !can_stream(y))) return {};
    return {true, elements_to_line(y, n)};
  }
  // The span `at` elements further on; mask_at bytes of the mask.
  ForwardSpan moved(int64_t at, int64_t mask_at) const {
    return {x + at,        residual ? residual + at : nullptr, y + at, mask ? mask + mask_at : nullptr, stream,
            residual_ahead};
  }
  ForwardSpan fetching(int64_t ahead) const { return {x, residual, y, mask, stream, ahead}; }
};

template <class T, class Coefs, class E>
struct ForwardPacks {
  using A = Accum<T>;
  const ForwardSpan<T> s;
  const Coefs& coefs;
  const E& epilogue;

  template <int P, class Access, class Layout>
  FASTNORM_INLINE void packs(int64_t i, Access access, Layout layout) const {
    Pack<A> z[P];
    for (int p = 0; p < P; ++p) {
      const Affine<A> c = coefs.at(i + layout.coef(p), layout.row(p));
      z[p] = fma(access.get(s.x + i + layout.element(p)) - c.mean, c.scale, c.bias);
    }
    for (int p = 0; p < P && layout.fetches(); ++p) prefetch(s.x + i + layout.later_element(p));
    if (s.residual) {
      for (int p = 0; p < P; ++p) z[p] = z[p] + access.get(s.residual + i + layout.element(p));
      for (int p = 0; p < P && s.residual_ahead != 0; ++p) {
        prefetch(s.residual + i + layout.element(p) + s.residual_ahead);
      }
    }
    if (kActivates<E> && epilogue.masked) {
      for (int p = 0; p < P; ++p) {
        access.template put_mask<T>(s.mask + i / kLanes<A> * kMaskBytes<A> + layout.mask(p),
                                    upper_side(epilogue.activation, z[p]));
      }
    }
    if constexpr (kActivates<E>) activate_packs<T>(epilogue, z);
    for (int p = 0; p < P; ++p) access.put(s.y + i + layout.element(p), z[p]);
  }
};

template <class T, class Coefs>
FASTNORM_INLINE void forward_span(const ForwardSpan<T>& s, int64_t n, const Coefs& coefs,
                                  const Epilogue<Accum<T>>& epilogue) {
  constexpr bool kWholePacks = !std::is_same_v<Coefs, SharedCoefs<Accum<T>>>;
  with_smooth_activation(epilogue, [&](const auto& e) FASTNORM_LAMBDA {
    store_packs<Accum<T>>(n, ForwardPacks<T, Coefs, std::decay_t<decltype(e)>>{s, coefs, e}, s.stores(n, kWholePacks));
  });
}

// The same over rows of n elements.
template <class T, class Coefs>
FASTNORM_INLINE void forward_rows(const ForwardSpan<T>& s, int64_t rows, int64_t n, Strided layout, const Coefs& coefs,
                                  const Epilogue<Accum<T>>& epilogue) {
  with_smooth_activation(epilogue, [&](const auto& e) FASTNORM_LAMBDA {
    const auto at_row = [&](int64_t r) {
      return ForwardPacks<T, Coefs, std::decay_t<decltype(e)>>{s.moved(layout.element(r), layout.mask(r)), coefs, e};
    };
    for_rows<Accum<T>>(rows, n, layout, at_row, s.streams());
  });
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

  // Whether all packs from the first element on are stored past the cache.
  FASTNORM_INLINE bool streams() const { return stream && can_stream(dx) && can_stream(dresidual); }
  // Of n elements. The bytes of a mask, and d that was cached, belong to whole packs from the first element on.
  FASTNORM_INLINE Stores stores(int64_t n) const {
    if (!stream) return {};
    if (streams()) return {true, 0};
    const int64_t head = elements_to_line(dx ? dx : dresidual, n);
    const bool whole_packs = mask || !std::is_same_v<D, T>;
    if (whole_packs || (dresidual && elements_to_line(dresidual, n) != head)) return {};
    return {true, head};
  }
  // The same span for a second pass that finds d in `cached`.
  BackwardSpan<T, Accum<T>> with_d(const Accum<T>* cached) const {
    return {cached, x, nullptr, nullptr, dx, dresidual, stream};
  }
  // The span `at` elements further on; d_at of dy, mask_at bytes of the mask.
  BackwardSpan moved(int64_t at, int64_t d_at, int64_t mask_at) const {
    return {dy + d_at,
            x + at,
            residual ? residual + at : nullptr,
            mask ? mask + mask_at : nullptr,
            dx ? dx + at : nullptr,
            dresidual ? dresidual + at : nullptr,
            stream};
  }
};

// Loads P packs at element i and gives d = dy * act'(z) and x - mean.
template <int P, class T, class D, class Coefs, class E, class Access, class Layout, class A = Accum<T>>
FASTNORM_INLINE void load_grad(const BackwardSpan<T, D>& s, int64_t i, const Coefs& coefs, const E& e, Access access,
                               Layout layout, Pack<A> (&d)[P], Pack<A> (&centered)[P]) {
  for (int p = 0; p < P; ++p) {
    centered[p] = access.get(s.x + i + layout.element(p)) - coefs.at(i + layout.coef(p), layout.row(p)).mean;
    if constexpr (std::is_same_v<D, T>) {
      d[p] = access.get(s.dy + i + layout.dy(p));
    } else {
      d[p] = load(s.dy + i + layout.dy(p));  // in the order of lanes, whole packs
    }
  }
  if constexpr (kActivates<E>) {
    if (e.masked) {
      const Pack<A> lower = e.activation == Activation::kRelu ? Pack<A>(0) : e.param;
      for (int p = 0; p < P; ++p) {
        const Mask<A> upper = access.template get_mask<T>(s.mask + i / kLanes<A> * kMaskBytes<A> + layout.mask(p));
        d[p] = select(upper, d[p], e.activation == Activation::kRelu ? lower : d[p] * lower);
      }
      return;
    }
    Pack<A> z[P];
    for (int p = 0; p < P; ++p) {
      const Affine<A> c = coefs.at(i + layout.coef(p), layout.row(p));
      z[p] = fma(centered[p], c.scale, c.bias);
    }
    if (s.residual) {
      for (int p = 0; p < P; ++p) z[p] = z[p] + access.get(s.residual + i + layout.element(p));
    }
    multiply_slopes<T>(e, z, d);
  }
}

// The sum of P packs, and the sum of their products, as a tree.
template <int P, class A>
FASTNORM_INLINE Pack<A> tree_sum(const Pack<A> (&v)[P]) {
  if constexpr (P == 1) return v[0];
  if constexpr (P == 2) return v[0] + v[1];
  if constexpr (P == 4) return (v[0] + v[1]) + (v[2] + v[3]);
}
template <int P, class A>
FASTNORM_INLINE Pack<A> tree_dot(const Pack<A> (&a)[P], const Pack<A> (&b)[P]) {
  if constexpr (P == 1) return a[0] * b[0];
  if constexpr (P == 2) return fma(a[0], b[0], a[1] * b[1]);
  if constexpr (P == 4) return fma(a[0], b[0], a[1] * b[1]) + fma(a[2], b[2], a[3] * b[3]);
}

// Adds d and d (x - mean) over a part of one channel to sums in A. With kWide the second is in double from the product
// on, for a spread so small that the products lose digits in A.
// Fetches what lies `ahead` of them, unless that is 0.
template <class T, bool kWide, class E>
struct SharedGradSums {
  using A = Accum<T>;
  const BackwardSpan<T>& s;
  const SharedCoefs<A>& coefs;
  const E& epilogue;
  A* cached;  // receives d for the second pass; or null
  HalfSum<A>&sum, &sum_centered;
  PackD& wide;
  int64_t ahead;

  template <int P, class Access, class Layout>
  FASTNORM_INLINE void packs(int64_t i, Access access, Layout layout) const {
    if constexpr (P > 1 && kParts > 2) {  // d and x - mean of a group would not fit the registers
      for (int p = 0; p < P; ++p) packs<1>(i, access, Single<Layout>{layout, p});
      return;
    }
    Pack<A> d[P], centered[P];
    load_grad(s, i, coefs, epilogue, access, layout, d, centered);
    for (int p = 0; p < P && ahead != 0; ++p) {
      prefetch(s.x + i + layout.element(p) + ahead);
      prefetch(s.dy + i + layout.dy(p) + ahead);
    }
    // Past the end dy is zero, but the slope can be Inf or NaN, and their product is NaN.
    for (int p = 0; p < P; ++p) d[p] = access.template zero_past_end<T>(d[p]);
    if (cached) {
      for (int p = 0; p < P; ++p) store(cached + i + layout.kept(p), d[p]);
    }
    for (int p = 0; p < P; ++p) {
      sum.add(d[p]);
      if constexpr (kWide) {
        wide = widen_dot(d[p], centered[p], wide);
      } else {
        sum_centered.add_product(d[p], centered[p]);
      }
    }
  }
};

// Writes dx and dresidual over a span.
template <class T, class D, class Coefs, class Terms, class E>
struct BackwardPacks {
  using A = Accum<T>;
  const BackwardSpan<T, D> s;
  const Coefs& coefs;
  const Terms& terms;
  const E& epilogue;

  template <int P, class Access, class Layout>
  FASTNORM_INLINE void packs(int64_t i, Access access, Layout layout) const {
    Pack<A> dx[P];
    for (int p = 0; p < P; ++p) {  // pack by pack: d and x - mean of a group would not fit the registers
      Pack<A> d[1], centered[1];
      load_grad(s, i, coefs, epilogue, access, Single<Layout>{layout, p}, d, centered);
      if (s.dresidual) access.put(s.dresidual + i + layout.element(p), d[0]);
      if (layout.fetches()) {
        prefetch(s.x + i + layout.later_element(p));
        prefetch(s.dy + i + layout.later_dy(p));
      }
      const int64_t at = i + layout.coef(p);
      dx[p] = terms.dx(at, layout.row(p), coefs.at(at, layout.row(p)), d[0], centered[0]);
    }
    if (!s.dx) return;
    for (int p = 0; p < P; ++p) access.put(s.dx + i + layout.element(p), dx[p]);
  }
};

// The same over rows of n elements, as forward_rows.
template <class T, class D, class Coefs, class Terms>
FASTNORM_INLINE void backward_rows(const BackwardSpan<T, D>& s, int64_t rows, int64_t n, Strided layout,
                                   const Coefs& coefs, const Terms& terms, const Epilogue<Accum<T>>& epilogue) {
  const bool stream = s.streams();
  with_activation(epilogue, [&](const auto& e) FASTNORM_LAMBDA {
    using Packs = BackwardPacks<T, D, Coefs, Terms, std::decay_t<decltype(e)>>;
    const auto at_row = [&](int64_t r) {
      return Packs{s.moved(layout.element(r), layout.dy(r), layout.mask(r)), coefs, terms, e};
    };
    for_rows<Accum<T>>(rows, n, layout, at_row, stream);
  });
}

}  // namespace fastnorm::FASTNORM_CPU_CAPABILITY
