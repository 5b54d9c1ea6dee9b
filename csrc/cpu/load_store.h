// Loads and stores of packs: conversion of half precision, partial packs, stores past the cache.
//
// A pack of bfloat16 has the even elements of its line in its lower lanes and the odd ones in the upper: a shift and a
// mask make floats of 32 elements, where an order that is that of memory takes six instructions. Everything that meets
// the elements of such a pack lane by lane (coefficients of channels, sums of weights' gradients) is in the order of
// lanes, too; lane_of says which lane has which element.
#pragma once

#include <algorithm>
#include <array>

#include "pack.h"

namespace fastnorm::FASTNORM_CPU_CAPABILITY {

template <class A>
constexpr int64_t kLanes = Pack<A>::kLanes;

// The place of element i in an array in the order of lanes that begins with a whole pack.
template <class T>
constexpr int64_t lane_of(int64_t i) {
  if constexpr (!std::is_same_v<T, BFloat16>) return i;
  return i / 32 * 32 + i % 2 * 16 + i % 32 / 2;
}

// A pack of numbers from the order of elements to that of lanes, and back.
template <class T, class A>
FASTNORM_INLINE void to_lanes(const A* elements, A* lanes) {
  constexpr int64_t L = kLanes<A>, kStep = std::is_same_v<T, BFloat16> ? 2 : 1;
  for (int64_t i = 0; i < L / kStep; ++i) lanes[i] = elements[i * kStep];
  for (int64_t i = 0; i < L / kStep && kStep > 1; ++i) lanes[L / kStep + i] = elements[i * kStep + 1];
}
template <class T, class A>
FASTNORM_INLINE void from_lanes(const A* lanes, A* elements) {
  constexpr int64_t L = kLanes<A>, kStep = std::is_same_v<T, BFloat16> ? 2 : 1;
  for (int64_t i = 0; i < L / kStep; ++i) {
    elements[i * kStep] = lanes[i];
    if constexpr (kStep > 1) elements[i * kStep + 1] = lanes[L / kStep + i];
  }
}

// ---- conversion of one part of a pack to storage type T and back ----

using FloatPart = Vector<float, kVectorBytes>;
using WidePart = Vector<uint32_t, kVectorBytes>;

// Two parts, those of the even and of the odd elements, to the bits of a line in memory, rounded to nearest even. On
// all 16-bit words at once: a word is rounded up where what is cut off, plus one if the word is odd, is more than a
// half. A NaN keeps its upper bits, so its lower ones have to be zeros: those of a bfloat16's and of the processor's
// own NaN are, and read_params sees to those of parameters.
FASTNORM_INLINE WidePart join_bfloat16(FloatPart even, FloatPart odd) {
  const WidePart a = (WidePart)even, b = (WidePart)odd;
#if defined(__AVX2__)
  const WidePart upper = (a >> 16) | (b & 0xffff0000), lower = (a & 0xffff) | (b << 16);
#endif
#if defined(__AVX512F__)
  const __m512i word = (__m512i)upper, one = _mm512_set1_epi16(1);
  const __m512i cut = _mm512_adds_epu16((__m512i)lower, _mm512_and_si512(word, one));
  const __mmask32 up = _mm512_cmpgt_epu16_mask(cut, _mm512_set1_epi16(static_cast<int16_t>(0x8000)));
  return (WidePart)_mm512_mask_add_epi16(word, up, word, one);
#elif defined(__AVX2__)
  const __m256i word = (__m256i)upper, one = _mm256_set1_epi16(1);
  const __m256i cut = _mm256_adds_epu16((__m256i)lower, _mm256_and_si256(word, one));
  const __m256i excess = _mm256_subs_epu16(cut, _mm256_set1_epi16(static_cast<int16_t>(0x8000)));
  return (WidePart)_mm256_add_epi16(word, _mm256_min_epu16(excess, one));
#else
  const auto rounded = [](WidePart u) { return (u + 0x7fff + (u >> 16 & 1)) & 0xffff0000; };
  const WidePart lower = (even == even ? rounded(a) : a) >> 16;
  return lower | (odd == odd ? rounded(b) : b & 0xffff0000);
#endif
}

// The bits of kPartLanes float16 numbers.
using HalfPart = Vector<uint16_t, kVectorBytes / 2>;

FASTNORM_INLINE FloatPart from_float16(HalfPart h) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps((__m256i)h);
#elif defined(__AVX2__)
  return _mm256_cvtph_ps((__m128i)h);
#else
  // It is exact to shift exponent and mantissa into place and to scale by 2^112, for subnormals too.
  const WidePart wide = __builtin_convertvector(h, WidePart);
  const WidePart finite = (WidePart)((FloatPart)((wide & 0x7fff) << 13) * 0x1p112f);
  const WidePart magnitude = (wide & 0x7c00) == 0x7c00 ? (finite | 0x7f800000) : finite;  // Inf and NaN
  return (FloatPart)(magnitude | (wide & 0x8000) << 16);
#endif
}
FASTNORM_INLINE HalfPart to_float16(FloatPart v) {  // to nearest even
#if defined(__AVX512F__)
  return (HalfPart)_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__AVX2__)
  return (HalfPart)_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
