// Branches, the end of a thread, barriers, and addresses in a cluster.
#include <bit>

#include "decoding.h"
#include "lanes.h"
#include "machine.h"
#include "memory.h"
#include "names.h"

namespace fastnorm::ptx {

namespace {

using enum Type;

void nothing(Warp&, const Instruction&, Mask) {}

void map_to_rank(Warp& warp, const Instruction& i, Mask lanes) {
  const auto first = static_cast<uint64_t>(warp.block().index - warp.block().rank);
  const auto blocks = warp.block().cluster->blocks.size();
  for_lanes(lanes, [&](int lane) {
    const uint64_t address = shared_address(warp, warp.value(i.in[0], lane)), rank = warp.value(i.in[1], lane);
    if ((address & kSharedWindow) == 0) warp.fail(lane, "mapa of what is not shared memory");
    if (rank >= blocks) warp.fail(lane, "mapa to rank " + std::to_string(rank) + " of " + std::to_string(blocks));
    const uint64_t offset = address & ((1 << kBlockShift) - 1);
    warp.set(
        i.out[0], lane,
        i.out[0].wide ? kSharedWindow | (first + rank) << kBlockShift | offset : (rank + 1) << kBlockShift | offset);
  });
}
void rank_of(Warp& warp, const Instruction& i, Mask lanes) {
  const auto first = static_cast<uint64_t>(warp.block().index - warp.block().rank);
  for_lanes(lanes, [&](int lane) {
    const uint64_t address = shared_address(warp, warp.value(i.in[0], lane));
    if ((address & kSharedWindow) == 0) warp.fail(lane, "getctarank of what is not shared memory");
    warp.set(i.out[0], lane, ((address ^ kSharedWindow) >> kBlockShift) - first);
  });
}

// A guard lets a branch happen; compile.cpp gives it its target, which may be a label that is still to come.
void decode_bra(Decoding& d) {
  d.take("uni");
  d.i.flow = Flow::kBranch;
  d.i.run = nothing;
  d.finish(1);
}
void decode_brx(Decoding& d) {
  if (!d.take("idx")) d.fail("an instruction that is not known");
  d.take("uni");
  d.i.flow = Flow::kIndexed;
  d.i.run = nothing;
  d.in(0, kU32, 0);
  d.finish(2);
}
void decode_end(Decoding& d) {
  d.take("uni");
  d.i.flow = Flow::kExit;
  d.i.run = nothing;
  d.finish(0);
}

// Barrier 0 of all threads of the block; or the warp's.
void decode_bar(Decoding& d) {
  d.take("cta");
  d.take("aligned");
  if (d.take("cluster")) {
    const std::string_view step = d.take_one_of({"arrive", "wait"});
    const std::string_view order = d.take_one_of({"release", "acquire", "relaxed"});
    d.i.order = {true, order != "relaxed", order != "relaxed"};
    d.i.flow = step == "arrive" ? Flow::kClusterArrive : Flow::kClusterWait;
    d.i.run = nothing;
    if (step.empty()) d.fail("an instruction that is not known");
    return d.finish(0);
  }
  const bool of_warp = d.take("warp");
  if (!d.take("sync")) d.fail("an instruction that is not known");
  d.i.run = nothing;
  if (of_warp) {
    d.i.mode = 1;
    d.i.flow = Flow::kMeeting;
    d.in(0, kU32, 4);
  } else {
    d.i.flow = Flow::kBlockBarrier;
    if (d.operands() > 1) d.fail("a barrier of some threads of the block is not known");
    d.in(0, kU32, 0);
    if (!d.is_number(d.operand(0)) || d.number(0) > 15) d.fail("no barrier of that number");
  }
  d.finish(1);
}

}  // namespace

void add_control(Decoders& decoders) {
  decoders["bra"] = decode_bra;
  decoders["brx"] = decode_brx;
  decoders["ret"] = decode_end;
  decoders["exit"] = decode_end;
  decoders["bar"] = decode_bar;
  decoders["barrier"] = decode_bar;
  decoders["trap"] = [](Decoding& d) {
    d.i.flow = Flow::kTrap;
    d.i.run = nothing;
    d.finish(0);
  };
  decoders["nanosleep"] = [](Decoding& d) {
    d.take_type_of({kU32});
    d.i.flow = Flow::kYield;
    d.i.run = nothing;
    d.in(0, kU32, 0);
    d.finish(1);
  };
  decoders["mapa"] = [](Decoding& d) {
    d.take_one_of({"shared::cluster"});
    const Type type = d.take_type_of({kU32, kU64});
    d.i.run = map_to_rank;
    d.out(0, type);
    d.in(1, type, 0);
    d.in(2, kU32, 1);
    d.finish(3);
  };
  decoders["getctarank"] = [](Decoding& d) {
    d.take_one_of({"shared::cluster"});
    const Type type = d.take_type_of({kU32, kU64});
    d.i.run = rank_of;
    d.out(0, kU32);
    d.in(1, type, 0);
    d.finish(2);
  };
}

}  // namespace fastnorm::ptx
