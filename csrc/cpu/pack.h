// Pack<A> is 64 bytes of lanes (16 floats or 8 doubles) on any machine: one AVX-512 register, two AVX2 registers, four
// of 16 bytes elsewhere. The lane count is part of the numerics: sums are folded lane by lane, so every instruction set
// with fused multiply-add gives the same bits. This file is compiled once per instruction set, in a namespace that
// FASTNORM_CPU_CAPABILITY names.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
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

namespace fastnorm::FASTNORM_CPU_CAPABILITY {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int kPackBytes = 64;
constexpr int kParts = kPackBytes / kVectorBytes;

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
    for (int k = 0; k < kParts; ++k) part[k] = Part{} + static_cast<A>(value);
  }
  FASTNORM_INLINE A operator[](int lane) const { return part[lane / kPartLanes][lane % kPartLanes]; }
};

// Sets r.part[k] = expr for every part k.
#define FASTNORM_PARTWISE(Result, r, expr)             \
  {                                                    \
    Result r;                                          \
    for (int k = 0; k < kParts; ++k) r.part[k] = expr; \
    return r;                                          \
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

// 0, 1, 2 ... as integers that are as wide as a lane.
alignas(kPackBytes) constexpr int32_t kIota32[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
alignas(kPackBytes) constexpr int64_t kIota64[8] = {0, 1, 2, 3, 4, 5, 6, 7};

// The mask of the first n lanes.
template <class A>
FASTNORM_INLINE Mask<A> first_lanes(int64_t n) {
  Mask<A> r;
  if constexpr (sizeof(A) == 4) {
    std::memcpy(&r, kIota32, sizeof r);
  } else {
    std::memcpy(&r, kIota64, sizeof r);
  }
  for (int k = 0; k < kParts; ++k) r.part[k] = r.part[k] < static_cast<Bits<A>>(n);
  return r;
}

// ---- widening: sums over many elements are double ----

// Lanes 0 to 7 and 8 to 15 of a float pack as doubles.
FASTNORM_INLINE Pack<double> widen_lower(Pack<float> v) {
  Pack<double> r;
#if defined(__AVX512F__)
  r.part[0] = _mm512_cvtps_pd(_mm512_castps512_ps256(v.part[0]));
#else
  for (int i = 0; i < 8; ++i) r.part[i / Pack<double>::kPartLanes][i % Pack<double>::kPartLanes] = v[i];
#endif
  return r;
}
FASTNORM_INLINE Pack<double> widen_upper(Pack<float> v) {
  Pack<double> r;
#if defined(__AVX512F__)
  r.part[0] = _mm512_cvtps_pd(_mm512_castps512_ps256(_mm512_shuffle_f32x4(v.part[0], v.part[0], 0x4e)));
#else
  for (int i = 0; i < 8; ++i) r.part[i / Pack<double>::kPartLanes][i % Pack<double>::kPartLanes] = v[i + 8];
#endif
  return r;
}

// The sum of a pack's halves, lane by lane: the step from float sums to double ones.
FASTNORM_INLINE Pack<double> widen_halves(Pack<float> v) { return widen_lower(v) + widen_upper(v); }
FASTNORM_INLINE Pack<double> widen_halves(Pack<double> v) { return v; }

// All of a double pack is its lower half.
FASTNORM_INLINE Pack<double> widen_lower(Pack<double> v) { return v; }

// total + d (x - mean), in double from the difference on.
FASTNORM_INLINE Pack<double> widen_dot(Pack<float> d, Pack<float> x, Pack<double> mean, Pack<double> total) {
  return fma(widen_lower(d), widen_lower(x) - mean, total) + widen_upper(d) * (widen_upper(x) - mean);
}
FASTNORM_INLINE Pack<double> widen_dot(Pack<double> d, Pack<double> x, Pack<double> mean, Pack<double> total) {
  return fma(d, x - mean, total);
}

// The sum of the lanes, always in the same order: halves, quarters, the last two.
FASTNORM_INLINE double sum_lanes(Pack<double> v) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
  const __m256d half = _mm512_castpd512_pd256(v.part[0]) + _mm512_extractf64x4_pd(v.part[0], 1);
#else
  const __m256d half = v.part[0] + v.part[1];
#endif
  const __m128d quarter = _mm256_castpd256_pd128(half) + _mm256_extractf128_pd(half, 1);
  return quarter[0] + quarter[1];
#else
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
#endif
}
template <class A>
FASTNORM_INLINE double sum_lanes(Pack<A> v) {
  return sum_lanes(widen_halves(v));
}

}  // namespace fastnorm::FASTNORM_CPU_CAPABILITY
