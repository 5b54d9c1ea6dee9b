// cvt: between all types of numbers; and cvta, between a space's addresses and generic ones.
#include <cfenv>
#include <cmath>
#include <limits>

#include "convert.h"
#include "decoding.h"
#include "lanes.h"
#include "names.h"
#include "rounding.h"

namespace fastnorm::ptx {

namespace {

using enum Type;
using emulator::widen;

// What a conversion does beside its types, as Instruction::mode has it.
enum Mode : uint8_t { kSaturate = 1, kFlush = 2, kRelu = 4 };

// ---- integers ----

// Copies bits, or extends them by the sign of the source.
template <class To, class From>
struct Resized {
  static To of(From v) { return static_cast<To>(v); }
};
template <class To, class From>
struct Clamped {
  static To of(From v) {
    using Wide = __int128;
    const Wide least = std::numeric_limits<To>::min(), most = std::numeric_limits<To>::max();
    return static_cast<To>(std::min(std::max(Wide(v), least), most));
  }
};
template <class To, class From>
struct Number {
  static To of(From v) { return static_cast<To>(v); }  // in the processor's rounding mode
};

// ---- from floating point ----

template <class T>
T flushed_if(T v, uint8_t mode) {
  if constexpr (std::is_same_v<T, float>) return mode & kFlush ? flushed(v) : v;
  return v;
}
inline float number_of(float v) { return v; }
inline double number_of(double v) { return v; }
inline float number_of(BFloat16 v) { return widen(v); }
inline float number_of(Float16 v) { return widen(v); }

// To an integer: rounded, then limited to its range. NaN is 0, or where one of the types has 64 bits the highest bit.
template <class To, class From>
void to_integer(Warp& warp, const Instruction& i, Mask lanes) {
  Kept<To>* const out = warp.lanes<Kept<To>>(i.out[0]);
  const Kept<From>* const in = warp.lanes<Kept<From>>(i.in[0]);
  for_lanes(lanes, [&](int lane) {
    const double v = flushed_if(number_of(value_of<From>(in[lane])), i.mode);
    const double whole = i.rounding == FE_TONEAREST  ? std::nearbyint(v)
                         : i.rounding == FE_DOWNWARD ? std::floor(v)
                         : i.rounding == FE_UPWARD   ? std::ceil(v)
                                                     : std::trunc(v);
    constexpr auto kLeast = std::numeric_limits<To>::min(), kMost = std::numeric_limits<To>::max();
    constexpr bool kLong = sizeof(To) == 8 || sizeof(From) == 8;
    To result;
    if (std::isnan(whole)) {
      result = kLong ? static_cast<To>(Unsigned<sizeof(To)>(1) << (8 * sizeof(To) - 1)) : To(0);
    } else if (whole <= static_cast<double>(kLeast)) {
      result = kLeast;
    } else if (whole >= static_cast<double>(kMost)) {
      result = kMost;
    } else {
      result = static_cast<To>(whole);
    }
    out[lane] = kept_of<To>(result);
  });
}

// To float or double, exactly or by one rounding.
template <class To, class From>
void to_float(Warp& warp, const Instruction& i, Mask lanes) {
  Kept<To>* const out = warp.lanes<Kept<To>>(i.out[0]);
  const Kept<From>* const in = warp.lanes<Kept<From>>(i.in[0]);
  for_lanes(lanes, [&](int lane) {
    auto v = static_cast<To>(flushed_if(number_of(value_of<From>(in[lane])), i.mode));
    v = flushed_if(v, i.mode);
    if (i.mode & kSaturate) v = saturated(v);
    out[lane] = kept_of<To>(one_nan(v));
  });
}
// To an integer in floating point: cvt.rzi.f32.f32 and the like.
template <class T>
void to_whole(Warp& warp, const Instruction& i, Mask lanes) {
  Kept<T>* const out = warp.lanes<Kept<T>>(i.out[0]);
  const Kept<T>* const in = warp.lanes<Kept<T>>(i.in[0]);
  for_lanes(lanes, [&](int lane) {
    const T v = flushed_if(value_of<T>(in[lane]), i.mode);
    T whole = i.rounding == FE_TONEAREST  ? std::nearbyint(v)
              : i.rounding == FE_DOWNWARD ? std::floor(v)
              : i.rounding == FE_UPWARD   ? std::ceil(v)
                                          : std::trunc(v);
    if (i.mode & kSaturate) whole = saturated(whole);
    out[lane] = kept_of<T>(one_nan(whole));
  });
}

// ---- to 16 bits ----

template <class H, class V>
H narrowed(V v, const Instruction& i) {
  if (i.mode & kRelu && v <= 0) v = 0;
  if (i.mode & kSaturate) v = saturated(v);
  constexpr bool kBrain = std::is_same_v<H, BFloat16>;
  if constexpr (std::is_same_v<V, float>) {
    if (i.rounding == FE_TONEAREST) {
      if constexpr (kBrain)
        return emulator::narrow_bfloat16(v);
      else
        return emulator::narrow_float16(v);
    }
  }
  if constexpr (kBrain)
    return to_bfloat16(v, i.rounding);
  else
    return to_float16(v, i.rounding);
}
template <class H, class From>
void to_half(Warp& warp, const Instruction& i, Mask lanes) {
  uint32_t* const out = warp.lanes<uint32_t>(i.out[0]);
  const Kept<From>* const in = warp.lanes<Kept<From>>(i.in[0]);
  for_lanes(lanes, [&](int lane) {
    out[lane] = narrowed<H>(flushed_if(number_of(value_of<From>(in[lane])), i.mode), i).bits;
  });
}
// The second operand becomes the lower half.
template <class H>
void to_halves(Warp& warp, const Instruction& i, Mask lanes) {
  uint32_t* const out = warp.lanes<uint32_t>(i.out[0]);
  const uint32_t *high = warp.lanes<uint32_t>(i.in[0]), *low = warp.lanes<uint32_t>(i.in[1]);
  for_lanes(lanes, [&](int lane) {
    const uint32_t upper = narrowed<H>(float_of(high[lane]), i).bits;
    out[lane] = upper << 16 | narrowed<H>(float_of(low[lane]), i).bits;
  });
}
// Integers to 16 bits: by way of a double, which holds those of 32 bits; rounded once more than it should be above.
template <class H, class From>
void integer_to_half(Warp& warp, const Instruction& i, Mask lanes) {
  uint32_t* const out = warp.lanes<uint32_t>(i.out[0]);
  const Kept<From>* const in = warp.lanes<Kept<From>>(i.in[0]);
  for_lanes(lanes, [&](int lane) { out[lane] = narrowed<H>(static_cast<double>(value_of<From>(in[lane])), i).bits; });
}

// An integer that lies in a register wider than its type.
template <class To, class From>
struct LowPart {
  static To of(uint64_t v) { return static_cast<To>(static_cast<From>(v)); }
};

void in_rounding_mode(Warp& warp, const Instruction& i, Mask lanes) {
  std::fesetround(i.rounding);
  i.rounded(warp, i, lanes);
  std::fesetround(FE_TONEAREST);
}

template <class F>
Execute with_integer(Type type, F f) {
  switch (type) {
    case kU8: return f(uint8_t{});
    case kU16: return f(uint16_t{});
    case kU32: return f(uint32_t{});
    case kU64: return f(uint64_t{});
    case kS8: return f(int8_t{});
    case kS16: return f(int16_t{});
    case kS32: return f(int32_t{});
    case kS64: return f(int64_t{});
    default: return nullptr;
  }
}
template <class F>
Execute with_float(Type type, F f) {
  switch (type) {
    case kF16: return f(Float16{});
    case kBF16: return f(BFloat16{});
    case kF32: return f(float{});
    case kF64: return f(double{});
    default: return nullptr;
  }
}

template <class To>
Execute from_any(Type from, bool saturates) {
  if constexpr (std::is_integral_v<To>) {
    if (is_float(from)) return with_float(from, []<class From>(From) -> Execute { return to_integer<To, From>; });
    return with_integer(from, [=]<class From>(From) -> Execute {
      return saturates ? lanewise<Clamped<To, From>, To, From> : lanewise<Resized<To, From>, To, From>;
    });
  } else if constexpr (std::is_floating_point_v<To>) {
    if (is_float(from)) return with_float(from, []<class From>(From) -> Execute { return to_float<To, From>; });
    return with_integer(from, []<class From>(From) -> Execute { return lanewise<Number<To, From>, To, From>; });
  } else {
    if (is_float(from)) return with_float(from, []<class From>(From) -> Execute { return to_half<To, From>; });
    return with_integer(from, []<class From>(From) -> Execute { return integer_to_half<To, From>; });
  }
}

void decode_cvt(Decoding& d) {
  const std::string_view whole = d.take_one_of({"rni", "rzi", "rmi", "rpi"});
  const std::string_view mode = d.take_one_of({"rn", "rz", "rm", "rp"});
  const std::string_view digits = whole.empty() ? mode : whole;
  const char direction = digits.empty() ? 'n' : digits[1];
  d.i.rounding = direction == 'z'   ? FE_TOWARDZERO
                 : direction == 'm' ? FE_DOWNWARD
                 : direction == 'p' ? FE_UPWARD
                                    : FE_TONEAREST;
  const bool saturates = d.take("sat");
  d.i.mode = static_cast<uint8_t>(kSaturate * saturates | kFlush * d.take("ftz") | kRelu * d.take("relu"));
  const Type to = d.take_type(), from = d.take_type();
  if (to == kF16x2 || to == kBF16x2) {
    if (from != kF32) d.fail("an instruction that is not known");
    d.i.run = to == kF16x2 ? to_halves<Float16> : to_halves<BFloat16>;
    return d.usual(to, {kF32, kF32});
  }
  if (!is_float(to) && is_float(from) && whole.empty()) d.i.rounding = FE_TOWARDZERO;
  if (!whole.empty() && to == from) {
    d.i.run = to == kF32 ? to_whole<float> : to == kF64 ? to_whole<double> : nullptr;
  } else {
    d.i.run = is_float(to) ? with_float(to, [=]<class To>(To) -> Execute { return from_any<To>(from, saturates); })
                           : with_integer(to, [=]<class To>(To) -> Execute { return from_any<To>(from, saturates); });
  }
  if (d.i.run == nullptr) d.fail("an instruction that is not known");
  const bool by_processor = (to == kF32 || to == kF64) && whole.empty();
  if (by_processor && d.i.rounding != FE_TONEAREST) {
    d.i.rounded = d.i.run;
    d.i.run = in_rounding_mode;
  }
  d.in(1, from, 0);
  if (!d.i.in[0].wide || bytes_of(from) == 8) return d.usual(to, {from});
  d.i.run = nullptr;
  if (!is_float(to) && !is_float(from) && !saturates) {
    d.i.run = with_integer(to, [=]<class To>(To) -> Execute {
      return with_integer(from, []<class From>(From) -> Execute { return lanewise<LowPart<To, From>, To, uint64_t>; });
    });
  }
  if (d.i.run == nullptr) d.fail("an operand of another width");
  d.usual(to, {kB64});
}

// ---- addresses ----

void shared_to_generic(Warp& warp, const Instruction& i, Mask lanes) {
  const uint64_t window = kSharedWindow | static_cast<uint64_t>(warp.block().index) << kBlockShift;
  const auto first = static_cast<uint64_t>(warp.block().index - warp.block().rank);
  for_lanes(lanes, [&](int lane) {
    const uint64_t address = warp.value(i.in[0], lane), rank = address >> kBlockShift;
    warp.set(i.out[0], lane,
             rank == 0 ? window | address
                       : kSharedWindow | (first + rank - 1) << kBlockShift | (address & ((1 << kBlockShift) - 1)));
  });
}
void generic_to_shared(Warp& warp, const Instruction& i, Mask lanes) {
  const auto first = static_cast<uint64_t>(warp.block().index - warp.block().rank);
  for_lanes(lanes, [&](int lane) {
    const uint64_t address = warp.value(i.in[0], lane);
    if ((address & kSharedWindow) == 0) warp.fail(lane, "an address that is not of shared memory");
    const uint64_t block = (address ^ kSharedWindow) >> kBlockShift, offset = address & ((1 << kBlockShift) - 1);
    const bool own = block == static_cast<uint64_t>(warp.block().index);
    warp.set(i.out[0], lane, own ? offset : (block - first + 1) << kBlockShift | offset);
  });
}
template <uint64_t kWindow, bool kToGeneric>
struct Windowed {
  static uint64_t of(uint64_t address) { return kToGeneric ? address | kWindow : address & ~kWindow; }
};

void decode_cvta(Decoding& d) {
  const bool to = d.take("to");
  const std::string_view space =
      d.take_one_of({"global", "const", "shared", "shared::cta", "shared::cluster", "local", "param"});
  const Type type = d.take_type_of({kU32, kU64});
  if (space.starts_with("shared")) {
    d.i.run = to ? generic_to_shared : shared_to_generic;
  } else if (space == "local") {
    d.i.run = to ? lanewise<Windowed<kLocalWindow, false>, uint64_t, uint64_t>
                 : lanewise<Windowed<kLocalWindow, true>, uint64_t, uint64_t>;
  } else if (space == "param") {
    d.i.run = to ? lanewise<Windowed<kParameterWindow, false>, uint64_t, uint64_t>
                 : lanewise<Windowed<kParameterWindow, true>, uint64_t, uint64_t>;
  } else {
    d.i.run = lanewise<Resized<uint64_t, uint64_t>, uint64_t, uint64_t>;
  }
  if (space.empty()) d.fail("an instruction that is not known");
  d.usual(type, {type});
}

}  // namespace

void add_conversions(Decoders& decoders) {
  decoders["cvt"] = decode_cvt;
  decoders["cvta"] = decode_cvta;
}

}  // namespace fastnorm::ptx
