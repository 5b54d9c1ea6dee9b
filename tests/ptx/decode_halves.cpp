// Arithmetic of float16 and bfloat16, one or two numbers to a register. Results are rounded once, from the exact ones.
#include <cmath>
#include <type_traits>

#include "convert.h"
#include "decoding.h"
#include "lanes.h"
#include "rounding.h"

namespace fastnorm::ptx {

namespace {

using enum Type;
using emulator::widen;

BFloat16 narrowed(double v, BFloat16) { return to_bfloat16(v); }
Float16 narrowed(double v, Float16) { return to_float16(v); }

// a + b, or where that is not a double, a neighbour that is odd: rounding it again gives what rounding a + b gives.
double odd_sum(double a, double b) {
  const double sum = a + b;
  if (!std::isfinite(sum)) return sum;
  const double of_b = sum - a, rest = (a - (sum - of_b)) + (b - of_b);
  if (rest == 0 || (bits_of(sum) & 1) != 0) return sum;
  return std::nextafter(sum, rest > 0 ? INFINITY : -INFINITY);
}

struct Add {
  static double of(double a, double b) { return odd_sum(a, b); }
};
struct Sub {
  static double of(double a, double b) { return odd_sum(a, -b); }
};
struct Mul {
  static double of(double a, double b) { return a * b; }
};
struct Fma {
  static double of(double a, double b, double c) { return odd_sum(a * b, c); }
};
template <bool kMax, bool kNan>
struct Extreme {
  static double of(double a, double b) {
    if (std::isnan(a) || std::isnan(b)) return kNan || (std::isnan(a) && std::isnan(b)) ? NAN : std::isnan(a) ? b : a;
    if (a == b) return std::signbit(a) == kMax ? b : a;
    return (a > b) == kMax ? a : b;
  }
};

template <class H>
H flushed_half(H v) {
  constexpr uint16_t kExponent = std::is_same_v<H, BFloat16> ? 0x7f80 : 0x7c00;
  if ((v.bits & kExponent) == 0) v.bits &= 0x8000;
  return v;
}

enum class After { kNothing, kSaturate, kRelu };

template <class F, bool kFlush, After kAfter>
struct OnHalf {
  template <class H, class... Hs>
  static H of(H first, Hs... rest) {
    if (kFlush)
      return flushed_half(narrow<H>(F::of(double(widen(flushed_half(first))), double(widen(flushed_half(rest)))...)));
    return narrow<H>(F::of(double(widen(first)), double(widen(rest))...));
  }
  template <class H, class... Ps>
  static Pair<H> of(Pair<H> first, Ps... rest) {
    return {of(first.low, rest.low...), of(first.high, rest.high...)};
  }

 private:
  template <class H>
  static H narrow(double v) {
    if (kAfter == After::kSaturate) v = saturated(v);
    if (kAfter == After::kRelu && v <= 0) v = 0;  // NaN stays
    return narrowed(v, H{});
  }
};

template <class F, bool kFlush, After kAfter, class H, class... Same>
Execute lanes_of(H, Same...) {
  return lanewise<OnHalf<F, kFlush, kAfter>, H, H, Same...>;
}
template <class F, class H, class... Same>
Execute modified(Decoding& d) {
  const bool flush = d.take("ftz");
  const std::string_view after = d.take_one_of({"sat", "relu"});
  if (after == "sat")
    return flush ? lanes_of<F, true, After::kSaturate>(H{}, Same{}...)
                 : lanes_of<F, false, After::kSaturate>(H{}, Same{}...);
  if (after == "relu")
    return flush ? lanes_of<F, true, After::kRelu>(H{}, Same{}...) : lanes_of<F, false, After::kRelu>(H{}, Same{}...);
  return flush ? lanes_of<F, true, After::kNothing>(H{}, Same{}...)
               : lanes_of<F, false, After::kNothing>(H{}, Same{}...);
}

Type take_half(Decoding& d) { return d.take_type_of({kF16, kBF16, kF16x2, kBF16x2}); }

template <class F>
void binary(Decoding& d) {
  const Type type = take_half(d);
  d.take("rn");
  d.i.run = type == kF16     ? modified<F, Float16, Float16>(d)
            : type == kBF16  ? modified<F, BFloat16, BFloat16>(d)
            : type == kF16x2 ? modified<F, Pair<Float16>, Pair<Float16>>(d)
                             : modified<F, Pair<BFloat16>, Pair<BFloat16>>(d);
  d.usual(type, {type, type});
}
template <class F>
void ternary(Decoding& d) {
  const Type type = take_half(d);
  d.take("rn");
  d.i.run = type == kF16     ? modified<F, Float16, Float16, Float16>(d)
            : type == kBF16  ? modified<F, BFloat16, BFloat16, BFloat16>(d)
            : type == kF16x2 ? modified<F, Pair<Float16>, Pair<Float16>, Pair<Float16>>(d)
                             : modified<F, Pair<BFloat16>, Pair<BFloat16>, Pair<BFloat16>>(d);
  d.usual(type, {type, type, type});
}
template <bool kMax>
void extreme(Decoding& d) {
  d.take("NaN") ? binary<Extreme<kMax, true>>(d) : binary<Extreme<kMax, false>>(d);
}

// The sign of every number, in its bits.
template <uint32_t kKept, uint32_t kTurned>
struct Signs {
  static uint32_t of(uint32_t a) { return (a & kKept) ^ kTurned; }
};
template <uint32_t kKept, uint32_t kTurned>
void sign(Decoding& d) {
  const Type type = take_half(d);
  d.i.run = bytes_of(type) == 2 ? lanewise<Signs<kKept & 0xffff, kTurned & 0xffff>, uint32_t, uint32_t>
                                : lanewise<Signs<kKept, kTurned>, uint32_t, uint32_t>;
  d.usual(type, {type});
}

}  // namespace

void add_halves(Decoders& decoders) {
  decoders["add"] = binary<Add>;
  decoders["sub"] = binary<Sub>;
  decoders["mul"] = binary<Mul>;
  decoders["fma"] = ternary<Fma>;
  decoders["min"] = extreme<false>;
  decoders["max"] = extreme<true>;
  decoders["neg"] = sign<0xffffffffu, 0x80008000u>;
  decoders["abs"] = sign<0x7fff7fffu, 0>;
}

}  // namespace fastnorm::ptx
