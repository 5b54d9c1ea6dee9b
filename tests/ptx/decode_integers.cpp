// Integer arithmetic.
#include <algorithm>
#include <limits>
#include <type_traits>

#include "decoding.h"
#include "lanes.h"

namespace fastnorm::ptx {

namespace {

using enum Type;

// Arithmetic of machine integers wraps around: it is done without a sign, in 32 bits at least.
template <class T>
using Wrapping = std::make_unsigned_t<std::conditional_t<sizeof(T) < 4, uint32_t, T>>;
template <class T>
T wrapped(Wrapping<T> v) {
  return static_cast<T>(v);
}
template <class T>
Wrapping<T> wrapping(T v) {
  return static_cast<Wrapping<T>>(v);
}

// The type with twice the bits.
template <class T>
struct TwiceOf;
template <>
struct TwiceOf<int16_t> {
  using type = int32_t;
};
template <>
struct TwiceOf<uint16_t> {
  using type = uint32_t;
};
template <>
struct TwiceOf<int32_t> {
  using type = int64_t;
};
template <>
struct TwiceOf<uint32_t> {
  using type = uint64_t;
};
template <>
struct TwiceOf<int64_t> {
  using type = __int128;
};
template <>
struct TwiceOf<uint64_t> {
  using type = unsigned __int128;
};
template <class T>
using Twice = typename TwiceOf<T>::type;

struct Add {
  template <class T>
  static T of(T a, T b) {
    return wrapped<T>(wrapping(a) + wrapping(b));
  }
};
struct Sub {
  template <class T>
  static T of(T a, T b) {
    return wrapped<T>(wrapping(a) - wrapping(b));
  }
};
struct MulLow {
  template <class T>
  static T of(T a, T b) {
    return wrapped<T>(wrapping(a) * wrapping(b));
  }
};
struct MulHigh {
  template <class T>
  static T of(T a, T b) {
    return static_cast<T>(Twice<T>(a) * Twice<T>(b) >> 8 * sizeof(T));
  }
};
struct MulWide {
  template <class T>
  static Twice<T> of(T a, T b) {
    return Twice<T>(a) * Twice<T>(b);
  }
};
struct MadLow {
  template <class T>
  static T of(T a, T b, T c) {
    return wrapped<T>(wrapping(a) * wrapping(b) + wrapping(c));
  }
};
struct MadHigh {
  template <class T>
  static T of(T a, T b, T c) {
    return Add::of(MulHigh::of(a, b), c);
  }
};
struct MadWide {
  template <class T>
  static Twice<T> of(T a, T b, Twice<T> c) {
    return Add::of(Twice<T>(a) * Twice<T>(b), c);
  }
};
// What the hardware gives for a division by 0: all bits, and the dividend as the rest.
struct Div {
  template <class T>
  static T of(T a, T b) {
    if (b == 0) return static_cast<T>(~T(0));
    if (std::is_signed_v<T> && b == T(-1)) return Sub::of(T(0), a);
    return static_cast<T>(a / b);
  }
};
struct Rem {
  template <class T>
  static T of(T a, T b) {
    if (b == 0) return a;
    if (std::is_signed_v<T> && b == T(-1)) return 0;
    return static_cast<T>(a % b);
  }
};
struct Min {
  template <class T>
  static T of(T a, T b) {
    return std::min(a, b);
  }
};
struct Max {
  template <class T>
  static T of(T a, T b) {
    return std::max(a, b);
  }
};
struct Neg {
  template <class T>
  static T of(T a) {
    return Sub::of(T(0), a);
  }
};
struct Abs {
  template <class T>
  static T of(T a) {
    return a < 0 ? Neg::of(a) : a;
  }
};
struct Sad {
  template <class T>
  static T of(T a, T b, T c) {
    return Add::of(c, a < b ? Sub::of(b, a) : Sub::of(a, b));
  }
};

// Calls f with a value of the integer type that `type` names.
template <class F>
Execute with_integer(Type type, F f) {
  switch (type) {
    case kU16: return f(uint16_t{});
    case kU32: return f(uint32_t{});
    case kU64: return f(uint64_t{});
    case kS16: return f(int16_t{});
    case kS32: return f(int32_t{});
    default: return f(int64_t{});
  }
}
Type take_integer(Decoding& d) { return d.take_type_of({kU16, kU32, kU64, kS16, kS32, kS64}); }
// A type of 16 or 32 bits, and the one with twice its bits.
Type twice(Decoding& d, Type type) {
  switch (type) {
    case kU16: return kU32;
    case kS16: return kS32;
    case kU32: return kU64;
    case kS32: return kS64;
    default: d.fail("no wide product of 64 bits");
  }
}
template <class F>
Execute with_half_integer(Type type, F f) {
  switch (type) {
    case kU16: return f(uint16_t{});
    case kS16: return f(int16_t{});
    case kU32: return f(uint32_t{});
    default: return f(int32_t{});
  }
}

template <class F>
void unary(Decoding& d) {
  const Type type = take_integer(d);
  d.i.run = with_integer(type, []<class T>(T) -> Execute { return lanewise<F, T, T>; });
  d.usual(type, {type});
}
template <class F>
void binary_of(Decoding& d, Type type) {
  d.i.run = with_integer(type, []<class T>(T) -> Execute { return lanewise<F, T, T, T>; });
  d.usual(type, {type, type});
}
template <class F>
void binary(Decoding& d) {
  binary_of<F>(d, take_integer(d));
}
template <class F>
void ternary_of(Decoding& d, Type type) {
  d.i.run = with_integer(type, []<class T>(T) -> Execute { return lanewise<F, T, T, T, T>; });
  d.usual(type, {type, type, type});
}

}  // namespace

// Names that floating point has too are looked up by type: see compile.cpp.
void add_integers(Decoders& decoders) {
  decoders["add"] = binary<Add>;
  decoders["sub"] = binary<Sub>;
  decoders["div"] = binary<Div>;
  decoders["rem"] = binary<Rem>;
  decoders["min"] = binary<Min>;
  decoders["max"] = binary<Max>;
  decoders["neg"] = unary<Neg>;
  decoders["abs"] = unary<Abs>;
  decoders["sad"] = [](Decoding& d) { ternary_of<Sad>(d, take_integer(d)); };
  decoders["mul"] = [](Decoding& d) {
    const std::string_view part = d.take_one_of({"lo", "hi", "wide"});
    const Type type = take_integer(d);
    if (part == "hi") return binary_of<MulHigh>(d, type);
    if (part != "wide") return binary_of<MulLow>(d, type);
    const Type wide = twice(d, type);
    d.i.run = with_half_integer(type, []<class T>(T) -> Execute { return lanewise<MulWide, Twice<T>, T, T>; });
    d.usual(wide, {type, type});
  };
  decoders["mad"] = [](Decoding& d) {
    const std::string_view part = d.take_one_of({"lo", "hi", "wide"});
    const Type type = take_integer(d);
    if (part == "hi") return ternary_of<MadHigh>(d, type);
    if (part != "wide") return ternary_of<MadLow>(d, type);
    const Type wide = twice(d, type);
    d.i.run =
        with_half_integer(type, []<class T>(T) -> Execute { return lanewise<MadWide, Twice<T>, T, T, Twice<T>>; });
    d.usual(wide, {type, type, wide});
  };
}

}  // namespace fastnorm::ptx
