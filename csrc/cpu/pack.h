// Pack<A> is 128 bytes of lanes (32 floats or 16 doubles) on any machine: two AVX-512 registers, four AVX2 registers,
// eight of 16 bytes elsewhere. It is what one line of 16-bit elements becomes. The lane count is part of the numerics:
// sums are folded lane by lane, so every instruction set with fused multiply-add gives the same bits. This file is
// compiled once per instruction set, in a namespace that FASTNORM_CPU_CAPABILITY names.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#if defined(__AVX2__) || defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif

#include "core/dtype.h"

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 warns of registers that its own AVX-512 intrinsics leave undefined on purpose.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#define FASTNORM_INLINE inline __attribute__((always_inline))
#define FASTNORM_LAMBDA __attribute__((always_inline))

namespace fastnorm::FASTNORM_CPU_CAPABILITY {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int kPackBytes = 128;
constexpr int kParts = kPackBytes / kVectorBytes;

// Calls f with the constants 0 to n - 1. The parts of a pack are visited by this instead of a loop, which GCC 12
// unrolls too late to keep them in registers.
template <int n, class F>
FASTNORM_INLINE void for_each_index(F&& f) {
  [&]<int... k>(std::integer_sequence<int, k...>)
      FASTNORM_LAMBDA { (f(std::integral_constant<int, k>{}), ...); }(std::make_integer_sequence<int, n>{});
}

template <class E, int kBytes>
using Vector __attribute__((vector_size(kBytes))) = E;

// The integer that is as wide as a lane, for masks and bit operations.
template <class A>
using Bits = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;

template <class A>
struct Mask {
  Vector<Bits<A>, kVectorBytes> part[kParts];
};

template <class A>
struct Pack {
  static constexpr int kLanes = kPackBytes / sizeof(A);
  static constexpr int kPartLanes = kLanes / kParts;
  using Part = Vector<A, kVectorBytes>;
  using BitsPart = Vector<Bits<A>, kVectorBytes>;

  Part part[kParts];

