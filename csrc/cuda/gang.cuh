// A gang: the blocks of a fused launch that share a set (rows) or a tile of whole sets (columns), a piece each, kept in
// shared memory from the first read of x to the last.
//
//   Gang::kBlock    one block            nothing to exchange
//   Gang::kCluster  blocks of a cluster  partials in each block's shared memory, which its peers read; sync_cluster
//   Gang::kGrid     blocks of a grid     partials in global memory, [2, blocks, channels]; sync_grid
//
// One kernel serves all three: the kind is the same for all threads of a launch, and a branch on it is free.
//
// A wave is an item for every team of the launch. Partials of neighbouring waves lie apart (parity), so that one
// barrier a wave is enough: who writes a place again has met everyone since they read it.
#pragma once

#include "group_reduce.cuh"
#include "pack.cuh"

namespace fastnorm::cuda {

// What fused kernels know besides the shape. Bytes are of shared memory.
struct FusedShape {
  Gang gang;
  int pieces;        // blocks of a gang
  int buffers;       // waves in shared memory at a time
  int stream_bytes;  // one staged tensor of one wave
  int team_bytes;    // rows: all that a team has
  void* partials;    // kGrid
};

// What the blocks of a gang tell each other: `channels` partials each, one for rows.
template <class Acc>
class GangPartials {
 public:
  // shared: kCluster: room for twice as many.
  FASTNORM_DEVICE GangPartials(const FusedShape& f, void* shared, int channels)
      : gang_(f.gang), pieces_(f.pieces), channels_(channels) {
    places_ = static_cast<Acc*>(gang_ == Gang::kGrid ? f.partials : shared);
    first_ = block_index() - block_index() % pieces_;
  }
  FASTNORM_DEVICE bool is_block() const { return gang_ == Gang::kBlock; }

  // Tells this block's partial of a channel.
  FASTNORM_DEVICE void put(int parity, int channel, const Acc& partial) const {
    if (gang_ == Gang::kCluster) {
      places_[parity * channels_ + channel] = partial;
    } else {
      store_one(places_ + (parity * grid_blocks() + block_index()) * channels_ + channel, partial);
    }
  }
  FASTNORM_DEVICE void meet() const {
    if (gang_ == Gang::kCluster) {
      sync_cluster();
    } else {
      sync_grid();
    }
  }
  // The sum of a channel, by `lanes` neighbouring lanes that all get it. All lanes of the warp take part, `in` or not.
  FASTNORM_DEVICE Acc total(int parity, int channel, bool in, int lane, int lanes) const {
    Acc sum{};
    for (int piece = lane; in && piece < pieces_; piece += lanes) sum.merge(get(parity, piece, channel));
    return reduce_lanes(sum, lanes);
  }

  // Rows: this block's partial, the same in all threads -> the gang's.
  FASTNORM_DEVICE Acc exchange(int parity, const Acc& mine) const {
    if (is_block()) return mine;
    if (thread_index() == 0) put(parity, 0, mine);
    meet();
    return total(parity, 0, true, thread_index() % kWarp, kWarp);
  }
  // Columns: each of the first `channels` of this block's partials, which put() has told -> use(channel, the gang's).
  template <class Use>
  FASTNORM_DEVICE void exchange_channels(int parity, int channels, Use use) const {
    meet();
    int lanes = 1;
    while (lanes < kWarp && 2 * lanes * channels <= block_threads()) lanes *= 2;
    const int lane = thread_index() % lanes, group = thread_index() / lanes, groups = block_threads() / lanes;
    for (int first = 0; first < channels; first += groups) {
      const int channel = first + group;
      const Acc sum = total(parity, channel, channel < channels, lane, lanes);
      if (channel < channels && lane == 0) use(channel, sum);
    }
  }

  // Before a block leaves: its peers may still read its shared memory.
  FASTNORM_DEVICE void leave() const {
    if (gang_ == Gang::kCluster) sync_cluster();
  }

 private:
  FASTNORM_DEVICE Acc get(int parity, int piece, int channel) const {
    if (gang_ == Gang::kCluster) return *cluster_shared(places_ + parity * channels_ + channel, piece);
    return load_one(places_ + (parity * grid_blocks() + first_ + piece) * channels_ + channel);
  }

  Gang gang_;
  int pieces_, channels_;
  Acc* places_;
  int64_t first_;  // block of this gang
};

// The waves of a fused launch, for a team that takes item `mine` of each: stage(item, buffer) begins to load an item,
// use(item, buffer, parity) finds it there. All teams make as many calls; an item may lie beyond the last.
template <class Stage, class Use>
FASTNORM_DEVICE void for_waves(const FusedShape& f, int64_t items, int64_t wave_items, int64_t mine, Stage stage,
                               Use use) {
  int parity = 0;
  for (int64_t first = 0; first < items; first += wave_items, parity ^= 1) {
    const int64_t item = first + mine;
    if (first == 0 || f.buffers == 1) stage(item, 0);
    wait_copies();
    if (f.buffers == 2) stage(item + wave_items, parity ^ 1);
    use(item, f.buffers == 2 ? parity : 0, parity);
  }
}

}  // namespace fastnorm::cuda
