// Instructions that the lanes of a warp carry out together. All lanes have to take part: see Warp::meet.
#include <algorithm>
#include <array>
#include <bit>

#include "decoding.h"
#include "lanes.h"
#include "machine.h"

namespace fastnorm::ptx {

namespace {

using enum Type;

enum ShuffleMode : uint8_t { kUp, kDown, kButterfly, kIndex };

// in: value, lane or distance, limits. The limits are the segment's mask in bits 8 to 12 and the last lane in 0 to 4.
void shuffle(Warp& warp, const Instruction& i, Mask lanes) {
  const auto* const in = warp.lanes<uint32_t>(i.in[0]);
  std::array<uint32_t, kLanes> values;
  std::copy(in, in + kLanes, values.begin());
  Mask inside = 0;
  std::array<uint32_t, kLanes> results{};
  for (int lane = 0; lane < kLanes; ++lane) {
    const auto by = static_cast<int>(warp.value(i.in[1], lane) & 31);
    const auto limits = static_cast<int>(warp.value(i.in[2], lane));
    const int segment = limits >> 8 & 31, clamp = limits & 31;
    const int last = (lane & segment) | (clamp & ~segment), first = lane & segment;
    int from = lane;
    bool in_range = false;
    switch (i.mode) {
      case kUp: from = lane - by, in_range = from >= last; break;
      case kDown: from = lane + by, in_range = from <= last; break;
      case kButterfly: from = lane ^ by, in_range = from <= last; break;
      default: from = first | (by & ~segment), in_range = from <= last;
    }
    if (!in_range) from = lane;
    results[static_cast<size_t>(lane)] = values[static_cast<size_t>(from)];
    inside |= static_cast<Mask>(in_range) << lane;
  }
  auto* const out = warp.lanes<uint32_t>(i.out[0]);
  std::copy(results.begin(), results.end(), out);
  warp.set_truth(i.out[1], lanes, inside);
}

struct Sum {
  template <class T>
  static T of(T a, T b) {
    return static_cast<T>(static_cast<uint32_t>(a) + static_cast<uint32_t>(b));
  }
};
struct Least {
  template <class T>
  static T of(T a, T b) {
    return std::min(a, b);
  }
};
struct Most {
  template <class T>
  static T of(T a, T b) {
    return std::max(a, b);
  }
};
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

template <class F, class T>
void reduce(Warp& warp, const Instruction& i, Mask) {
  const auto* const in = warp.lanes<uint32_t>(i.in[0]);
  T total = value_of<T>(in[0]);
  for (int lane = 1; lane < kLanes; ++lane) total = F::of(total, value_of<T>(in[lane]));
  auto* const out = warp.lanes<uint32_t>(i.out[0]);
  std::fill(out, out + kLanes, kept_of<T>(total));
}

enum VoteMode : uint8_t { kAll, kAny, kUniform, kBallot };

void vote(Warp& warp, const Instruction& i, Mask lanes) {
  const Mask found = warp.truth(i.in[0]);
  const bool all = found == kAllLanes, any = found != 0;
  if (i.mode == kBallot) {
    auto* const out = warp.lanes<uint32_t>(i.out[0]);
    return std::fill(out, out + kLanes, found);
  }
  const bool result = i.mode == kAll ? all : i.mode == kAny ? any : all || !any;
  warp.set_truth(i.out[0], lanes, result ? kAllLanes : 0);
}

// Lane 0 is as good as any.
void elect(Warp& warp, const Instruction& i, Mask lanes) {
  if (!i.out[0].is_nothing()) {
    auto* const out = warp.lanes<uint32_t>(i.out[0]);
    std::fill(out, out + kLanes, 0u);
  }
  warp.set_truth(i.out[1], lanes, 1);
}

// "%r1|%p1" is out[0] and out[1].
void two_destinations(Decoding& d, Type type) {
  const std::string both = d.operand(0);
  const size_t bar = both.find('|');
  d.i.out[0] = d.destination(trimmed(std::string_view(both).substr(0, bar)), type);
  if (bar != std::string::npos) d.i.out[1] = d.destination(trimmed(std::string_view(both).substr(bar + 1)), kPred);
}

// The last operand says which lanes take part.
void all_lanes_meet(Decoding& d, size_t mask) {
  d.i.flow = Flow::kMeeting;
  d.in(mask, kU32, 4);
}

void decode_shfl(Decoding& d) {
  const std::string_view mode = d.take_one_of({"up", "down", "bfly", "idx"});
  if (!d.take("sync") || mode.empty()) d.fail("an instruction that is not known");
  d.take_type_of({kB32});
  d.i.mode = mode == "up" ? kUp : mode == "down" ? kDown : mode == "bfly" ? kButterfly : kIndex;
  d.i.run = shuffle;
  two_destinations(d, kB32);
  if (d.i.out[0].is_nothing()) d.fail("no destination");
  for (size_t k = 0; k < 3; ++k) d.in(k + 1, kU32, k);
  all_lanes_meet(d, 4);
  d.finish(5);
}

void decode_redux(Decoding& d) {
  const std::string_view name = d.take_one_of({"add", "min", "max", "and", "or", "xor"});
  if (!d.take("sync")) d.fail("an instruction that is not known");
  const Type type = d.take_type_of({kU32, kS32, kB32});
  const bool is_bits = name == "and" || name == "or" || name == "xor";
  if (name.empty() || is_bits != (type == kB32)) d.fail("an instruction that is not known");
  const bool sign = type == kS32;
  d.i.run = name == "add"   ? reduce<Sum, uint32_t>
            : name == "min" ? (sign ? reduce<Least, int32_t> : reduce<Least, uint32_t>)
            : name == "max" ? (sign ? reduce<Most, int32_t> : reduce<Most, uint32_t>)
            : name == "and" ? reduce<And, uint32_t>
            : name == "or"  ? reduce<Or, uint32_t>
                            : reduce<Xor, uint32_t>;
  d.out(0, type);
  d.in(1, type, 0);
  all_lanes_meet(d, 2);
  d.finish(3);
}

void decode_vote(Decoding& d) {
  const std::string_view mode = d.take_one_of({"all", "any", "uni", "ballot"});
  if (!d.take("sync") || mode.empty()) d.fail("an instruction that is not known");
  const Type type = d.take_type_of({kPred, kB32});
  d.i.mode = mode == "all" ? kAll : mode == "any" ? kAny : mode == "uni" ? kUniform : kBallot;
  d.i.run = vote;
  d.out(0, type);
  d.in(1, kPred, 0);
  all_lanes_meet(d, 2);
  d.finish(3);
}

void decode_elect(Decoding& d) {
  if (!d.take("sync")) d.fail("an instruction that is not known");
  d.i.run = elect;
  two_destinations(d, kB32);
  all_lanes_meet(d, 1);
  d.finish(2);
}

}  // namespace

void add_warp(Decoders& decoders) {
  decoders["shfl"] = decode_shfl;
  decoders["redux"] = decode_redux;
  decoders["vote"] = decode_vote;
  decoders["elect"] = decode_elect;
}

}  // namespace fastnorm::ptx
