// bfloat16 and float16 as a GPU converts them: rounded to nearest, ties to even; every NaN narrows to 0x7fff.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/dtype.h"

namespace fastnorm::emulator {

inline uint32_t bits_of(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  return bits;
}
inline float float_of(uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

constexpr uint32_t kSignBit = 0x80000000u, kInfinity = 0x7f800000u;
constexpr uint16_t kNarrowNan = 0x7fff;

inline float widen(BFloat16 v) { return float_of(static_cast<uint32_t>(v.bits) << 16); }

inline BFloat16 narrow_bfloat16(float v) {
  const uint32_t bits = bits_of(v);
  if ((bits & ~kSignBit) > kInfinity) return {kNarrowNan};
  const uint32_t odd = bits >> 16 & 1;
  return {static_cast<uint16_t>((bits + 0x7fff + odd) >> 16)};
}

inline float widen(Float16 v) {
  constexpr uint32_t kExponent = 0x1f << 23, kBias = (127 - 15) << 23;
  const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000) << 16, shifted = (v.bits & 0x7fffu) << 13;
  const uint32_t exponent = shifted & kExponent;
  if (exponent == kExponent) return float_of(sign | (shifted + 2 * kBias));  // infinity, NaN
  if (exponent != 0) return float_of(sign | (shifted + kBias));
  const float leading = float_of(kBias + (1u << 23));  // denormal: put a leading bit before it, take it off again
  return float_of(sign | bits_of(float_of(shifted + kBias + (1u << 23)) - leading));
}

inline Float16 narrow_float16(float v) {
  constexpr uint32_t kTooLarge = (127 + 16) << 23, kLeastNormal = (127 - 14) << 23, kBias = (127 - 15) << 23;
  constexpr uint32_t kLastPlace = (127 - 1) << 23;  // 0.5, whose last place is that of a denormal float16
  const uint32_t bits = bits_of(v), sign = bits >> 16 & 0x8000, magnitude = bits & ~kSignBit;
  uint32_t out;
  if (magnitude > kInfinity) {
    return {kNarrowNan};
  } else if (magnitude >= kTooLarge) {
    out = 0x7c00;
  } else if (magnitude < kLeastNormal) {
    out = bits_of(float_of(magnitude) + float_of(kLastPlace)) - kLastPlace;  // the addition rounds
  } else {
    out = (magnitude - kBias + 0xfff + (magnitude >> 13 & 1)) >> 13;
  }
  return {static_cast<uint16_t>(sign | out)};
}

}  // namespace fastnorm::emulator
