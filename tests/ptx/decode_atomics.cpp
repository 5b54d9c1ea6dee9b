// atom and red. A lane after the other: any order of lanes is allowed, and this one is as good.
#include <algorithm>
#include <array>
#include <bit>
#include <cstring>

#include "decoding.h"
#include "machine.h"
#include "memory.h"
#include "ordering.h"

namespace fastnorm::ptx {

namespace {

using enum Type;

struct Add {
  template <class T>
  static T of(T old, T value) {
    return old + value;
  }
};
struct Min {
  template <class T>
  static T of(T old, T value) {
    return std::min(old, value);
  }
};
struct Max {
  template <class T>
  static T of(T old, T value) {
    return std::max(old, value);
  }
};
struct And {
  template <class T>
  static T of(T old, T value) {
    return old & value;
  }
};
struct Or {
  template <class T>
  static T of(T old, T value) {
    return old | value;
  }
};
struct Xor {
  template <class T>
  static T of(T old, T value) {
    return old ^ value;
  }
};
struct Exchange {
  template <class T>
  static T of(T, T value) {
    return value;
  }
};
// Counts up to a value, then from 0; down to 0, then from the value.
struct Increment {
  static uint32_t of(uint32_t old, uint32_t value) { return old >= value ? 0 : old + 1; }
};
struct Decrement {
  static uint32_t of(uint32_t old, uint32_t value) { return old == 0 || old > value ? value : old - 1; }
};

// in[1]: the value; of a compare-and-swap what memory has to hold, and in[2] the value.
template <class T, class F>
void modify(Warp& warp, const Instruction& i, Mask lanes) {
  std::array<uint64_t, kLanes> addresses;
  for (Mask left = lanes; left != 0; left &= left - 1) {
    const int lane = std::countr_zero(left);
    const uint64_t address = addresses[static_cast<size_t>(lane)] = address_of(warp, i, lane);
    unsigned char* const place =
        reach(warp, lane, i.space, {address, int(sizeof(T)), Use::kStrongWrite, i.order.scope});
    T old;
    std::memcpy(&old, place, sizeof(T));
    const T value = value_of<T>(static_cast<Kept<T>>(warp.value(i.in[1], lane)));
    T result;
    if constexpr (std::is_same_v<F, void>) {
      const T other = value_of<T>(static_cast<Kept<T>>(warp.value(i.in[2], lane)));
      result = old == value ? other : old;
    } else {
      result = F::of(old, value);
    }
    after_strong_read(warp, lane, address, i.order);
    before_strong_write(warp, lane, address, i.order, true);
    std::memcpy(place, &result, sizeof(T));
    warp.set(i.out[0], lane, kept_of<T>(old));
    if (std::memcmp(&old, &result, sizeof(T)) != 0) warp.machine().note_progress();
  }
  count_access(warp, lanes, i.space, Traffic::kRead, sizeof(T), addresses.data());
  count_access(warp, lanes, i.space, Traffic::kWritten, sizeof(T), addresses.data());
}

template <class F>
Execute over_numbers(Type type) {
  switch (type) {
    case kU32: return modify<uint32_t, F>;
    case kS32: return modify<int32_t, F>;
    case kU64: return modify<uint64_t, F>;
    case kS64: return modify<int64_t, F>;
    default: return nullptr;
  }
}
template <class F>
Execute over_bits(Type type) {
  return type == kB32 ? modify<uint32_t, F> : type == kB64 ? modify<uint64_t, F> : nullptr;
}

Execute operation(std::string_view name, Type type) {
  if (name == "add" && type == kF32) return modify<float, Add>;
  if (name == "add" && type == kF64) return modify<double, Add>;
  if (name == "add") return over_numbers<Add>(type);
  if (name == "min") return over_numbers<Min>(type);
  if (name == "max") return over_numbers<Max>(type);
  if (name == "and") return over_bits<And>(type);
  if (name == "or") return over_bits<Or>(type);
  if (name == "xor") return over_bits<Xor>(type);
  if (name == "exch") return over_bits<Exchange>(type);
  if (name == "cas") return over_bits<void>(type);
  if (name == "inc" && type == kU32) return modify<uint32_t, Increment>;
  if (name == "dec" && type == kU32) return modify<uint32_t, Decrement>;
  return nullptr;
}

void decode_atomic(Decoding& d, bool returns) {
  d.i.order = take_order(d);
  d.i.order.strong = true;
  if (d.take("global")) d.i.space = Space::kGlobal;
  if (!d.take_one_of({"shared", "shared::cta", "shared::cluster"}).empty()) d.i.space = Space::kShared;
  const std::string_view name = d.take_one_of({"add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec"});
  const Type type = d.take_type();
  d.i.run = operation(name, type);
  if (d.i.run == nullptr) d.fail("an instruction that is not known");
  d.i.flow = Flow::kYield;
  const size_t first = returns ? 1 : 0;
  if (returns) d.out(0, type);
  d.address(first);
  d.in(first + 1, type, 1);
  if (name == "cas") d.in(first + 2, type, 2);
  d.finish(first + (name == "cas" ? 3 : 2));
}

}  // namespace

void add_atomics(Decoders& decoders) {
  decoders["atom"] = [](Decoding& d) { decode_atomic(d, true); };
  decoders["red"] = [](Decoding& d) { decode_atomic(d, false); };
}

}  // namespace fastnorm::ptx
