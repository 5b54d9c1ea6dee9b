// Arithmetic of single and double precision, correctly rounded. The modifiers .ftz and .sat are template parameters;
// .rz, .rm and .rp set the processor's rounding mode around the instruction.
#include <cfenv>
#include <cmath>

#include "decoding.h"
#include "lanes.h"
#include "rounding.h"

namespace fastnorm::ptx {

namespace {

using enum Type;

struct Add {
  template <class T>
  static T of(T a, T b) {
    return a + b;
  }
};
struct Sub {
  template <class T>
  static T of(T a, T b) {
    return a - b;
  }
};
struct Mul {
  template <class T>
  static T of(T a, T b) {
    return a * b;
  }
};
struct Div {
  template <class T>
  static T of(T a, T b) {
    return a / b;
  }
};
struct Fma {
  template <class T>
  static T of(T a, T b, T c) {
    return std::fma(a, b, c);
  }
};
struct Sqrt {
  template <class T>
  static T of(T a) {
    return std::sqrt(a);
  }
};
struct Rcp {
  template <class T>
  static T of(T a) {
    return T(1) / a;
  }
};
// -0 is less than 0. Of a number and a NaN the number, unless kNan.
template <bool kMax, bool kNan>
struct Extreme {
  template <class T>
  static T of(T a, T b) {
    const T extreme = kMax ? (a > b ? a : b) : (a < b ? a : b);                       // b where one is NaN
    const auto equal = kMax ? (bits_of(a) & bits_of(b)) : (bits_of(a) | bits_of(b));  // zeros: of both signs
    const T number = a == b ? std::bit_cast<T>(equal) : b != b ? a : extreme;
    if constexpr (kNan) return a != a ? a : b != b ? b : number;
    return number;
  }
};

template <class F, bool kFlush, bool kSaturate>
struct Modified {
  template <class... T>
  static auto of(T... in) {
    auto result = kFlush ? F::of(flushed(in)...) : F::of(in...);
    if constexpr (kFlush) result = flushed(result);
    if constexpr (kSaturate) return saturated(result);
    return one_nan(result);
  }
};
template <class F>
struct Double {
  template <class... T>
  static double of(T... in) {
    return F::of(in...);
  }
};

void in_rounding_mode(Warp& warp, const Instruction& i, Mask lanes) {
  std::fesetround(i.rounding);
  i.rounded(warp, i, lanes);
  std::fesetround(FE_TONEAREST);
}

void set_rounding(Decoding& d) {
  const std::string_view mode = d.take_one_of({"rn", "rz", "rm", "rp"});
  d.i.rounding = mode == "rz" ? FE_TOWARDZERO : mode == "rm" ? FE_DOWNWARD : mode == "rp" ? FE_UPWARD : FE_TONEAREST;
  if (d.i.rounding == FE_TONEAREST) return;
  d.i.rounded = d.i.run;
  d.i.run = in_rounding_mode;
}

template <class F, class... In>
Execute single(Decoding& d) {
  const bool flush = d.take("ftz"), saturate = d.take("sat");
  if (flush)
    return saturate ? lanewise<Modified<F, true, true>, float, In...>
                    : lanewise<Modified<F, true, false>, float, In...>;
  return saturate ? lanewise<Modified<F, false, true>, float, In...>
                  : lanewise<Modified<F, false, false>, float, In...>;
}

template <class F>
void unary(Decoding& d) {
  const Type type = d.take_type_of({kF32, kF64});
  d.i.run = type == kF32 ? single<F, float>(d) : lanewise<Double<F>, double, double>;
  set_rounding(d);
  d.usual(type, {type});
}
template <class F>
void binary(Decoding& d) {
  const Type type = d.take_type_of({kF32, kF64});
  d.i.run = type == kF32 ? single<F, float, float>(d) : lanewise<Double<F>, double, double, double>;
  set_rounding(d);
  d.usual(type, {type, type});
}
template <class F>
void ternary(Decoding& d) {
  const Type type = d.take_type_of({kF32, kF64});
  d.i.run = type == kF32 ? single<F, float, float, float>(d) : lanewise<Double<F>, double, double, double, double>;
  set_rounding(d);
  d.usual(type, {type, type, type});
}

// Operations on the sign alone. They keep a NaN's bits.
struct Neg {
  static uint32_t of(uint32_t a) { return a ^ 0x80000000u; }
  static uint64_t of(uint64_t a) { return a ^ (uint64_t{1} << 63); }
};
struct Abs {
  static uint32_t of(uint32_t a) { return a & 0x7fffffffu; }
  static uint64_t of(uint64_t a) { return a & ~(uint64_t{1} << 63); }
};
template <class F>
struct FlushedSign {
  static uint32_t of(uint32_t a) { return F::of(bits_of(flushed(float_of(a)))); }
};
// The sign of a, and all else of b.
struct CopySign {
  static uint32_t of(uint32_t a, uint32_t b) { return (a & 0x80000000u) | (b & 0x7fffffffu); }
  static uint64_t of(uint64_t a, uint64_t b) {
    const uint64_t sign = uint64_t{1} << 63;
    return (a & sign) | (b & ~sign);
  }
};

template <class F>
void sign(Decoding& d) {
  const Type type = d.take_type_of({kF32, kF64});
  d.i.run = type == kF64    ? lanewise<F, uint64_t, uint64_t>
            : d.take("ftz") ? lanewise<FlushedSign<F>, uint32_t, uint32_t>
                            : lanewise<F, uint32_t, uint32_t>;
  d.usual(type, {type});
}

template <bool kMax>
void extreme(Decoding& d) {
  d.take("NaN") ? binary<Extreme<kMax, true>>(d) : binary<Extreme<kMax, false>>(d);
}

// Numbers, infinite ones, subnormal ones, NaN: a predicate for each kind.
struct Finite {
  template <class T>
  static bool of(T v, T) {
    return std::isfinite(v);
  }
};
struct Infinite {
  template <class T>
  static bool of(T v, T) {
    return std::isinf(v);
  }
};
struct Number {
  template <class T>
  static bool of(T v, T) {
    return !std::isnan(v);
  }
};
struct NotANumber {
  template <class T>
  static bool of(T v, T) {
    return std::isnan(v);
  }
};
template <class F, class T>
void test(Warp& warp, const Instruction& i, Mask lanes) {
  warp.set_truth(i.out[0], lanes, lanes_where<F, T>(warp, i, lanes));
}

}  // namespace

void add_floats(Decoders& decoders) {
  decoders["add"] = binary<Add>;
  decoders["sub"] = binary<Sub>;
  decoders["mul"] = binary<Mul>;
  decoders["fma"] = ternary<Fma>;
  decoders["mad"] = ternary<Fma>;
  decoders["div"] = binary<Div>;
  decoders["sqrt"] = unary<Sqrt>;
  decoders["rcp"] = unary<Rcp>;
  decoders["min"] = extreme<false>;
  decoders["max"] = extreme<true>;
  decoders["neg"] = sign<Neg>;
  decoders["abs"] = sign<Abs>;
  decoders["copysign"] = [](Decoding& d) {
    const Type type = d.take_type_of({kF32, kF64});
    d.i.run = type == kF32 ? lanewise<CopySign, uint32_t, uint32_t, uint32_t>
                           : lanewise<CopySign, uint64_t, uint64_t, uint64_t>;
    d.usual(type, {type, type});
  };
  decoders["testp"] = [](Decoding& d) {
    const std::string_view kind = d.take_one_of({"finite", "infinite", "number", "notanumber"});
    const Type type = d.take_type_of({kF32, kF64});
    const bool one = type == kF32;
    d.i.run = kind == "finite"     ? (one ? test<Finite, float> : test<Finite, double>)
              : kind == "infinite" ? (one ? test<Infinite, float> : test<Infinite, double>)
              : kind == "number"   ? (one ? test<Number, float> : test<Number, double>)
                                   : (one ? test<NotANumber, float> : test<NotANumber, double>);
    if (kind.empty()) d.fail("an instruction that is not known");
    d.out(0, kPred);
    d.in(1, type, 0);
    d.in(1, type, 1);
    d.finish(2);
  };
}

}  // namespace fastnorm::ptx
