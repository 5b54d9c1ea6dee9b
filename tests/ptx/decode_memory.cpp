// ld, st and the instructions that only move data between caches.
#include <array>
#include <bit>
#include <cstring>

#include "decoding.h"
#include "lanes.h"
#include "machine.h"
#include "memory.h"
#include "ordering.h"

namespace fastnorm::ptx {

namespace {

using enum Type;

constexpr uint8_t kConstant = 1;  // ld.global.nc

// mode: whether no thread of the launch may write the memory. E: an element in memory, a signed integer where a
// register takes its sign.
template <class E>
void load(Warp& warp, const Instruction& i, Mask lanes) {
  const Operand* const elements = warp.elements(i);
  const int bytes = static_cast<int>(sizeof(E)) * i.elements;
  const Use use = i.order.strong ? Use::kStrongRead : i.mode == kConstant ? Use::kConstant : Use::kRead;
  std::array<uint64_t, kLanes> addresses;
  const auto take = [&](int lane, const unsigned char* from) {
    for (int e = 0; e < i.elements; ++e) {
      E value;
      std::memcpy(&value, from + sizeof(E) * static_cast<size_t>(e), sizeof(E));
      warp.set(elements[e], lane, static_cast<uint64_t>(static_cast<int64_t>(value)));
    }
  };
  if (i.space == Space::kParameter && i.in[0].bank == Operand::kConstant) {
    const unsigned char* const from =
        reach(warp, std::countr_zero(lanes), i.space, {address_of(warp, i, 0), bytes, use, i.order.scope});
    return for_lanes(lanes, [&](int lane) { take(lane, from); });
  }
  for (Mask left = lanes; left != 0; left &= left - 1) {
    const int lane = std::countr_zero(left);
    const uint64_t address = addresses[static_cast<size_t>(lane)] = address_of(warp, i, lane);
    take(lane, reach(warp, lane, i.space, {address, bytes, use, i.order.scope}));
    if (i.order.strong) after_strong_read(warp, lane, address, i.order);
  }
  count_access(warp, lanes, i.space, Traffic::kRead, bytes, addresses.data());
}

template <class E>
void store(Warp& warp, const Instruction& i, Mask lanes) {
  const Operand* const elements = warp.elements(i);
  const int bytes = static_cast<int>(sizeof(E)) * i.elements;
  const Use use = i.order.strong ? Use::kStrongWrite : Use::kWrite;
  std::array<uint64_t, kLanes> addresses;
  for (Mask left = lanes; left != 0; left &= left - 1) {
    const int lane = std::countr_zero(left);
    const uint64_t address = addresses[static_cast<size_t>(lane)] = address_of(warp, i, lane);
    unsigned char* const place = reach(warp, lane, i.space, {address, bytes, use, i.order.scope});
    if (i.order.strong) before_strong_write(warp, lane, address, i.order, false);
    for (int e = 0; e < i.elements; ++e) {
      const auto value = static_cast<E>(warp.value(elements[e], lane));
      std::memcpy(place + sizeof(E) * static_cast<size_t>(e), &value, sizeof(E));
    }
  }
  warp.machine().note_progress();
  count_access(warp, lanes, i.space, Traffic::kWritten, bytes, addresses.data());
}

Space take_space(Decoding& d) {
  if (d.take("global")) return Space::kGlobal;
  if (d.take("local")) return Space::kLocal;
  if (d.take("const")) return Space::kConstant;
  if (!d.take_one_of({"param", "param::entry"}).empty()) return Space::kParameter;
  if (!d.take_one_of({"shared", "shared::cta", "shared::cluster"}).empty()) return Space::kShared;
  return Space::kGeneric;
}

size_t take_count(Decoding& d) {
  const std::string_view vector = d.take_one_of({"v2", "v4", "v8"});
  return vector.empty() ? 1 : static_cast<size_t>(vector[1] - '0');
}

void decode_ld(Decoding& d) {
  d.i.mode = d.take("nc") ? kConstant : 0;
  d.i.order = take_order(d);
  d.i.space = take_space(d);
  d.take_cache_hints();
  const size_t count = take_count(d);
  const Type type = d.take_type();
  switch (bytes_of(type)) {
    case 1: d.i.run = is_signed(type) ? load<int8_t> : load<uint8_t>; break;
    case 2: d.i.run = is_signed(type) ? load<int16_t> : load<uint16_t>; break;
    case 4: d.i.run = is_signed(type) ? load<int32_t> : load<uint32_t>; break;
    default: d.i.run = load<uint64_t>;
  }
  if (type == kNone || type == kPred) d.fail("an instruction that is not known");
  if (d.i.order.strong) d.i.flow = Flow::kYield;
  d.elements(0, count, type, true);
  d.address(1);
  d.finish(d.take("L2::cache_hint") ? 3 : 2);
}

void decode_st(Decoding& d) {
  d.i.order = take_order(d);
  d.i.space = take_space(d);
  d.take_cache_hints();
  const size_t count = take_count(d);
  const Type type = d.take_type();
  switch (bytes_of(type)) {
    case 1: d.i.run = store<uint8_t>; break;
    case 2: d.i.run = store<uint16_t>; break;
    case 4: d.i.run = store<uint32_t>; break;
    default: d.i.run = store<uint64_t>;
  }
  if (type == kNone || type == kPred) d.fail("an instruction that is not known");
  d.address(0);
  d.elements(1, count, type, false);
  d.finish(d.take("L2::cache_hint") ? 3 : 2);
}

// An address out of range is no error.
void decode_prefetch(Decoding& d) {
  take_space(d);
  d.take_one_of({"L1", "L2", "L2::evict_last", "L2::evict_normal"});
  d.i.run = [](Warp&, const Instruction&, Mask) {};
  d.address(0);
  d.finish(1);
}

void decode_fence(Decoding& d) {
  d.take_one_of({"acq_rel", "sc"});
  const std::optional<Scope> scope = d.take("gl") ? Scope::kDevice : take_scope(d);
  if (!scope) d.fail("an instruction that is not known");
  d.i.order.scope = *scope;
  d.i.run = [](Warp& warp, const Instruction& i, Mask lanes) { fence(warp, lanes, i.order.scope); };
  d.finish(0);
}

}  // namespace

void add_memory(Decoders& decoders) {
  decoders["ld"] = decode_ld;
  decoders["ldu"] = decode_ld;
  decoders["st"] = decode_st;
  decoders["prefetch"] = decode_prefetch;
  decoders["fence"] = decode_fence;
  decoders["membar"] = decode_fence;
}

}  // namespace fastnorm::ptx
