// Masks of lanes: of the elements that exist, and of one bit per element in memory, in the elements' order.
#pragma once

#include <array>

#include "load_store.h"

namespace fastnorm::FASTNORM_CPU_CAPABILITY {

// For every lane the number of its element.
template <class T>
constexpr auto make_elements() {
  std::array<Bits<Accum<T>>, kLanes<Accum<T>>> r{};
  for (size_t i = 0; i < r.size(); ++i) r[lane_of<T>(i)] = static_cast<Bits<Accum<T>>>(i);
  return r;
}
template <class T>
alignas(kPackBytes) constexpr auto kElementOfLane = make_elements<T>();

template <class T>
FASTNORM_INLINE Mask<Accum<T>> elements_of_lanes() {
  Mask<Accum<T>> r;
  std::memcpy(&r, kElementOfLane<T>.data(), sizeof r);
  return r;
}

// The mask of the lanes of the first n elements.
template <class T>
FASTNORM_INLINE Mask<Accum<T>> first_elements(int64_t n) {
  Mask<Accum<T>> r = elements_of_lanes<T>();
  for_each_index<kParts>([&](auto k) FASTNORM_LAMBDA { r.part[k] = r.part[k] < static_cast<Bits<Accum<T>>>(n); });
  return r;
}

// The bits of n elements take whole bytes: those of 16 floats, or of 8 doubles.
template <class A>
FASTNORM_INLINE int64_t bytes_of_mask(int64_t n) {
  constexpr int64_t kUnit = sizeof(A) == 4 ? 16 : 8;
  return (n + kUnit - 1) / kUnit * kUnit / 8;
}
template <class A>
constexpr int64_t kMaskBytes = kLanes<A> / 8;

template <class T>
FASTNORM_INLINE void store_mask(uint8_t* p, Mask<Accum<T>> m, int64_t n = kLanes<Accum<T>>) {
  uint32_t bits = 0;
  if constexpr (std::is_same_v<T, BFloat16>) {
    // Words of 16 bits, in the elements' order.
    for_each_index<kParts / 2>([&](auto k) FASTNORM_LAMBDA {
      const WidePart words = ((WidePart)m.part[k] & 0xffff) | ((WidePart)m.part[k + kParts / 2] & 0xffff0000);
#if defined(__AVX512F__)
      bits = _mm512_movepi16_mask((__m512i)words);
#elif defined(__AVX2__)
      const __m128i bytes =
          _mm_packs_epi16(_mm256_castsi256_si128((__m256i)words), _mm256_extracti128_si256((__m256i)words, 1));
      bits |= static_cast<uint32_t>(_mm_movemask_epi8(bytes)) << 16 * k;
#else
      for (int i = 0; i < kVectorBytes / 4; ++i) {
        bits |= ((words[i] & 1) | (words[i] >> 16 & 1) << 1) << (kVectorBytes / 2 * k + 2 * i);
      }
#endif
    });
  } else {
    for_each_index<kParts>([&](auto k) FASTNORM_LAMBDA {
      constexpr int kPartLanes = Pack<Accum<T>>::kPartLanes;
      uint32_t part = 0;
#if defined(__AVX512F__)
      if constexpr (kPartLanes == 16) part = _mm512_movepi32_mask((__m512i)m.part[k]);
      if constexpr (kPartLanes == 8) part = _mm512_movepi64_mask((__m512i)m.part[k]);
#elif defined(__AVX2__)
      if constexpr (kPartLanes == 8) part = static_cast<uint32_t>(_mm256_movemask_ps((__m256)m.part[k]));
      if constexpr (kPartLanes == 4) part = static_cast<uint32_t>(_mm256_movemask_pd((__m256d)m.part[k]));
#else
      for (int i = 0; i < kPartLanes; ++i) part |= (m.part[k][i] & 1u) << i;
#endif
      bits |= part << k * kPartLanes;
    });
  }
  std::memcpy(p, &bits, bytes_of_mask<Accum<T>>(n));  // little-endian, as every machine torch runs on
}

template <class T>
FASTNORM_INLINE Mask<Accum<T>> load_mask(const uint8_t* p, int64_t n = kLanes<Accum<T>>) {
  using A = Accum<T>;
  uint32_t bits = 0;
  std::memcpy(&bits, p, bytes_of_mask<A>(n));
  Mask<A> m;
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, BFloat16>) {
    const WidePart words = (WidePart)_mm512_movm_epi16(bits);
    m.part[0] = (Vector<int32_t, 64>)(words << 16) >> 16;
    m.part[1] = (Vector<int32_t, 64>)words >> 16;
    return m;
  }
  for_each_index<kParts>([&](auto k) FASTNORM_LAMBDA {
    if constexpr (sizeof(A) == 4) {
      m.part[k] = (Vector<int32_t, 64>)_mm512_movm_epi32(static_cast<__mmask16>(bits >> 16 * k));
    } else {
      m.part[k] = (Vector<int64_t, 64>)_mm512_movm_epi64(static_cast<__mmask8>(bits >> 8 * k));
    }
  });
#else
  m = elements_of_lanes<T>();
  using Part = Vector<Bits<A>, kVectorBytes>;
  for_each_index<kParts>([&](auto k) FASTNORM_LAMBDA {
    const Part bit = (Part{} + 1) << m.part[k];
    m.part[k] = ((Part{} + static_cast<Bits<A>>(bits)) & bit) == bit;
  });
#endif
  return m;
}

}  // namespace fastnorm::FASTNORM_CPU_CAPABILITY
