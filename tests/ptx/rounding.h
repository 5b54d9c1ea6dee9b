// Floating point as a GPU has it: subnormal numbers flushed, NaN in one form, rounding to narrow formats.
#pragma once

#include <bit>
#include <cfenv>
#include <cmath>
#include <cstdint>
#include <limits>

#include "core/dtype.h"

namespace fastnorm::ptx {

inline uint32_t bits_of(float v) { return std::bit_cast<uint32_t>(v); }
inline uint64_t bits_of(double v) { return std::bit_cast<uint64_t>(v); }
inline float float_of(uint32_t bits) { return std::bit_cast<float>(bits); }

// Without branches, so that loops over lanes become vector instructions.
inline float flushed(float v) {
  const uint32_t bits = bits_of(v);
  return float_of((bits & 0x7f800000u) == 0 ? bits & 0x80000000u : bits);
}
// The NaN that single precision arithmetic gives.
inline float one_nan(float v) { return v != v ? float_of(0x7fffffffu) : v; }
inline double one_nan(double v) { return v; }
// To [0, 1], NaN to 0.
template <class T>
inline T saturated(T v) {
  return v > T(0) ? (v < T(1) ? v : T(1)) : T(0);
}

// A format of 16 bits: kMantissa bits behind the point, and exponents to match.
template <int kMantissa>
struct Narrow {
  static constexpr int kExponentBits = 15 - kMantissa;
  static constexpr int kBias = (1 << (kExponentBits - 1)) - 1;
  static constexpr uint16_t kInfinity = static_cast<uint16_t>(((1 << kExponentBits) - 1) << kMantissa);

  static uint16_t nearest(double v) { return rounded(v, FE_TONEAREST); }

  // mode: of <cfenv>. Every NaN becomes 0x7fff.
  static uint16_t rounded(double v, int mode) {
    const uint64_t bits = bits_of(v);
    const uint16_t sign = static_cast<uint16_t>(bits >> 48 & 0x8000);
    if (std::isnan(v)) return 0x7fff;
    if (std::isinf(v)) return sign | kInfinity;
    if (v == 0) return sign;
    int exponent = 0;
    const double fraction = std::frexp(std::fabs(v), &exponent);  // in [0.5, 1)
    const int least = 1 - kBias;                                  // of normal numbers
    const int kept = kMantissa + 1 - (exponent - 1 < least ? least - (exponent - 1) : 0);
    const double scaled = std::ldexp(fraction, kept);  // its integer part is kept
    double whole = std::floor(scaled);
    const double rest = scaled - whole;
    const bool odd = std::fmod(whole, 2) != 0;
    const bool up = mode == FE_TONEAREST  ? rest > 0.5 || (rest == 0.5 && odd)
                    : mode == FE_UPWARD   ? rest > 0 && sign == 0
                    : mode == FE_DOWNWARD ? rest > 0 && sign != 0
                                          : false;
    whole += up;
    const double result = std::ldexp(whole, exponent - kept);
    const double largest = std::ldexp(2 - std::ldexp(1, -kMantissa), kBias);
    if (result > largest) {
      const bool to_infinity =
          mode == FE_TONEAREST || (mode == FE_UPWARD && sign == 0) || (mode == FE_DOWNWARD && sign != 0);
      return sign | (to_infinity ? kInfinity : static_cast<uint16_t>(kInfinity - 1));
    }
    const int result_exponent = result == 0 ? least : std::max(std::ilogb(result), least);
    const auto units = static_cast<uint32_t>(std::ldexp(result, kMantissa - result_exponent));
    const uint32_t implied = uint32_t{1} << kMantissa;
    if (units < implied) return static_cast<uint16_t>(sign | units);  // subnormal
    return static_cast<uint16_t>(sign | static_cast<uint32_t>(result_exponent + kBias) << kMantissa |
                                 (units - implied));
  }
};
using NarrowBFloat16 = Narrow<7>;
using NarrowFloat16 = Narrow<10>;

inline BFloat16 to_bfloat16(double v, int mode = FE_TONEAREST) { return {NarrowBFloat16::rounded(v, mode)}; }
inline Float16 to_float16(double v, int mode = FE_TONEAREST) { return {NarrowFloat16::rounded(v, mode)}; }

}  // namespace fastnorm::ptx