  Pack() = default;
  FASTNORM_INLINE explicit Pack(double value) {
    for_each_index<kParts>([&](auto k) FASTNORM_LAMBDA { part[k] = static_cast<A>(value) - Part{}; });
  }
  FASTNORM_INLINE A operator[](int lane) const { return part[lane / kPartLanes][lane % kPartLanes]; }
};

// Sets r.part[k] = expr for every part k.
#define FASTNORM_PARTWISE(Result, r, expr)                                     \
  {                                                                            \
    Result r;                                                                  \
    for_each_index<kParts>([&](auto k) FASTNORM_LAMBDA { r.part[k] = expr; }); \
    return r;                                                                  \
  }

template <class A>
FASTNORM_INLINE Pack<A> operator+(Pack<A> a, Pack<A> b) {
  FASTNORM_PARTWISE(Pack<A>, r, a.part[k] + b.part[k]);
}
template <class A>
FASTNORM_INLINE Pack<A> operator-(Pack<A> a, Pack<A> b) {
  FASTNORM_PARTWISE(Pack<A>, r, a.part[k] - b.part[k]);
}
template <class A>
FASTNORM_INLINE Pack<A> operator-(Pack<A> a) {
  FASTNORM_PARTWISE(Pack<A>, r, -a.part[k]);
}
template <class A>
FASTNORM_INLINE Pack<A> operator*(Pack<A> a, Pack<A> b) {
  FASTNORM_PARTWISE(Pack<A>, r, a.part[k] * b.part[k]);
}
template <class A>
FASTNORM_INLINE Pack<A> operator/(Pack<A> a, Pack<A> b) {
  FASTNORM_PARTWISE(Pack<A>, r, a.part[k] / b.part[k]);
}
template <class A>
FASTNORM_INLINE Mask<A> operator<=(Pack<A> a, Pack<A> b) {
  FASTNORM_PARTWISE(Mask<A>, r, a.part[k] <= b.part[k]);
}
template <class A>
FASTNORM_INLINE Mask<A> operator>=(Pack<A> a, Pack<A> b) {
  FASTNORM_PARTWISE(Mask<A>, r, a.part[k] >= b.part[k]);
}
template <class A>
FASTNORM_INLINE Mask<A> operator>(Pack<A> a, Pack<A> b) {
  FASTNORM_PARTWISE(Mask<A>, r, a.part[k] > b.part[k]);
}
template <class A>
FASTNORM_INLINE Mask<A> operator!(Mask<A> a) {
  FASTNORM_PARTWISE(Mask<A>, r, ~a.part[k]);
}
template <class A>
FASTNORM_INLINE Mask<A> operator&(Mask<A> a, Mask<A> b) {
  FASTNORM_PARTWISE(Mask<A>, r, a.part[k] & b.part[k]);
}
template <class A>
FASTNORM_INLINE Pack<A> select(Mask<A> m, Pack<A> a, Pack<A> b) {
  FASTNORM_PARTWISE(Pack<A>, r, m.part[k] ? a.part[k] : b.part[k]);
}

FASTNORM_INLINE Vector<float, kVectorBytes> fma_part(Vector<float, kVectorBytes> a, Vector<float, kVectorBytes> b,
                                                     Vector<float, kVectorBytes> c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}
FASTNORM_INLINE Vector<double, kVectorBytes> fma_part(Vector<double, kVectorBytes> a, Vector<double, kVectorBytes> b,
                                                      Vector<double, kVectorBytes> c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_pd(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_pd(a, b, c);
#else
  return a * b + c;
#endif
}
template <class A>
FASTNORM_INLINE Pack<A> fma(Pack<A> a, Pack<A> b, Pack<A> c) {
  FASTNORM_PARTWISE(Pack<A>, r, fma_part(a.part[k], b.part[k], c.part[k]));
}

// The smaller and the larger of two packs, lane by lane. Where either is NaN the result is b.
template <class A>
FASTNORM_INLINE Pack<A> min(Pack<A> a, Pack<A> b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) FASTNORM_PARTWISE(Pack<A>, r, _mm512_min_ps(a.part[k], b.part[k]));
#elif defined(__AVX2__)
  if constexpr (sizeof(A) == 4) FASTNORM_PARTWISE(Pack<A>, r, _mm256_min_ps(a.part[k], b.part[k]));
#endif
  FASTNORM_PARTWISE(Pack<A>, s, a.part[k] < b.part[k] ? a.part[k] : b.part[k]);
}
template <class A>
FASTNORM_INLINE Pack<A> max(Pack<A> a, Pack<A> b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) FASTNORM_PARTWISE(Pack<A>, r, _mm512_max_ps(a.part[k], b.part[k]));
#elif defined(__AVX2__)
  if constexpr (sizeof(A) == 4) FASTNORM_PARTWISE(Pack<A>, r, _mm256_max_ps(a.part[k], b.part[k]));
#endif
  FASTNORM_PARTWISE(Pack<A>, s, a.part[k] > b.part[k] ? a.part[k] : b.part[k]);
}

template <class A>
FASTNORM_INLINE Mask<A> bits_of(Pack<A> a) {
  FASTNORM_PARTWISE(Mask<A>, r, (typename Pack<A>::BitsPart)a.part[k]);
}
template <class A>
FASTNORM_INLINE Pack<A> from_bits(Mask<A> a) {
  FASTNORM_PARTWISE(Pack<A>, r, (typename Pack<A>::Part)a.part[k]);
}

