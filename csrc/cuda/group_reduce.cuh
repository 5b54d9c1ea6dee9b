// The ladder of a reduction: lanes of a warp, then warps of a block. It knows of an accumulator that it merges, and
// that all zeros is one of nothing. The order of merges depends on the team's width alone, and every thread of the team
// ends with the same bits.
#pragma once

#include "core/accum.h"
#include "platform.cuh"

namespace fastnorm::cuda {

// Threads that work on one item: a power of two up to a warp, several teams to a block; or the whole block.
struct Team {
  int width, lane, index;  // index: which team of the block

  FASTNORM_DEVICE explicit Team(int threads)
      : width(threads), lane(thread_index() % threads), index(thread_index() / threads) {}
  FASTNORM_DEVICE bool is_block() const { return width > kWarp; }
  FASTNORM_DEVICE void sync() const {
    if (is_block()) {
      sync_block();
    } else {
      sync_warp();
    }
  }
};

// BlockRange that go through items together: all of a launch, or some of it.
struct BlockRange {
  int64_t index, count;
};
FASTNORM_DEVICE BlockRange all_blocks() { return {block_index(), grid_blocks()}; }

// Over `width` neighbouring lanes, a power of two. All lanes of the warp take part.
template <class Acc>
FASTNORM_DEVICE Acc reduce_lanes(Acc mine, int width) {
  const int lane = thread_index() % kWarp;
  for (int lanes = 1; lanes < width; lanes *= 2) {
    const Acc other = shuffle_xor(mine, lanes);
    // The lower lane's comes first on both sides: merging is not commutative to the last bit. Copies, not references
    // to one or the other, which would put both into local memory.
    Acc first = mine, second = other;
    if (lane & lanes) {
      first = other;
      second = mine;
    }
    first.merge(second);
    mine = first;
  }
  return mine;
}

// Over the team. All threads of the block take part. `scratch`: ladder_bytes(...) of plan/types.h.
//
// Two barriers suffice for call after call: a warp's place is read before the second barrier and written again after
// it, and the result is written after the next call's first, which every reader of this one has passed.
template <class Acc>
FASTNORM_DEVICE Acc reduce_team(const Team& team, Acc mine, void* scratch) {
  if (!team.is_block()) return reduce_lanes(mine, team.width);
  Acc* partials = static_cast<Acc*>(scratch);
  const int warps = team.width / kWarp, warp = team.lane / kWarp, lane = team.lane % kWarp;
  mine = reduce_lanes(mine, kWarp);
  if (lane == 0) partials[warp] = mine;
  sync_block();
  if (warp == 0) {
    mine = lane < warps ? partials[lane] : Acc{};
    mine = reduce_lanes(mine, warps);
    if (lane == 0) partials[warps] = mine;
  }
  sync_block();
  return partials[warps];
}

}  // namespace fastnorm::cuda
