// The ladder of a reduction: lanes of a warp, then warps of a block. It needs two things of an accumulator: that it
// merges, and that all zeros is the accumulator of nothing. The order of merges depends on the team's width alone, and
// every thread of the team gets the same bits.
#pragma once

#include <cmath>

#include "core/accum.h"
#include "platform.cuh"

namespace fastnorm::cuda {

// Threads that work on one item: a power of two up to a warp, several teams to a block; or the whole block.
struct Team {
  int width, lane, index;  // index: which team of the block

  // 1 << shift threads
  FASTNORM_DEVICE explicit Team(int shift)
      : width(1 << shift), lane(thread_index() & ((1 << shift) - 1)), index(thread_index() >> shift) {}
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

// The sums over `width` neighbouring lanes of plain numbers. All lanes of the warp take part.
template <int K, class A>
FASTNORM_DEVICE void sum_lanes(A (&mine)[K], int width) {
  const auto add = [&](int lanes) {
#pragma unroll
    for (int k = 0; k < K; ++k) mine[k] += shuffle_xor(mine[k], lanes);
  };
  if (width >= kWarp) {
#pragma unroll
    for (int lanes = 1; lanes < kWarp; lanes *= 2) add(lanes);
  } else {
    for (int lanes = 1; lanes < width; lanes *= 2) add(lanes);
  }
}

// The same as reduce_lanes of plain sums, and of moments: the common mean first, then the deviations from it, which are
// plain sums both, so that no step has a division.
template <class A>
FASTNORM_DEVICE GradSums<A> reduce_lanes(const GradSums<A>& mine, int width) {
  A sums[2] = {mine.d, mine.d_centered};
  sum_lanes(sums, width);
  return {sums[0], sums[1]};
}
template <class A>
FASTNORM_DEVICE Welford<A> reduce_lanes(const Welford<A>& mine, int width) {
  A sums[2] = {mine.count, mine.count * mine.moments.mean};
  sum_lanes(sums, width);
  const A mean = sums[0] > A(0) ? sums[1] / sums[0] : A(0), deviation = mine.moments.mean - mean;
  A m2[1] = {std::fma(mine.count * deviation, deviation, mine.moments.m2)};
  sum_lanes(m2, width);
  return {sums[0], {mean, m2[0]}};
}

// The sums over the team. All threads of the block take part. `scratch` has ladder_bytes(...) of plan/types.h, which is
// room for three numbers of each warp; `place` is the first of these K. A place is written again after a barrier that
// follows its last read: call this with other places in between, or sync the block.
template <int K, class A>
FASTNORM_DEVICE void sum_team(const Team& team, A (&mine)[K], void* scratch, int place = 0) {
  sum_lanes(mine, team.width);
  if (!team.is_block()) return;
  const int warps = team.width / kWarp, lane = thread_index() % kWarp;
  A* const partials = static_cast<A*>(scratch) + place * warps;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (lane == 0) partials[k * warps + team.lane / kWarp] = mine[k];
  }
  sync_block();
#pragma unroll
  for (int k = 0; k < K; ++k) mine[k] = partials[k * warps + (lane & (warps - 1))];
  for (int lanes = 1; lanes < warps; lanes *= 2) {
#pragma unroll
    for (int k = 0; k < K; ++k) mine[k] += shuffle_xor(mine[k], lanes);
  }
}

// The same of a team's sums of gradients; the next call may follow at once.
template <class A>
FASTNORM_DEVICE GradSums<A> sum_team(const Team& team, const GradSums<A>& mine, void* scratch) {
  A sums[2] = {mine.d, mine.d_centered};
  sum_team(team, sums, scratch);
  if (team.is_block()) sync_block();
  return {sums[0], sums[1]};
}

}  // namespace fastnorm::cuda
