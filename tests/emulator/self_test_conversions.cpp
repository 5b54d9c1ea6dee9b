// bfloat16 and float16 against their definitions: a value is (-1)^sign * significand * 2^exponent, and narrowing takes
// the nearest value, the even one of two.
#include <cmath>
#include <limits>

#include "self_test.h"

namespace fastnorm::self_test {
namespace {

struct Format {
  int fraction_bits, exponent_bits;

  int bias() const { return (1 << (exponent_bits - 1)) - 1; }
  int infinity() const { return ((1 << exponent_bits) - 1) << fraction_bits; }  // the bits of it

  double value(int bits) const {
    const int magnitude = bits & 0x7fff, exponent = magnitude >> fraction_bits;
    const int fraction = magnitude & ((1 << fraction_bits) - 1);
    double v;
    if (magnitude > infinity()) {
      v = std::numeric_limits<double>::quiet_NaN();
    } else if (magnitude == infinity()) {
      v = std::numeric_limits<double>::infinity();
    } else if (exponent == 0) {
      v = std::ldexp(fraction, 1 - bias() - fraction_bits);
    } else {
      v = std::ldexp(fraction + (1 << fraction_bits), exponent - bias() - fraction_bits);
    }
    return bits & 0x8000 ? -v : v;
  }
};

constexpr Format kBrain{7, 8}, kHalf{10, 5};

template <class T>
T narrowed(float v) {
  T out;
  cuda::from_float(v, out);
  return out;
}

template <class T>
void check_widening(const Format& format) {
  for (int bits = 0; bits < 0x10000; ++bits) {
    const float found = cuda::to_float(T{static_cast<uint16_t>(bits)});
    const double expected = format.value(bits);
    const std::string what = "bits " + std::to_string(bits);
    check(std::isnan(found) == std::isnan(expected), what + ": one is NaN");
    if (std::isnan(expected)) continue;
    check_equal(static_cast<double>(found), expected, what);
    check(std::signbit(found) == std::signbit(expected), what + ": sign");
  }
}

// Every value narrows to itself. Between two neighbours the middle goes to the even one, and every other value to the
// nearer one. Infinity stands in the place of the next value.
template <class T>
void check_narrowing(const Format& format) {
  for (int low = 0; low < format.infinity(); ++low) {
    const double a = format.value(low);
    const double b = low + 1 < format.infinity() ? format.value(low + 1) : 2 * a - format.value(low - 1);
    const float middle = static_cast<float>((a + b) / 2);  // exact wherever float32 has bits to spare
    const int even = low % 2 == 0 ? low : low + 1;
    for (const int sign : {0, 0x8000}) {
      const float s = sign ? -1.f : 1.f;
      const std::string what = "above bits " + std::to_string(low);
      check_equal(narrowed<T>(s * static_cast<float>(a)).bits, sign | low, what + ", the value itself");
      check_equal(narrowed<T>(s * middle).bits, sign | even, what + ", the middle");
      check_equal(narrowed<T>(s * std::nextafterf(middle, 0.f)).bits, sign | low, what + ", below the middle");
      check_equal(narrowed<T>(s * std::nextafterf(middle, INFINITY)).bits, sign | (low + 1), what + ", above it");
    }
  }
  check_equal(narrowed<T>(INFINITY).bits, format.infinity(), "infinity");
  check_equal(narrowed<T>(-INFINITY).bits, format.infinity() | 0x8000, "-infinity");
  check_equal(narrowed<T>(std::numeric_limits<float>::max()).bits, format.infinity(), "the largest float32");
  for (const float nan : {NAN, -NAN}) check_equal(narrowed<T>(nan).bits, 0x7fff, "NaN");
  for (const int fraction : {1, 0x1fff, 0xffff, 0x7fffff}) {
    check_equal(narrowed<T>(emulator::float_of(0x7f800000u | static_cast<uint32_t>(fraction))).bits, 0x7fff, "a NaN");
  }
  check_equal(narrowed<T>(std::numeric_limits<float>::denorm_min()).bits, 0, "the least float32");
}

}  // namespace

std::vector<Primitive> conversions() {
  return {
      {"widen_bfloat16", [] { check_widening<BFloat16>(kBrain); }},
      {"widen_float16", [] { check_widening<Float16>(kHalf); }},
      {"narrow_bfloat16", [] { check_narrowing<BFloat16>(kBrain); }},
      {"narrow_float16", [] { check_narrowing<Float16>(kHalf); }},
  };
}

}  // namespace fastnorm::self_test
