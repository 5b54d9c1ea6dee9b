// Loads and stores of packs: conversion of half precision, partial packs, stores past the cache, masks as bits.
#pragma once

#include "pack.h"

namespace fastnorm::FASTNORM_CPU_CAPABILITY {

// ---- conversion of one part of a pack to storage type T and back ----

// The bits of kPartLanes half-precision numbers.
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
  // It is exact to shift exponent and mantissa into place and to scale by 2^112, for subnormals too.
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

// Stores without reading the line into the cache first. can_stream(p) must hold.
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

// Whether packs from p on are aligned for store_past_cache. A null p is.
template <class T>
FASTNORM_INLINE bool can_stream(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % (Pack<Accum<T>>::kLanes * sizeof(T)) == 0;
}

// Makes this thread's streamed stores visible before its next ordinary store.
FASTNORM_INLINE void finish_streaming() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// v rounded to what T can represent.
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

// The first n lanes, 0 < n < kLanes. Lanes past n are zero, and their memory is not touched.
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

}  // namespace fastnorm::FASTNORM_CPU_CAPABILITY
