// Instructions on bits: logic, shifts, fields, bytes, counts; logic of predicates.
#include <algorithm>
#include <bit>

#include "decoding.h"
#include "lanes.h"

namespace fastnorm::ptx {

namespace {

using enum Type;

struct And {
  template <class T>
  static T of(T a, T b) {
    return a & b;
  }
};
struct Or {
  template <class T>
  static T of(T a, T b) {
    return a | b;
  }
};
struct Xor {
  template <class T>
  static T of(T a, T b) {
    return a ^ b;
  }
};
struct Not {
  template <class T>
  static T of(T a) {
    return static_cast<T>(~a);
  }
};
// cnot: the C operator.
struct LogicalNot {
  template <class T>
  static T of(T a) {
    return a == 0;
  }
};
struct ShiftLeft {
  template <class T>
  static T of(T a, uint32_t by) {
    return by >= 8 * sizeof(T) ? T(0) : static_cast<T>(a << by);
  }
};
struct ShiftRight {
  template <class T>
  static T of(T a, uint32_t by) {
    return static_cast<T>(by >= 8 * sizeof(T) ? (a < 0 ? -1 : 0) : a >> by);
  }
};
struct CountOnes {
  template <class T>
  static uint32_t of(T a) {
    return static_cast<uint32_t>(std::popcount(a));
  }
};
struct CountLeadingZeros {
  template <class T>
  static uint32_t of(T a) {
    return static_cast<uint32_t>(std::countl_zero(a));
  }
};
struct Reverse {
  template <class T>
  static T of(T a) {
    T reversed = 0;
    for (size_t b = 0; b < 8 * sizeof(T); ++b) reversed = static_cast<T>(reversed << 1 | (a >> b & 1));
    return reversed;
  }
};
// The place of the highest bit that differs from the sign; all ones where there is none.
struct FindHighest {
  template <class T>
  static uint32_t of(T a) {
    using U = std::make_unsigned_t<T>;
    const U bits = a < 0 ? static_cast<U>(~a) : static_cast<U>(a);
    return static_cast<uint32_t>(std::bit_width(bits)) - 1;
  }
};

// Fields of `length` bits from `first` on; both are taken from 8 bits.
struct ExtractField {
  template <class T>
  static T of(T a, uint32_t first, uint32_t length) {
    constexpr uint32_t kBits = 8 * sizeof(T);
    using U = std::make_unsigned_t<T>;
    first &= 0xff, length &= 0xff;
    if (length == 0) return 0;
    const bool fill = std::is_signed_v<T> && (static_cast<U>(a) >> std::min(first + length - 1, kBits - 1) & 1) != 0;
    const uint32_t kept = first >= kBits ? 0 : std::min(length, kBits - first);
    const U mask = kept == kBits ? ~U{0} : static_cast<U>((U{1} << kept) - 1);
    const U field = kept == 0 ? U{0} : static_cast<U>(static_cast<U>(a) >> first & mask);
    return static_cast<T>(fill ? field | ~mask : field);
  }
};
struct InsertField {
  template <class T>
  static T of(T a, T b, uint32_t first, uint32_t length) {
    constexpr uint32_t kBits = 8 * sizeof(T);
    first &= 0xff, length &= 0xff;
    if (first >= kBits || length == 0) return b;
    length = std::min(length, kBits - first);
    const T mask = static_cast<T>((length == kBits ? ~T{0} : static_cast<T>((T{1} << length) - 1)) << first);
    return static_cast<T>((b & ~mask) | (a << first & mask));
  }
};

// Any logic of three: bit 4 a + 2 b + c of `table` is the result.
void logic3(Warp& warp, const Instruction& i, Mask lanes) {
  const uint32_t *a = warp.lanes<uint32_t>(i.in[0]), *b = warp.lanes<uint32_t>(i.in[1]);
  const uint32_t* c = warp.lanes<uint32_t>(i.in[2]);
  uint32_t* out = warp.lanes<uint32_t>(i.out[0]);
  for_lanes(lanes, [&](int lane) {
    uint32_t result = 0;
    for (int row = 0; row < 8; ++row) {
      if ((i.mode >> row & 1) == 0) continue;
      result |= (row & 4 ? a[lane] : ~a[lane]) & (row & 2 ? b[lane] : ~b[lane]) & (row & 1 ? c[lane] : ~c[lane]);
    }
    out[lane] = result;
  });
}

// Four bytes out of eight, as each half byte of `pick` says: 0 to 7, and 8 for the byte's sign eight times.
struct PickBytes {
  static uint32_t of(uint32_t low, uint32_t high, uint32_t pick) {
    const uint64_t bytes = uint64_t{high} << 32 | low;
    uint32_t result = 0;
    for (int k = 0; k < 4; ++k) {
      const uint32_t which = pick >> 4 * k & 15;
      uint32_t byte = bytes >> 8 * (which & 7) & 0xff;
      if (which & 8) byte = byte & 0x80 ? 0xff : 0;
      result |= byte << 8 * k;
    }
    return result;
  }
};

// Shifts of two registers as one of 64 bits.
template <bool kLeft, bool kWraps>
struct Funnel {
  static uint32_t of(uint32_t low, uint32_t high, uint32_t by) {
    by = kWraps ? by & 31 : std::min(by, 32u);
    const uint64_t both = uint64_t{high} << 32 | low;
    return static_cast<uint32_t>(kLeft ? both << by >> 32 : both >> by);
  }
};

template <class F>
void predicate2(Warp& warp, const Instruction& i, Mask lanes) {
  warp.set_truth(i.out[0], lanes, F::of(warp.truth(i.in[0]), warp.truth(i.in[1])));
}
void predicate_not(Warp& warp, const Instruction& i, Mask lanes) {
  warp.set_truth(i.out[0], lanes, ~warp.truth(i.in[0]));
}

template <class F>
Execute with_bits(Type type, F f) {
  switch (type) {
    case kB16: return f(uint16_t{});
    case kB32: return f(uint32_t{});
    default: return f(uint64_t{});
  }
}

template <class F>
void logic2(Decoding& d) {
  const Type type = d.take_type_of({kPred, kB16, kB32, kB64});
  if (type == kPred) {
    d.i.run = predicate2<F>;
    d.out(0, kPred);
    d.in(1, kPred, 0);
    d.in(2, kPred, 1);
    return d.finish(3);
  }
  d.i.run = with_bits(type, []<class T>(T) -> Execute { return lanewise<F, T, T, T>; });
  d.usual(type, {type, type});
}
template <class F>
void bits1(Decoding& d) {
  const Type type = d.take_type_of({kB16, kB32, kB64});
  d.i.run = with_bits(type, []<class T>(T) -> Execute { return lanewise<F, T, T>; });
  d.usual(type, {type});
}
template <class F>
void count(Decoding& d) {
  const Type type = d.take_type_of({kB32, kB64});
  d.i.run = type == kB32 ? lanewise<F, uint32_t, uint32_t> : lanewise<F, uint32_t, uint64_t>;
  d.usual(kU32, {type});
}

}  // namespace

void add_bits(Decoders& decoders) {
  decoders["and"] = logic2<And>;
  decoders["or"] = logic2<Or>;
  decoders["xor"] = logic2<Xor>;
  decoders["cnot"] = bits1<LogicalNot>;
  decoders["brev"] = bits1<Reverse>;
  decoders["popc"] = count<CountOnes>;
  decoders["clz"] = count<CountLeadingZeros>;
  decoders["not"] = [](Decoding& d) {
    if (!d.take("pred")) return bits1<Not>(d);
    d.i.run = predicate_not;
    d.out(0, kPred);
    d.in(1, kPred, 0);
    d.finish(2);
  };
  decoders["shl"] = [](Decoding& d) {
    const Type type = d.take_type_of({kB16, kB32, kB64});
    d.i.run = with_bits(type, []<class T>(T) -> Execute { return lanewise<ShiftLeft, T, T, uint32_t>; });
    d.usual(type, {type, kU32});
  };
  decoders["shr"] = [](Decoding& d) {
    const Type type = d.take_type_of({kB16, kB32, kB64, kU16, kU32, kU64, kS16, kS32, kS64});
    if (is_signed(type)) {
      d.i.run = type == kS16   ? lanewise<ShiftRight, int16_t, int16_t, uint32_t>
                : type == kS32 ? lanewise<ShiftRight, int32_t, int32_t, uint32_t>
                               : lanewise<ShiftRight, int64_t, int64_t, uint32_t>;
    } else {
      const Type bits = bytes_of(type) == 2 ? kB16 : bytes_of(type) == 4 ? kB32 : kB64;
      d.i.run = with_bits(bits, []<class T>(T) -> Execute { return lanewise<ShiftRight, T, T, uint32_t>; });
    }
    d.usual(type, {type, kU32});
  };
  decoders["bfe"] = [](Decoding& d) {
    const Type type = d.take_type_of({kU32, kU64, kS32, kS64});
    d.i.run = type == kU32   ? lanewise<ExtractField, uint32_t, uint32_t, uint32_t, uint32_t>
              : type == kU64 ? lanewise<ExtractField, uint64_t, uint64_t, uint32_t, uint32_t>
              : type == kS32 ? lanewise<ExtractField, int32_t, int32_t, uint32_t, uint32_t>
                             : lanewise<ExtractField, int64_t, int64_t, uint32_t, uint32_t>;
    d.usual(type, {type, kU32, kU32});
  };
  decoders["bfi"] = [](Decoding& d) {
    const Type type = d.take_type_of({kB32, kB64});
    d.i.run = type == kB32 ? lanewise<InsertField, uint32_t, uint32_t, uint32_t, uint32_t, uint32_t>
                           : lanewise<InsertField, uint64_t, uint64_t, uint64_t, uint32_t, uint32_t>;
    d.usual(type, {type, type, kU32, kU32});
  };
  decoders["bfind"] = [](Decoding& d) {
    const Type type = d.take_type_of({kU32, kU64, kS32, kS64});
    d.i.run = type == kU32   ? lanewise<FindHighest, uint32_t, uint32_t>
              : type == kU64 ? lanewise<FindHighest, uint32_t, uint64_t>
              : type == kS32 ? lanewise<FindHighest, uint32_t, int32_t>
                             : lanewise<FindHighest, uint32_t, int64_t>;
    d.usual(kU32, {type});
  };
  decoders["lop3"] = [](Decoding& d) {
    d.take_type_of({kB32});
    d.i.run = logic3;
    d.i.mode = static_cast<uint8_t>(d.number(4));
    d.out(0, kB32);
    for (size_t k = 0; k < 3; ++k) d.in(k + 1, kB32, k);
    d.finish(5);
  };
  decoders["prmt"] = [](Decoding& d) {
    d.take_type_of({kB32});
    d.i.run = lanewise<PickBytes, uint32_t, uint32_t, uint32_t, uint32_t>;
    d.usual(kB32, {kB32, kB32, kB32});
  };
  decoders["shf"] = [](Decoding& d) {
    const bool left = d.take_one_of({"l", "r"}) == "l", wraps = d.take_one_of({"wrap", "clamp"}) == "wrap";
    d.take_type_of({kB32});
    using W = uint32_t;
    d.i.run = left ? (wraps ? lanewise<Funnel<true, true>, W, W, W, W> : lanewise<Funnel<true, false>, W, W, W, W>)
                   : (wraps ? lanewise<Funnel<false, true>, W, W, W, W> : lanewise<Funnel<false, false>, W, W, W, W>);
    d.usual(kB32, {kB32, kB32, kU32});
  };
}

}  // namespace fastnorm::ptx
