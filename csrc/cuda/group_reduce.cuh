// The ladder of a reduction: lanes of a warp, then warps of a block. It needs two things of an accumulator: that it
// merges, and that all zeros is the accumulator of nothing. The order of merges depends on the team's width alone, and
// every thread of the team gets the same bits.
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

// Blocks that go through items together: all blocks of a launch, or some of them.
struct BlockRange {
  int64_t index, count;
};
FASTNORM_DEVICE BlockRange all_blocks() { return {block_index(), grid_blocks()}; }

// The sum over `width` neighbouring lanes, a power of two. All lanes of the warp take part.
template <class Acc>
FASTNORM_DEVICE Acc reduce_lanes(Acc mine, int width) {
  const int lane = thread_index() % kWarp;
  for (int lanes = 1; lanes < width; lanes *= 2) {
    const Acc other = shuffle_xor(mine, lanes);
    // The lower lane's value comes first in both lanes, because merging is not commutative to the last bit. These are
    // copies: references to one or the other would put both into local memory.
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

// The same of plain sums, whose order of merging is that of an addition.
template <class A>
FASTNORM_DEVICE GradSums<A> reduce_lanes(GradSums<A> mine, int width) {
  for (int lanes = 1; lanes < width; lanes *= 2) {
    mine.d += shuffle_xor(mine.d, lanes);
    mine.d_centered += shuffle_xor(mine.d_centered, lanes);
  }
  return mine;
}
// The same of moments: the common mean first, then the deviations from it. Both are plain sums, so that no step has a
// division.
template <class A>
FASTNORM_DEVICE Welford<A> reduce_lanes(const Welford<A>& mine, int width) {
  A count = mine.count, sum = mine.count * mine.moments.mean;
  for (int lanes = 1; lanes < width; lanes *= 2) {
    count += shuffle_xor(count, lanes);
    sum += shuffle_xor(sum, lanes);
  }
  const A mean = count > A(0) ? sum / count : A(0), deviation = mine.moments.mean - mean;
  A m2 = std::fma(mine.count * deviation, deviation, mine.moments.m2);
  for (int lanes = 1; lanes < width; lanes *= 2) m2 += shuffle_xor(m2, lanes);
  return {count, {mean, m2}};
}

// The sum over the team. All threads of the block take part. `scratch` has ladder_bytes(...) of plan/types.h.
//
// Two barriers per call suffice: a warp's place is read before the second barrier and written again after it, and the
// next result is written after the next call's first barrier, which every reader of this result has passed.
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