#else
  const WidePart u = (WidePart)v & 0x7fffffff;
  const WidePart normal = (u + 0xfff + (u >> 13 & 1)) >> 13;
  const WidePart subnormal = (WidePart)((FloatPart)u + 0.5f) - 0x3f000000;  // the adder rounds at 2^-24
  WidePart half = u < 0x38800000 ? subnormal : normal - (112 << 10);
  half = u >= 0x477ff000 ? WidePart{} + 0x7c00 : half;  // rounds to Inf
  half = u > 0x7f800000 ? WidePart{} + 0x7e00 : half;   // NaN
  return __builtin_convertvector(half | ((WidePart)v >> 16 & 0x8000), HalfPart);
#endif
}

// ---- the lines of a pack in memory ----

// What a pack of T is in memory: as many vectors as the pack has parts, of half the size for float16, half as many for
// bfloat16.
template <class T>
struct Lines {
  using Line =
      std::conditional_t<std::is_same_v<T, Float16>, HalfPart,
                         std::conditional_t<std::is_same_v<T, BFloat16>, WidePart, typename Pack<Accum<T>>::Part>>;
  static constexpr int kCount = std::is_same_v<T, BFloat16> ? kParts / 2 : kParts;
  static constexpr int kElements = sizeof(Line) / sizeof(T);
  Line line[kCount];

  FASTNORM_INLINE Pack<Accum<T>> unpack() const {
    Pack<Accum<T>> r;
    for_each_index<kCount>([&](auto k) FASTNORM_LAMBDA {
      if constexpr (std::is_same_v<T, BFloat16>) {
        r.part[k] = (FloatPart)(line[k] << 16);
        r.part[k + kCount] = (FloatPart)(line[k] & 0xffff0000);
      } else if constexpr (std::is_same_v<T, Float16>) {
        r.part[k] = from_float16(line[k]);
      } else {
        r.part[k] = line[k];
      }
    });
    return r;
  }
  FASTNORM_INLINE explicit Lines(Pack<Accum<T>> v) {
    for_each_index<kCount>([&](auto k) FASTNORM_LAMBDA {
      if constexpr (std::is_same_v<T, BFloat16>) {
        line[k] = join_bfloat16(v.part[k], v.part[k + kCount]);
      } else if constexpr (std::is_same_v<T, Float16>) {
        line[k] = to_float16(v.part[k]);
      } else {
        line[k] = v.part[k];
      }
    });
  }
  Lines() = default;
};

template <class T>
FASTNORM_INLINE Pack<Accum<T>> load(const T* p) {
  Lines<T> lines;  // line by line: GCC would copy an array by way of the stack
  for_each_index<Lines<T>::kCount>(
      [&](auto k) FASTNORM_LAMBDA { std::memcpy(&lines.line[k], p + k * Lines<T>::kElements, sizeof lines.line[k]); });
  return lines.unpack();
}

template <class T>
FASTNORM_INLINE void store(T* p, Pack<Accum<T>> v) {
  const Lines<T> lines(v);
  for_each_index<Lines<T>::kCount>(
      [&](auto k) FASTNORM_LAMBDA { std::memcpy(p + k * Lines<T>::kElements, &lines.line[k], sizeof lines.line[k]); });
}

// Asks for the memory of a pack.
template <class T>
FASTNORM_INLINE void prefetch(const T* p) {
  for (size_t byte = 0; byte < kLanes<Accum<T>> * sizeof(T); byte += 64) {
    __builtin_prefetch(reinterpret_cast<const char*>(p) + byte, 0, 2);
  }
}

