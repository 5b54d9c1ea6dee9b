// Approximate instructions. The result is the exact one, off by as much as the PTX manual allows and no more: how much
// is a function of the input's bits, so that no test depends on an approximation that is better than promised. Special
// values are those of the manual's tables.
#include <cmath>
#include <numbers>

#include "convert.h"
#include "decoding.h"
#include "lanes.h"
#include "rounding.h"

namespace fastnorm::ptx {

namespace {

using enum Type;

// In [-1, 1], from the bits.
double noise(uint64_t bits) {
  bits = (bits ^ bits >> 33) * 0xff51afd7ed558ccdu;
  bits = (bits ^ bits >> 33) * 0xc4ceb9fe1a85ec53u;
  return static_cast<double>(static_cast<int64_t>(bits ^ bits >> 33)) * 0x1p-63;
}

// No further from `exact` than so many units in the last place of a float. Rounding takes half a unit of them.
float within_ulps(double exact, double ulps, uint64_t seed) {
  const auto rounded = static_cast<float>(exact);
  if (rounded == 0 || !std::isfinite(rounded)) return rounded;
  const double ulp = std::ldexp(1.0, std::max(std::ilogb(exact), -126) - 23);
  return static_cast<float>(exact + noise(seed) * (ulps - 0.5) * ulp);
}
// No further than `error` times the exact value.
float within_relative(double exact, double error, uint64_t seed) {
  const auto rounded = static_cast<float>(exact);
  if (rounded == 0 || !std::isfinite(rounded)) return rounded;
  return static_cast<float>(exact * (1 + noise(seed) * (error - 0x1p-24)));
}

// Exact at integers: CUDA's own tanh(double) and erf(double) take their powers of 2 from here.
struct Exp2 {
  static float of(float x) {
    const double exact = std::exp2(double(x));
    return x == std::nearbyint(x) ? static_cast<float>(exact) : within_ulps(exact, 2, bits_of(x));
  }
};
struct Rcp {
  static float of(float x) { return within_ulps(1.0 / double(x), 1, bits_of(x)); }
};
struct Sqrt {
  static float of(float x) { return within_relative(std::sqrt(double(x)), 0x1p-23, bits_of(x)); }
};
struct Rsqrt {
  static float of(float x) { return within_relative(1.0 / std::sqrt(double(x)), 0x1p-22, bits_of(x)); }
};
struct Log2 {
  static float of(float x) {
    const double exact = std::log2(double(x));
    if (!std::isfinite(exact)) return static_cast<float>(exact);
    const double unit = x > 0.5f && x < 2.0f ? 1.0 : std::fabs(exact);
    return static_cast<float>(exact + noise(bits_of(x)) * unit * (0x1p-22 - 0x1p-24));
  }
};
struct Sin {
  static float of(float x) { return static_cast<float>(std::sin(double(x)) + noise(bits_of(x)) * 0x1p-21); }
};
struct Cos {
  static float of(float x) { return static_cast<float>(std::cos(double(x)) + noise(bits_of(x)) * 0x1p-21); }
};
struct Tanh {
  static float of(float x) { return within_relative(std::tanh(double(x)), 0x1p-11, bits_of(x)); }
};
struct Div {
  static float of(float a, float b) {
    if (std::fabs(b) > 0x1p126f && std::isfinite(b)) return std::isfinite(a) ? std::copysign(0.0f, a * b) : NAN;
    return Full::of(a, b);
  }
  struct Full {
    static float of(float a, float b) {
      return within_ulps(double(a) / double(b), 2, uint64_t{bits_of(a)} << 32 | bits_of(b));
    }
  };
};

// rcp.approx.ftz.f64 and rsqrt.approx.ftz.f64: from and to the upper 32 bits of a double, those below being 0.
template <bool kRoot>
struct UpperHalf {
  static double of(double x) {
    constexpr uint64_t kUpper = 0xffffffff00000000u, kExponent = uint64_t{0x7ff} << 52, kSign = uint64_t{1} << 63;
    const auto flushed = [](uint64_t bits) { return (bits & kExponent) == 0 ? bits & kSign : bits; };
    const uint64_t bits = flushed(bits_of(x) & kUpper);
    const double upper = std::bit_cast<double>(bits), exact = 1 / (kRoot ? std::sqrt(upper) : upper);
    if (std::isnan(x) || std::isnan(exact)) return std::bit_cast<double>(uint64_t{0x7fffffff} << 32);
    const double near = exact == 0 || std::isinf(exact) ? exact : exact * (1 + noise(bits) * 0x1p-22);
    return std::bit_cast<double>(flushed(bits_of(near)) & kUpper);
  }
};

template <class F, bool kFlush>
struct Modified {
  template <class... T>
  static float of(T... in) {
    return one_nan(kFlush ? flushed(F::of(flushed(in)...)) : F::of(in...));
  }
};

template <class F>
void single_of(Decoding& d) {
  d.take("approx");
  d.i.run = d.take("ftz") ? lanewise<Modified<F, true>, float, float> : lanewise<Modified<F, false>, float, float>;
  d.usual(kF32, {kF32});
}
template <class F>
void single(Decoding& d) {
  d.take_type_of({kF32});
  single_of<F>(d);
}
template <class F, bool kRoot>
void single_or_double(Decoding& d) {
  if (d.take_type_of({kF32, kF64}) == kF32) return single_of<F>(d);
  if (!d.take("approx") || !d.take("ftz")) d.fail("an instruction that is not known");
  d.i.run = lanewise<UpperHalf<kRoot>, double, double>;
  d.usual(kF64, {kF64});
}
template <class F>
void divide(Decoding& d) {
  d.take_type_of({kF32});
  d.i.run = d.take("ftz") ? lanewise<Modified<F, true>, float, float, float>
                          : lanewise<Modified<F, false>, float, float, float>;
  d.usual(kF32, {kF32, kF32});
}

// Of 16-bit numbers: the single precision result, off by so much of its size.
BFloat16 narrowed(double v, BFloat16) { return to_bfloat16(v); }
Float16 narrowed(double v, Float16) { return to_float16(v); }
constexpr double half_ulp(BFloat16) { return 0x1p-9; }
constexpr double half_ulp(Float16) { return 0x1p-11; }

struct HalfExp2 {
  static double error(BFloat16) { return 0x1p-7; }
  static double error(Float16) { return 0x1.12p-10; }  // 2^-9.9
  static double of(double x) { return std::exp2(x); }
};
struct HalfTanh {
  static double error(BFloat16) { return 0x1p-8; }
  static double error(Float16) { return 0x1.02p-11; }  // 2^-10.987
  static double of(double x) { return std::tanh(x); }
};
template <class F>
struct OnHalf {
  template <class H>
  static H of(H x) {
    const double exact = F::of(emulator::widen(x)), room = std::max(0.0, F::error(x) - half_ulp(x));
    if (x.bits << 1 == 0 || !std::isfinite(exact)) return narrowed(exact, x);
    return narrowed(exact * (1 + noise(x.bits) * room), x);
  }
  template <class H>
  static Pair<H> of(Pair<H> x) {
    return {of(x.low), of(x.high)};
  }
};
template <class F>
void half(Decoding& d, Type type) {
  d.take("approx");
  d.take("ftz");  // of bfloat16, whose subnormal numbers give what 0 gives to 8 bits
  d.i.run = type == kF16     ? lanewise<OnHalf<F>, Float16, Float16>
            : type == kBF16  ? lanewise<OnHalf<F>, BFloat16, BFloat16>
            : type == kF16x2 ? lanewise<OnHalf<F>, Pair<Float16>, Pair<Float16>>
                             : lanewise<OnHalf<F>, Pair<BFloat16>, Pair<BFloat16>>;
  d.usual(type, {type});
}

}  // namespace

void add_approximations(Decoders& decoders) {
  decoders["rcp"] = single_or_double<Rcp, false>;
  decoders["sqrt"] = single<Sqrt>;
  decoders["rsqrt"] = single_or_double<Rsqrt, true>;
  decoders["lg2"] = single<Log2>;
  decoders["sin"] = single<Sin>;
  decoders["cos"] = single<Cos>;
  decoders["ex2"] = [](Decoding& d) {
    const Type type = d.take_type_of({kF32, kF16, kBF16, kF16x2, kBF16x2});
    if (type != kF32) return half<HalfExp2>(d, type);
    single_of<Exp2>(d);
  };
  decoders["tanh"] = [](Decoding& d) {
    const Type type = d.take_type_of({kF32, kF16, kBF16, kF16x2, kBF16x2});
    if (type != kF32) return half<HalfTanh>(d, type);
    single_of<Tanh>(d);
  };
  decoders["div"] = [](Decoding& d) { d.take("full") ? divide<Div::Full>(d) : (d.take("approx"), divide<Div>(d)); };
}

}  // namespace fastnorm::ptx
