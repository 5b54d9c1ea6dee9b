// A gang: the blocks of a fused launch that share a set (rows) or a tile of whole sets (columns). Each block keeps a
// piece of it in shared memory from the first read of x to the last.
//
//   Gang::kBlock    one block            nothing to exchange
//   Gang::kCluster  blocks of a cluster  partials in each block's shared memory, which its peers read; sync_cluster
//   Gang::kGrid     blocks of a grid     partials in global memory, [2, blocks, channels]; sync_grid
//
// One kernel serves all three: the kind is the same for all threads of a launch, so a branch on it is free.
//
// A wave is one item for every team of the launch. The partials of even and odd waves have separate places (parity), so
// that one barrier per wave is enough: between a block's read of a place and the next write to it lies a barrier.
#pragma once

#include <algorithm>

#include "group_reduce.cuh"
#include "pack.cuh"

namespace fastnorm::cuda {

// The arguments of fused kernels besides tensors and shape. Bytes are of shared memory.
struct FusedShape {
  Gang gang;
  int pieces;        // blocks of a gang
  int stages;        // waves in shared memory at a time
  int stream_bytes;  // one staged tensor of one wave
  int team_bytes;    // rows: everything of one team
  void* partials;    // kGrid
};

// The partials that the blocks of a gang exchange: `channels` from each block; one where the traversal is rows.
template <class Acc>
class GangPartials {
 public:
  // shared: for kCluster, room for twice as many partials.
  FASTNORM_DEVICE GangPartials(const FusedShape& f, void* shared, int channels)
      : f_(f), shared_(static_cast<Acc*>(shared)), channels_(channels) {}
  FASTNORM_DEVICE bool is_block() const { return f_.gang == Gang::kBlock; }

  // Makes this block's partial of a channel readable by its peers after sync().
  FASTNORM_DEVICE void publish(int parity, int channel, const Acc& partial) const {
    if (f_.gang == Gang::kCluster) {
      shared_[parity * channels_ + channel] = partial;
    } else {
      store_one(global(parity, block_index()) + channel, partial);
    }
  }
  FASTNORM_DEVICE void sync() const {
    if (f_.gang == Gang::kCluster) {
      sync_cluster();
    } else {
      sync_grid();
    }
  }
  // The sum of a channel over the gang. `lanes` neighbouring lanes compute it, and all of them get it. All lanes of the
  // warp take part, `in` or not.
  FASTNORM_DEVICE Acc total(int parity, int channel, bool in, int lane, int lanes) const {
    Acc sum{};
#pragma unroll 1  // a second round is rare, and a merge is long
    for (int piece = lane; in && piece < f_.pieces; piece += lanes) sum.merge(fetch(parity, piece, channel));
    return reduce_lanes(sum, lanes);
  }

  // Rows: from this block's partial, the same in all threads, to the gang's.
  FASTNORM_DEVICE Acc exchange(int parity, const Acc& mine) const {
    if (is_block()) return mine;
    if (thread_index() == 0) publish(parity, 0, mine);
    sync();
    return total(parity, 0, true, thread_index() % kWarp, kWarp);
  }
  // Columns, after publish() of this block's partials: calls use(channel, sum over the gang) for the first `channels`.
  template <class Use>
  FASTNORM_DEVICE void exchange_channels(int parity, int channels, Use use) const {
    sync();
    // As many as there are threads for, which are a power of two; at most a warp.
    constexpr int kMost = 5;
    static_assert(1 << kMost == kWarp);
    const int log_lanes = std::clamp(bit_width(block_threads()) - 1 - bit_width(channels - 1), 0, kMost);
    const int lanes = 1 << log_lanes, lane = thread_index() & (lanes - 1), group = thread_index() >> log_lanes;
    const int groups = block_threads() >> log_lanes;
    for (int first = 0; first < channels; first += groups) {
      const int channel = first + group;
      const Acc sum = total(parity, channel, channel < channels, lane, lanes);
      if (channel < channels && lane == 0) use(channel, sum);
    }
  }

  // Call before the block ends: its peers may still read its shared memory.
  FASTNORM_DEVICE void exit() const {
    if (f_.gang == Gang::kCluster) sync_cluster();
  }

 private:
  FASTNORM_DEVICE Acc fetch(int parity, int piece, int channel) const {
    if (f_.gang == Gang::kCluster) return *cluster_shared(shared_ + parity * channels_ + channel, piece);
    const int64_t first = block_index() - block_index() % f_.pieces;
    return load_one(global(parity, first + piece) + channel);
  }
  FASTNORM_DEVICE Acc* global(int parity, int64_t block) const {
    return static_cast<Acc*>(f_.partials) + (parity * grid_blocks() + block) * channels_;
  }

  const FusedShape& f_;
  Acc* shared_;
  int channels_;
};

// The waves of a fused launch, for a team that takes item `mine` of each. load(item, stage) begins to copy an item to a
// stage of shared memory, in kCopyGroups groups, and commits each. use(item, stage, parity, ready) finds a group and
// those before it there after ready(copy_group). All teams make the same number of calls; an item may lie beyond the
// last.
template <class Load, class Use>
FASTNORM_DEVICE void for_waves(const FusedShape& f, int64_t items, int64_t wave_items, int64_t mine, Load load,
                               Use use) {
  const auto begin = [&](int64_t item, int stage) {
    if (item < items) return load(item, stage);
    for (int copy_group = 0; copy_group < kCopyGroups; ++copy_group) commit_copies();
  };
  const bool ahead = f.stages == 2;  // the next wave is loaded during this one
  if (ahead) begin(mine, 0);
  int parity = 0;
  for (int64_t first = 0; first < items; first += wave_items, parity ^= 1) {
    const int64_t item = first + mine;
    begin(ahead ? item + wave_items : item, ahead ? parity ^ 1 : 0);
    use(item, ahead ? parity : 0, parity,
        [&](int copy_group) { wait_copies(kCopyGroups - 1 - copy_group + (ahead ? kCopyGroups : 0)); });
  }
}

}  // namespace fastnorm::cuda
