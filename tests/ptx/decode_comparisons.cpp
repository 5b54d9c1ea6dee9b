// Comparisons, and choices by predicate.
#include <cmath>

#include "convert.h"
#include "decoding.h"
#include "lanes.h"
#include "rounding.h"

namespace fastnorm::ptx {

namespace {

using enum Type;

struct Eq {
  template <class T>
  static bool of(T a, T b) {
    return a == b;
  }
};
struct Ne {
  template <class T>
  static bool of(T a, T b) {
    return a != b && a == a && b == b;
  }
};
struct Lt {
  template <class T>
  static bool of(T a, T b) {
    return a < b;
  }
};
struct Le {
  template <class T>
  static bool of(T a, T b) {
    return a <= b;
  }
};
struct Gt {
  template <class T>
  static bool of(T a, T b) {
    return a > b;
  }
};
struct Ge {
  template <class T>
  static bool of(T a, T b) {
    return a >= b;
  }
};
struct Both {  // both are numbers
  template <class T>
  static bool of(T a, T b) {
    return a == a && b == b;
  }
};
// The comparison, or one of the two is NaN: not the opposite one.
template <class Opposite>
struct Or {
  template <class T>
  static bool of(T a, T b) {
    return !Opposite::of(a, b);
  }
};

template <class F>
struct Flushed {
  static bool of(float a, float b) { return F::of(flushed(a), flushed(b)); }
};
// 16-bit numbers compare as floats.
template <class F>
struct Widened {
  template <class H>
  static bool of(H a, H b) {
    return F::of(emulator::widen(a), emulator::widen(b));
  }
};

enum Combination : uint8_t { kAlone, kAnd, kOr, kXor };

template <class F, class T>
void compare(Warp& warp, const Instruction& i, Mask lanes) {
  const Mask found = lanes_where<F, T>(warp, i, lanes);
  const Mask other = i.mode == kAlone ? 0 : warp.truth(i.in[2]);
  const auto combined = [&](Mask value) {
    return i.mode == kAnd ? value & other : i.mode == kOr ? value | other : i.mode == kXor ? value ^ other : value;
  };
  const Mask first = combined(found), second = combined(~found);  // before the first is written: c may be p
  warp.set_truth(i.out[0], lanes, first);
  warp.set_truth(i.out[1], lanes, second);
}

// For one comparison: the types that it takes.
template <class F>
Execute over_types(Type type, bool flush) {
  switch (type) {
    case kB16:
    case kU16: return compare<F, uint16_t>;
    case kB32:
    case kU32: return compare<F, uint32_t>;
    case kB64:
    case kU64: return compare<F, uint64_t>;
    case kS16: return compare<F, int16_t>;
    case kS32: return compare<F, int32_t>;
    case kS64: return compare<F, int64_t>;
    case kF32: return flush ? compare<Flushed<F>, float> : compare<F, float>;
    case kF64: return compare<F, double>;
    case kF16: return compare<Widened<F>, Float16>;
    case kBF16: return compare<Widened<F>, BFloat16>;
    default: return nullptr;
  }
}

Execute comparison(std::string_view name, Type type, bool flush) {
  if (name == "eq") return over_types<Eq>(type, flush);
  if (name == "ne") return over_types<Ne>(type, flush);
  if (name == "lt" || name == "lo") return over_types<Lt>(type, flush);
  if (name == "le" || name == "ls") return over_types<Le>(type, flush);
  if (name == "gt" || name == "hi") return over_types<Gt>(type, flush);
  if (name == "ge" || name == "hs") return over_types<Ge>(type, flush);
  if (!is_float(type)) return nullptr;
  if (name == "equ") return over_types<Or<Ne>>(type, flush);
  if (name == "neu") return over_types<Or<Eq>>(type, flush);
  if (name == "ltu") return over_types<Or<Ge>>(type, flush);
  if (name == "leu") return over_types<Or<Gt>>(type, flush);
  if (name == "gtu") return over_types<Or<Le>>(type, flush);
  if (name == "geu") return over_types<Or<Lt>>(type, flush);
  if (name == "num") return over_types<Both>(type, flush);
  if (name == "nan") return over_types<Or<Both>>(type, flush);
  return nullptr;
}

void decode_setp(Decoding& d) {
  const std::string_view name = d.take_one_of({"eq", "ne", "lt", "le", "gt", "ge", "lo", "ls", "hi", "hs", "equ", "neu",
                                               "ltu", "leu", "gtu", "geu", "num", "nan"});
  const std::string_view combination = d.take_one_of({"and", "or", "xor"});
  const Type type = d.take_type();
  d.i.run = comparison(name, type, d.take("ftz"));
  if (d.i.run == nullptr) d.fail("an instruction that is not known");
  d.i.mode = combination.empty() ? kAlone : combination == "and" ? kAnd : combination == "or" ? kOr : kXor;
  const std::string both = d.operand(0);
  const size_t bar = both.find('|');
  d.i.out[0] = d.destination(trimmed(std::string_view(both).substr(0, bar)), kPred);
  if (bar != std::string::npos) d.i.out[1] = d.destination(trimmed(std::string_view(both).substr(bar + 1)), kPred);
  d.in(1, type, 0);
  d.in(2, type, 1);
  if (d.i.mode != kAlone) d.in(3, kPred, 2);
  d.finish(d.i.mode == kAlone ? 3 : 4);
}

template <class T>
void choose(Warp& warp, const Instruction& i, Mask lanes) {
  T* const out = warp.lanes<T>(i.out[0]);
  const T *a = warp.lanes<T>(i.in[0]), *b = warp.lanes<T>(i.in[1]);
  const Mask first = warp.truth(i.in[2]);
  for_lanes(lanes, [&](int lane) { out[lane] = first >> lane & 1 ? a[lane] : b[lane]; });
}
void choose_predicate(Warp& warp, const Instruction& i, Mask lanes) {
  const Mask first = warp.truth(i.in[2]);
  warp.set_truth(i.out[0], lanes, (first & warp.truth(i.in[0])) | (~first & warp.truth(i.in[1])));
}

// slct: a where c is not negative, b elsewhere.
template <class T>
struct NotNegative {
  template <class C>
  static T of(T a, T b, C c) {
    return c >= 0 ? a : b;
  }
};

}  // namespace

void add_comparisons(Decoders& decoders) {
  decoders["setp"] = decode_setp;
  decoders["selp"] = [](Decoding& d) {
    const Type type = d.take_type();
    d.i.run = type == kPred ? choose_predicate : bytes_of(type) == 8 ? choose<uint64_t> : choose<uint32_t>;
    if (type == kNone || bytes_of(type) == 1) d.fail("an instruction that is not known");
    d.out(0, type);
    d.in(1, type, 0);
    d.in(2, type, 1);
    d.in(3, kPred, 2);
    d.finish(4);
  };
  decoders["slct"] = [](Decoding& d) {
    const Type type = d.take_type(), by = d.take_type_of({kS32, kF32});
    const bool wide = bytes_of(type) == 8;
    d.i.run = by == kS32 ? (wide ? lanewise<NotNegative<uint64_t>, uint64_t, uint64_t, uint64_t, int32_t>
                                 : lanewise<NotNegative<uint32_t>, uint32_t, uint32_t, uint32_t, int32_t>)
                         : (wide ? lanewise<NotNegative<uint64_t>, uint64_t, uint64_t, uint64_t, float>
                                 : lanewise<NotNegative<uint32_t>, uint32_t, uint32_t, uint32_t, float>);
    d.usual(type, {type, type, by});
  };
}

}  // namespace fastnorm::ptx
