// mov: of values, of addresses, of special registers; to and from a register in parts.
#include "decoding.h"
#include "lanes.h"

namespace fastnorm::ptx {

namespace {

using enum Type;

template <class T>
void copy(Warp& warp, const Instruction& i, Mask lanes) {
  T* const out = warp.lanes<T>(i.out[0]);
  const T* const in = warp.lanes<T>(i.in[0]);
  for_lanes(lanes, [&](int lane) { out[lane] = in[lane]; });
}
void copy_predicate(Warp& warp, const Instruction& i, Mask lanes) {
  warp.set_truth(i.out[0], lanes, warp.truth(i.in[0]));
}

// {a, b} = x: the first element from the lowest bits.
void take_apart(Warp& warp, const Instruction& i, Mask lanes) {
  const Operand* const elements = warp.elements(i);
  const int bits = i.bytes * 8 / i.elements;
  const uint64_t mask = (uint64_t{1} << bits) - 1;
  for_lanes(lanes, [&](int lane) {
    const uint64_t v = warp.value(i.in[0], lane);
    for (int e = 0; e < i.elements; ++e) warp.set(elements[e], lane, v >> bits * e & mask);
  });
}
void put_together(Warp& warp, const Instruction& i, Mask lanes) {
  const Operand* const elements = warp.elements(i);
  const int bits = i.bytes * 8 / i.elements;
  const uint64_t mask = (uint64_t{1} << bits) - 1;
  for_lanes(lanes, [&](int lane) {
    uint64_t v = 0;
    for (int e = 0; e < i.elements; ++e) v |= (warp.value(elements[e], lane) & mask) << bits * e;
    warp.set(i.out[0], lane, v);
  });
}

void take_parts(Decoding& d, Type type, size_t n) {
  const std::string_view text = d.operand(n);
  const size_t parts = split_operands(text.substr(1, text.size() - 2)).size();
  const size_t bytes = parts == 0 ? 0 : static_cast<size_t>(bytes_of(type)) / parts;
  const Type part = bytes == 1 ? kB8 : bytes == 2 ? kB16 : bytes == 4 ? kB32 : kNone;
  if (part == kNone) d.fail("a vector that does not fit");
  d.i.bytes = static_cast<uint8_t>(bytes_of(type));
  d.elements(n, parts, part, n == 0);
}

}  // namespace

void add_moves(Decoders& decoders) {
  decoders["mov"] = [](Decoding& d) {
    const Type type = d.take_type();
    if (type == kNone || bytes_of(type) == 1) d.fail("an instruction that is not known");
    if (d.is_vector(0)) {
      d.i.run = take_apart;
      take_parts(d, type, 0);
      d.in(1, type, 0);
      return d.finish(2);
    }
    if (d.operands() > 1 && d.is_vector(1)) {
      d.i.run = put_together;
      d.out(0, type);
      take_parts(d, type, 1);
      return d.finish(2);
    }
    if (type == kPred) {
      d.i.run = copy_predicate;
      d.out(0, kPred);
      d.in(1, kPred, 0);
      return d.finish(2);
    }
    d.i.run = bytes_of(type) == 8 ? copy<uint64_t> : copy<uint32_t>;
    d.usual(type, {type});
  };
}

}  // namespace fastnorm::ptx