// Stores without reading the line into the cache first. can_stream(p) must hold.
template <class T>
FASTNORM_INLINE void store_past_cache(T* p, Pack<Accum<T>> v) {
  const Lines<T> lines(v);
  for_each_index<Lines<T>::kCount>([&](auto k) FASTNORM_LAMBDA {
    [[maybe_unused]] T* const at = p + k * Lines<T>::kElements;
#if defined(__AVX512F__)
    if constexpr (sizeof lines.line[k] == 64) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(at), (__m512i)lines.line[k]);
    } else {
      _mm256_stream_si256(reinterpret_cast<__m256i*>(at), (__m256i)lines.line[k]);
    }
#elif defined(__AVX2__)
    if constexpr (sizeof lines.line[k] == 32) {
      _mm256_stream_si256(reinterpret_cast<__m256i*>(at), (__m256i)lines.line[k]);
    } else {
      _mm_stream_si128(reinterpret_cast<__m128i*>(at), (__m128i)lines.line[k]);
    }
#else
    std::memcpy(at, &lines.line[k], sizeof lines.line[k]);
#endif
  });
}

// Whether packs from p on are aligned for store_past_cache. A null p is.
template <class T>
FASTNORM_INLINE bool can_stream(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % 64 == 0;
}

// The elements at p, of n, that lie before the first line.
template <class T>
FASTNORM_INLINE int64_t elements_to_line(const T* p, int64_t n) {
  constexpr int64_t kLine = 64 / sizeof(T);
  return std::min(n, -static_cast<int64_t>(reinterpret_cast<uintptr_t>(p) / sizeof(T)) & (kLine - 1));
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
  if constexpr (sizeof(T) == 2) return Lines<T>(v).unpack();
  return v;
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// AVX2 has no masked accesses of 16 bits, and processors of AMD take 12 cycles and more for its masked stores. Calls of
// memcpy took longer than the rest of a short run.

constexpr int kPackWords = kPackBytes / 4;
// Of the words of 32 bits of a pack's line k: ones in those that are among the first `words` of the pack.
template <class Line>
FASTNORM_INLINE Vector<int32_t, sizeof(Line)> first_words(int64_t words, int k) {
  static constexpr auto kOnesAndZeros = [] {
    std::array<int32_t, 2 * kPackWords> r{};
    for (int i = 0; i < kPackWords; ++i) r[i] = -1;
    return r;
  }();
  Vector<int32_t, sizeof(Line)> r;
  std::memcpy(&r, kOnesAndZeros.data() + kPackWords - words + k * sizeof r / 4, sizeof r);
  return r;
}

// Stores the first `bytes` of a line, fewer than all.
template <bool kHalves>
FASTNORM_INLINE void store_pieces(char* to, __m128i v, int64_t bytes) {
  if (bytes & 8) {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), v);
    v = _mm_srli_si128(v, 8);
    to += 8;
  }
  if (bytes & 4) {
    _mm_storeu_si32(to, v);
    v = _mm_srli_si128(v, 4);
    to += 4;
  }
  if (kHalves && (bytes & 2)) _mm_storeu_si16(to, v);
}
template <bool kHalves>
FASTNORM_INLINE void store_pieces(char* to, __m256i v, int64_t bytes) {
  __m128i rest = _mm256_castsi256_si128(v);
  if (bytes & 16) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), rest);
    rest = _mm256_extracti128_si256(v, 1);
    to += 16;
  }
  store_pieces<kHalves>(to, rest, bytes);
}
// Out of line for 16-bit types: inlined, it took registers from the loops before it.
__attribute__((noinline)) inline void store_halves(char* to, __m128i v, int64_t bytes) {
  store_pieces<true>(to, v, bytes);
}
__attribute__((noinline)) inline void store_halves(char* to, __m256i v, int64_t bytes) {
  store_pieces<true>(to, v, bytes);
}
#endif

