// Pack<A>: 64 bytes of lanes (16 floats or 8 doubles) on any machine: one AVX-512 register, two AVX2, four of 16 bytes
// elsewhere. The lane count is part of the numerics: sums are folded lane by lane, so every instruction set with fused
// multiply-add gives the same bits. Compiled once per instruction set; FASTNORM_CPU_CAPABILITY names the namespace.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__AVX2__) || defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif

#include "../dtype.h"

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 takes the deliberately undefined registers inside its own AVX-512 intrinsics for a mistake of ours.
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

// The integer of a lane's width: masks and bit tricks.
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

// r.part[k] = expr for every part k.
#define FASTNORM_PARTWISE(Result, r, expr)           \
  Result r;                                          \
  for (int k = 0; k < kParts; ++k) r.part[k] = expr; \
  return r

template <class A>
FASTNORM_INLINE Pack<A> operator+(Pack<A> a, Pack<A> b) {
  FASTNORM_PARTWISE(Pack<A>, r, a.part[k] + b.part[k]);
}
template <class A>
FASTNORM_INLINE Pack<A> operator-(Pack<A> a, Pack<A> b) {
  FASTNORM_PARTWISE(Pack<A>, r, a.part[k] - b.part[k]);
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

template <class A>
FASTNORM_INLINE Mask<A> bits_of(Pack<A> a) {
  FASTNORM_PARTWISE(Mask<A>, r, (typename Pack<A>::BitsPart)a.part[k]);
}
template <class A>
FASTNORM_INLINE Pack<A> from_bits(Mask<A> a) {
  FASTNORM_PARTWISE(Pack<A>, r, (typename Pack<A>::Part)a.part[k]);
}

// 0, 1, 2 ... as integers of a lane's width.
alignas(kPackBytes) constexpr int32_t kIota32[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
alignas(kPackBytes) constexpr int64_t kIota64[8] = {0, 1, 2, 3, 4, 5, 6, 7};

// Mask of the first n lanes.
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

// ---- conversion: one part of A as storage type T and back ----

// kPartLanes half-precision numbers, as their bits.
#if defined(__AVX512F__)
using HalfPart = __m256i;
#elif defined(__AVX2__)
using HalfPart = __m128i;
#else
using HalfPart = Vector<uint16_t, kVectorBytes / 2>;
#endif
using FloatPart = Vector<float, kVectorBytes>;
using WidePart = Vector<uint32_t, kVectorBytes>;

FASTNORM_INLINE WidePart zero_extend(HalfPart h) {
#if defined(__AVX512F__)
  return (WidePart)_mm512_cvtepu16_epi32(h);
#elif defined(__AVX2__)
  return (WidePart)_mm256_cvtepu16_epi32(h);
#else
  return __builtin_convertvector(h, WidePart);
#endif
}
FASTNORM_INLINE HalfPart low_halves(WidePart w) {
#if defined(__AVX512F__)
  return _mm512_cvtepi32_epi16((__m512i)w);
#elif defined(__AVX2__)
  return _mm_packus_epi32(_mm256_castsi256_si128((__m256i)w), _mm256_extracti128_si256((__m256i)w, 1));
#else
  return __builtin_convertvector(w, HalfPart);
#endif
}

FASTNORM_INLINE FloatPart to_float(Tag<BFloat16>, HalfPart h) { return (FloatPart)(zero_extend(h) << 16); }
FASTNORM_INLINE HalfPart from_float(Tag<BFloat16>, FloatPart v) {
  const WidePart u = (WidePart)v;
  const WidePart rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16;  // to nearest even
  return low_halves(v == v ? rounded : WidePart{} + 0x7fc0);
}

FASTNORM_INLINE FloatPart to_float(Tag<Float16>, HalfPart h) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(h);
#elif defined(__F16C__)
  return _mm256_cvtph_ps(h);
#else
  // Shifting exponent and mantissa into place and scaling by 2^112 is exact, subnormals included.
  const WidePart wide = zero_extend(h);
  const WidePart finite = (WidePart)((FloatPart)((wide & 0x7fff) << 13) * 0x1p112f);
  const WidePart magnitude = (wide & 0x7c00) == 0x7c00 ? (finite | 0x7f800000) : finite;  // Inf and NaN
  return (FloatPart)(magnitude | (wide & 0x8000) << 16);
#endif
}
FASTNORM_INLINE HalfPart from_float(Tag<Float16>, FloatPart v) {  // to nearest even
#if defined(__AVX512F__)
  return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
  return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
#else
  const WidePart u = (WidePart)v & 0x7fffffff;
  const WidePart normal = (u + 0xfff + (u >> 13 & 1)) >> 13;
  const WidePart subnormal = (WidePart)((FloatPart)u + 0.5f) - 0x3f000000;  // the adder rounds at 2^-24
  WidePart half = u < 0x38800000 ? subnormal : normal - (112 << 10);
  half = u >= 0x477ff000 ? WidePart{} + 0x7c00 : half;  // rounds to Inf
  half = u > 0x7f800000 ? WidePart{} + 0x7e00 : half;   // NaN
  return low_halves(half | ((WidePart)v >> 16 & 0x8000));
#endif
}

// ---- load and store ----

template <class T>
FASTNORM_INLINE Pack<Accum<T>> load(const T* p) {
  using A = Accum<T>;
  Pack<A> r;
  for (int k = 0; k < kParts; ++k) {
    const T* part = p + k * Pack<A>::kPartLanes;
    if constexpr (std::is_same_v<T, A>) {
      std::memcpy(&r.part[k], part, kVectorBytes);
    } else {
      HalfPart h;
      std::memcpy(&h, part, sizeof h);
      r.part[k] = to_float(Tag<T>{}, h);
    }
  }
  return r;
}

template <class T>
FASTNORM_INLINE void store(T* p, Pack<Accum<T>> v) {
  using A = Accum<T>;
  for (int k = 0; k < kParts; ++k) {
    T* part = p + k * Pack<A>::kPartLanes;
    if constexpr (std::is_same_v<T, A>) {
      std::memcpy(part, &v.part[k], kVectorBytes);
    } else {
      const HalfPart h = from_float(Tag<T>{}, v.part[k]);
      std::memcpy(part, &h, sizeof h);
    }
  }
}

// store() that does not read the line it writes into the cache first; p as can_stream wants it.
template <class T>
FASTNORM_INLINE void store_past_cache(T* p, Pack<Accum<T>> v) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) return _mm512_stream_ps(p, v.part[0]);
  if constexpr (std::is_same_v<T, double>) return _mm512_stream_pd(p, v.part[0]);
  if constexpr (sizeof(T) == 2)
    return _mm256_stream_si256(reinterpret_cast<__m256i*>(p), from_float(Tag<T>{}, v.part[0]));