// The lower half of a pack's lanes as doubles.
FASTNORM_INLINE Pack<double> widen_lower(Pack<float> v) {
  Pack<double> r;
  for_each_index<kParts / 2>([&](auto k) FASTNORM_LAMBDA {
    const Pack<float>::Part part = v.part[k];
#if defined(__AVX512F__)
    r.part[2 * k] = _mm512_cvtps_pd(_mm512_castps512_ps256(part));
    r.part[2 * k + 1] = _mm512_cvtps_pd(_mm512_extractf32x8_ps(part, 1));
#elif defined(__AVX2__)
    r.part[2 * k] = _mm256_cvtps_pd(_mm256_castps256_ps128(part));
    r.part[2 * k + 1] = _mm256_cvtps_pd(_mm256_extractf128_ps(part, 1));
#else
    for (int i = 0; i < Pack<float>::kPartLanes; ++i) {
      r.part[2 * k + i / Pack<double>::kPartLanes][i % Pack<double>::kPartLanes] = part[i];
    }
#endif
  });
  return r;
}
// The upper half in the place of the lower.
FASTNORM_INLINE Pack<float> upper_half(Pack<float> v) {
  for_each_index<kParts / 2>([&](auto k) FASTNORM_LAMBDA { v.part[k] = v.part[k + kParts / 2]; });
  return v;
}

// The sum of a pack's halves, lane by lane, as doubles: the step from float sums to double ones.
FASTNORM_INLINE Pack<double> widen_halves(Pack<float> v) { return widen_lower(v + upper_half(v)); }
FASTNORM_INLINE Pack<double> widen_halves(Pack<double> v) { return v; }

// A sum that takes half a pack: a pack's halves are added to each other first.
template <class A>
struct HalfSum {
  typename Pack<A>::Part part[kParts / 2] = {};

  FASTNORM_INLINE void add(Pack<A> v) {
    for_each_index<kParts / 2>([&](auto k)
                                   FASTNORM_LAMBDA { part[k] = part[k] + (v.part[k] + v.part[k + kParts / 2]); });
  }
  FASTNORM_INLINE void add_product(Pack<A> a, Pack<A> b) {
    for_each_index<kParts / 2>([&](auto k) FASTNORM_LAMBDA {
      constexpr int upper = k + kParts / 2;
      part[k] = fma_part(a.part[upper], b.part[upper], fma_part(a.part[k], b.part[k], part[k]));
    });
  }
  FASTNORM_INLINE Pack<A> lower_half() const {
    Pack<A> r(0);
    for_each_index<kParts / 2>([&](auto k) FASTNORM_LAMBDA { r.part[k] = part[k]; });
    return r;
  }
};

// total + a b, lane by lane, in double.
FASTNORM_INLINE Pack<double> widen_dot(Pack<float> a, Pack<float> b, Pack<double> total) {
  total = fma(widen_lower(a), widen_lower(b), total);
  return fma(widen_lower(upper_half(a)), widen_lower(upper_half(b)), total);
}
FASTNORM_INLINE Pack<double> widen_dot(Pack<double> a, Pack<double> b, Pack<double> total) { return fma(a, b, total); }

// The sum of the lanes, always in the same order: halves, quarters and so on.
FASTNORM_INLINE double sum_lanes(Pack<double> v) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
  const __m512d all = v.part[0] + v.part[1];
  const __m256d half = _mm512_castpd512_pd256(all) + _mm512_extractf64x4_pd(all, 1);
#else
  const __m256d half = (v.part[0] + v.part[2]) + (v.part[1] + v.part[3]);
#endif
  const __m128d quarter = _mm256_castpd256_pd128(half) + _mm256_extractf128_pd(half, 1);
  return quarter[0] + quarter[1];
#else
  double lane[8];
  for (int i = 0; i < 8; ++i) lane[i] = v[i] + v[i + 8];
  return ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
#endif
}
template <class A>
FASTNORM_INLINE double sum_lanes(Pack<A> v) {
  return sum_lanes(widen_halves(v));
}

FASTNORM_INLINE Pack<double> widen(const HalfSum<float>& v) { return widen_lower(v.lower_half()); }
FASTNORM_INLINE Pack<double> widen(const HalfSum<double>& v) { return v.lower_half(); }
template <class A>
FASTNORM_INLINE double sum_lanes(const HalfSum<A>& v) {
  return sum_lanes(widen(v));
}

}  // namespace fastnorm::FASTNORM_CPU_CAPABILITY