// The first n elements, 0 < n <= kLanes. Lanes of others are zero, and their memory is not touched.
template <class T>
FASTNORM_INLINE Pack<Accum<T>> load_first(const T* p, int64_t n) {
  Lines<T> lines;
#if defined(__AVX512F__)
  const uint64_t mask = (uint64_t(1) << n) - 1;
  for_each_index<Lines<T>::kCount>([&](auto k) FASTNORM_LAMBDA {
    const uint64_t m = mask >> k * Lines<T>::kElements;
    const T* at = p + k * Lines<T>::kElements;
    if constexpr (sizeof(T) == 8) lines.line[k] = _mm512_maskz_loadu_pd(static_cast<__mmask8>(m), at);
    if constexpr (sizeof(T) == 4) lines.line[k] = _mm512_maskz_loadu_ps(static_cast<__mmask16>(m), at);
    if constexpr (std::is_same_v<T, BFloat16>) {
      lines.line[k] = (WidePart)_mm512_maskz_loadu_epi16(static_cast<__mmask32>(m), at);
    }
    if constexpr (std::is_same_v<T, Float16>) {
      lines.line[k] = (HalfPart)_mm256_maskz_loadu_epi16(static_cast<__mmask16>(m), at);
    }
  });
#elif defined(__AVX2__)
  const int64_t words = n * static_cast<int64_t>(sizeof(T)) / 4;
  for_each_index<Lines<T>::kCount>([&](auto k) FASTNORM_LAMBDA {
    using Line = typename Lines<T>::Line;
    const int* at = reinterpret_cast<const int*>(p + k * Lines<T>::kElements);
    if constexpr (sizeof(Line) == 32) {
      lines.line[k] = (Line)_mm256_maskload_epi32(at, (__m256i)first_words<Line>(words, k));
    } else {
      lines.line[k] = (Line)_mm_maskload_epi32(at, (__m128i)first_words<Line>(words, k));
    }
  });
  if constexpr (sizeof(T) == 2) {
    if (n % 2 == 0) return lines.unpack();
    const int last = p[n - 1].bits;  // half a word
    for_each_index<Lines<T>::kCount>([&](auto k) FASTNORM_LAMBDA {
      using Line = typename Lines<T>::Line;
      const auto place = first_words<Line>(words + 1, k) ^ first_words<Line>(words, k);
      lines.line[k] |= (Line)(place & last);
    });
  }
#else
  std::memset(lines.line, 0, sizeof lines.line);
  std::memcpy(lines.line, p, n * sizeof(T));
#endif
  return lines.unpack();
}

template <class T>
FASTNORM_INLINE void store_first(T* p, Pack<Accum<T>> v, int64_t n) {
  const Lines<T> lines(v);
#if defined(__AVX512F__)
  const uint64_t mask = (uint64_t(1) << n) - 1;
  for_each_index<Lines<T>::kCount>([&](auto k) FASTNORM_LAMBDA {
    const uint64_t m = mask >> k * Lines<T>::kElements;
    T* at = p + k * Lines<T>::kElements;
    if constexpr (sizeof(T) == 8) _mm512_mask_storeu_pd(at, static_cast<__mmask8>(m), lines.line[k]);
    if constexpr (sizeof(T) == 4) _mm512_mask_storeu_ps(at, static_cast<__mmask16>(m), lines.line[k]);
    if constexpr (std::is_same_v<T, BFloat16>) {
      _mm512_mask_storeu_epi16(at, static_cast<__mmask32>(m), (__m512i)lines.line[k]);
    }
    if constexpr (std::is_same_v<T, Float16>)
      _mm256_mask_storeu_epi16(at, static_cast<__mmask16>(m), (__m256i)lines.line[k]);
  });
#elif defined(__AVX2__)
  for_each_index<Lines<T>::kCount>([&](auto k) FASTNORM_LAMBDA {
    constexpr int64_t kBytes = sizeof lines.line[k];
    char* const to = reinterpret_cast<char*>(p) + k * kBytes;
    const int64_t left = n * static_cast<int64_t>(sizeof(T)) - k * kBytes;
    if (left >= kBytes) {
      std::memcpy(to, &lines.line[k], kBytes);
    } else if (left > 0) {
      if constexpr (sizeof(T) > 2) store_pieces<false>(to, (__m256i)lines.line[k], left);
      if constexpr (std::is_same_v<T, BFloat16>) store_halves(to, (__m256i)lines.line[k], left);
      if constexpr (std::is_same_v<T, Float16>) store_halves(to, (__m128i)lines.line[k], left);
    }
  });
#else
  std::memcpy(p, lines.line, n * sizeof(T));
#endif
}

}  // namespace fastnorm::FASTNORM_CPU_CAPABILITY