#elif defined(__AVX2__)
  for (int k = 0; k < kParts; ++k) {
    T* part = p + k * Pack<Accum<T>>::kPartLanes;
    if constexpr (std::is_same_v<T, float>) _mm256_stream_ps(part, v.part[k]);
    if constexpr (std::is_same_v<T, double>) _mm256_stream_pd(part, v.part[k]);
    if constexpr (sizeof(T) == 2) _mm_stream_si128(reinterpret_cast<__m128i*>(part), from_float(Tag<T>{}, v.part[k]));
  }
#else
  store(p, v);
#endif
}

// Whether packs from p on are aligned for it. (A null p is.)
template <class T>
FASTNORM_INLINE bool can_stream(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % (Pack<Accum<T>>::kLanes * sizeof(T)) == 0;
}

// Streamed stores before this are seen by whoever this thread hands its work to.
FASTNORM_INLINE void finish_streaming() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// v as T can represent it.
template <class T>
FASTNORM_INLINE Pack<Accum<T>> round_to(Pack<Accum<T>> v) {
  if constexpr (sizeof(T) == 2) {
    for (int k = 0; k < kParts; ++k) v.part[k] = to_float(Tag<T>{}, from_float(Tag<T>{}, v.part[k]));
  }
  return v;
}

#if defined(__AVX512BW__) && defined(__AVX512VL__)
#define FASTNORM_MASKED_ACCESS 1
#endif

// The first n lanes, 0 < n < kLanes; lanes past n read as zero and their memory is not touched.
template <class T>
FASTNORM_INLINE Pack<Accum<T>> load_first(const T* p, int64_t n) {
#if defined(FASTNORM_MASKED_ACCESS)
  const auto lanes = static_cast<__mmask16>((1u << n) - 1);
  Pack<Accum<T>> r;
  if constexpr (std::is_same_v<T, float>) {
    r.part[0] = _mm512_maskz_loadu_ps(lanes, p);
  } else if constexpr (std::is_same_v<T, double>) {
    r.part[0] = _mm512_maskz_loadu_pd(static_cast<__mmask8>(lanes), p);
  } else {
    r.part[0] = to_float(Tag<T>{}, _mm256_maskz_loadu_epi16(lanes, p));
  }
  return r;
#else
  alignas(kPackBytes) T copy[Pack<Accum<T>>::kLanes] = {};
  for (int64_t i = 0; i < n; ++i) copy[i] = p[i];
  return load(copy);
#endif
}

template <class T>
FASTNORM_INLINE void store_first(T* p, Pack<Accum<T>> v, int64_t n) {
#if defined(FASTNORM_MASKED_ACCESS)
  const auto lanes = static_cast<__mmask16>((1u << n) - 1);
  if constexpr (std::is_same_v<T, float>) {
    _mm512_mask_storeu_ps(p, lanes, v.part[0]);
  } else if constexpr (std::is_same_v<T, double>) {
    _mm512_mask_storeu_pd(p, static_cast<__mmask8>(lanes), v.part[0]);
  } else {
    _mm256_mask_storeu_epi16(p, lanes, from_float(Tag<T>{}, v.part[0]));
  }
#else
  alignas(kPackBytes) T copy[Pack<Accum<T>>::kLanes];
  store(copy, v);
  for (int64_t i = 0; i < n; ++i) p[i] = copy[i];
#endif
}

// ---- one bit per lane ----

template <class A>
constexpr int kMaskBytes = Pack<A>::kLanes / 8;

template <class A>
FASTNORM_INLINE void store_mask(uint8_t* p, Mask<A> m) {
  uint32_t bits = 0;
#if defined(__AVX512DQ__)
  if constexpr (sizeof(A) == 4) bits = _mm512_movepi32_mask((__m512i)m.part[0]);
  if constexpr (sizeof(A) == 8) bits = _mm512_movepi64_mask((__m512i)m.part[0]);
#elif defined(__AVX2__)
  for (int k = 0; k < kParts; ++k) {
    if constexpr (sizeof(A) == 4) bits |= static_cast<uint32_t>(_mm256_movemask_ps((__m256)m.part[k])) << 8 * k;
    if constexpr (sizeof(A) == 8) bits |= static_cast<uint32_t>(_mm256_movemask_pd((__m256d)m.part[k])) << 4 * k;
  }
#else
  for (int i = 0; i < Pack<A>::kLanes; ++i) {
    bits |= (m.part[i / Pack<A>::kPartLanes][i % Pack<A>::kPartLanes] & 1u) << i;
  }
#endif
  std::memcpy(p, &bits, kMaskBytes<A>);  // little-endian, as every machine torch runs on
}

template <class A>
FASTNORM_INLINE Mask<A> load_mask(const uint8_t* p) {
  uint32_t bits = 0;
  std::memcpy(&bits, p, kMaskBytes<A>);
  Mask<A> m;
#if defined(__AVX512DQ__)
  if constexpr (sizeof(A) == 4) m.part[0] = (Vector<int32_t, 64>)_mm512_movm_epi32(static_cast<__mmask16>(bits));
  if constexpr (sizeof(A) == 8) m.part[0] = (Vector<int64_t, 64>)_mm512_movm_epi64(static_cast<__mmask8>(bits));
#else
  using Part = Vector<Bits<A>, kVectorBytes>;
  for (int k = 0; k < kParts; ++k) {
    Part lane_bit;
    for (int i = 0; i < Pack<A>::kPartLanes; ++i) lane_bit[i] = Bits<A>(1) << (k * Pack<A>::kPartLanes + i);
    m.part[k] = ((Part{} + static_cast<Bits<A>>(bits)) & lane_bit) == lane_bit;
  }
#endif
  return m;
}

// ---- widening: sums across many elements are carried in double ----

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

// A double pack is all lower half.
FASTNORM_INLINE Pack<double> widen_lower(Pack<double> v) { return v; }

// total + d (x - mean), in double from the difference on.
FASTNORM_INLINE Pack<double> widen_dot(Pack<float> d, Pack<float> x, Pack<double> mean, Pack<double> total) {
  return fma(widen_lower(d), widen_lower(x) - mean, total) + widen_upper(d) * (widen_upper(x) - mean);
}
FASTNORM_INLINE Pack<double> widen_dot(Pack<double> d, Pack<double> x, Pack<double> mean, Pack<double> total) {
  return fma(d, x - mean, total);
}

// Eight elements as doubles.
FASTNORM_INLINE Pack<double> load_wide(const double* p) { return load(p); }
FASTNORM_INLINE Pack<double> load_wide(const float* p) {
  Pack<double> r;
#if defined(__AVX512F__)
  r.part[0] = _mm512_cvtps_pd(_mm256_loadu_ps(p));
#else
  for (int i = 0; i < 8; ++i) {
    r.part[i / Pack<double>::kPartLanes][i % Pack<double>::kPartLanes] = static_cast<double>(p[i]);
  }
#endif
  return r;
}

// Sum of the lanes, always in the same order: halves, quarters, the last two.
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
