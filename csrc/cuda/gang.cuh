// A gang: the blocks of a fused launch that share a set (rows) or a tile of whole sets (columns). Each block keeps a
// piece of it in shared memory from the first read of x to the last, or as much as fits.
//
//   Gang::kBlock    one block            nothing to exchange
//   Gang::kCluster  blocks of a cluster  partials in each block's shared memory, which its peers read; sync_cluster
//   Gang::kGrid     blocks of a grid     partials in global memory, [2, blocks, channels]; sync_blocks, or sync_grid where
//                                        there is one wave. Exchange::kScatter: a block merges some channels, and they
//                                        sync once more for all to read the sums
//
// One kernel serves all three: the kind is the same for all threads of a launch, so a branch on it is free.
//
// A wave is one item for every team of the launch. The partials of even and odd waves have separate places (parity), so
// that nothing has to wait behind an exchange: between a block's read of a place and the next write to it lies the next
// wave's barrier.
#pragma once

#include <algorithm>

#include "group_reduce.cuh"
#include "pack.cuh"

namespace fastnorm::cuda {

// The arguments of fused kernels besides tensors and shape. Bytes are of shared memory.
struct FusedShape {
  Gang gang;
  int pieces;         // blocks of a gang
  int stages;         // waves in shared memory at a time
  int stream_bytes;   // one staged tensor of one wave
  int team_bytes;     // rows: everything of one team
  void* partials;     // kGrid
  Exchange exchange;  // kGrid, columns
  // kGrid: a counter for every gang, which then waits for its own blocks alone. While it waits, other gangs on the same
  // SMs keep the memory busy. Null: all blocks of the grid wait for each other.
  unsigned* arrivals;
};

// Partials that a lane fetches before it merges the first: a fetch through L2 takes about 430 cycles, and a gang may
// have a block on every SM.
// Moments come with a count each, for which registers are scarce.
template <class Partial>
constexpr int kFetchedPartials = 4;
template <class A>
constexpr int kFetchedPartials<Moments<A>> = 2;

// The sums of partials; counts[k] values are in the k-th.
template <int K, class A>
FASTNORM_DEVICE GradSums<A> merge_partials(const GradSums<A> (&partials)[K], const A (& /*counts*/)[K]) {
  GradSums<A> sums = partials[0];
#pragma unroll
  for (int k = 1; k < K; ++k) sums.merge(partials[k]);
  return sums;
}
// The common mean first, then the deviations from it: plain sums both.
template <int K, class A>
FASTNORM_DEVICE Welford<A> merge_partials(const Moments<A> (&partials)[K], const A (&counts)[K]) {
  A count = 0, sum = 0, m2 = 0;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    count += counts[k];
    sum = std::fma(counts[k], partials[k].mean, sum);
  }
  const A mean = count > A(0) ? sum / count : A(0);
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const A deviation = partials[k].mean - mean;
    m2 += std::fma(counts[k] * deviation, deviation, partials[k].m2);
  }
  return {count, {mean, m2}};
}
// The count of values that sums of gradients do not need.
struct NoCount {
  FASTNORM_DEVICE int operator()(int /*piece*/) const { return 0; }
};
template <class A>
FASTNORM_DEVICE const GradSums<A>& without_count(const GradSums<A>& sums) {
  return sums;
}
template <class A>
FASTNORM_DEVICE const Moments<A>& without_count(const Welford<A>& total) {
  return total.moments;
}

// The partials that the blocks of a gang exchange: `channels` from each block; one where the traversal is rows. A is
// the type of their numbers. count_of(piece) is the number of values in a piece's partial.
template <class Partial, class A>
class GangPartials {
 public:
  // shared: for kCluster, room for twice as many partials.
  FASTNORM_DEVICE GangPartials(const FusedShape& f, void* shared, int channels)
      : f_(f), shared_(static_cast<Partial*>(shared)), channels_(channels) {}
  FASTNORM_DEVICE bool is_block() const { return f_.gang == Gang::kBlock; }

  // Call once, before the first exchange.
  FASTNORM_DEVICE void begin() const {
    if (f_.gang != Gang::kGrid || f_.arrivals == nullptr) return;
    if (block_index() % f_.pieces == 0 && thread_index() == 0) store_one(arrivals(), 0u);
    sync_grid();
  }

  // Makes this block's partial of a channel readable by its peers after sync().
  FASTNORM_DEVICE void publish(int parity, int channel, const Partial& partial) const {
    if (f_.gang == Gang::kCluster) {
      shared_[parity * channels_ + channel] = partial;
    } else {
      store_one(global(parity, block_index()) + channel, partial);
    }
  }

  // Rows: from this block's partial, the same in all threads, to the gang's.
  template <class Count>
  FASTNORM_DEVICE Partial exchange(int parity, const Partial& mine, Count count_of) {
    if (is_block()) return mine;
    if (thread_index() == 0) publish(parity, 0, mine);
    sync();
    return total(parity, 0, true, thread_index() % kWarp, kWarp, count_of);
  }
  // Columns, after publish() of this block's partials: calls use(channel, sum over the gang) for the first `channels`.
  template <class Count, class Use>
  FASTNORM_DEVICE void exchange_channels(int parity, int channels, Count count_of, Use use) {
    sync();
    const bool scattered = f_.exchange == Exchange::kScatter;
    const int share = scattered ? (channels_ + f_.pieces - 1) / f_.pieces : channels;
    const int begin = scattered ? static_cast<int>(block_index() % f_.pieces) * share : 0;
    Partial* const totals = scattered ? totals_of(parity) : nullptr;
    merge_channels(parity, begin, std::min(share, channels - begin), count_of, [&](int channel, const Partial& sum) {
      if (totals != nullptr) {
        store_one(totals + channel, sum);
      } else {
        use(channel, sum);
      }
    });
    if (totals == nullptr) return;
    sync();
#pragma unroll 1
    for (int c = thread_index(); c < channels; c += block_threads()) use(c, load_one(totals + c));
  }

  // Call before the block ends: its peers may still read its shared memory. No block reads what another has written
  // last, and sync_cluster would wait for all outputs to arrive: 7% of a fused batch norm's time on an H200.
  FASTNORM_DEVICE void exit() const {
    if (f_.gang == Gang::kCluster) meet_cluster();
  }

 private:
  FASTNORM_DEVICE void sync() {
    if (f_.gang == Gang::kCluster) {
      sync_cluster();
    } else if (f_.arrivals == nullptr) {
      sync_grid();
    } else {
      sync_blocks(arrivals(), f_.pieces, met_++);
    }
  }
  FASTNORM_DEVICE unsigned* arrivals() const { return f_.arrivals + block_index() / f_.pieces; }
  // Calls use(channel, sum over the gang) for `channels` channels from the first.
  template <class Count, class Use>
  FASTNORM_DEVICE void merge_channels(int parity, int first_channel, int channels, Count count_of, Use use) const {
    if (channels <= 0) return;
    // As many lanes a channel as there are threads for, which are a power of two; at most a warp.
    constexpr int kMost = 5;
    static_assert(1 << kMost == kWarp);
    const int log_lanes = std::clamp(bit_width(block_threads()) - 1 - bit_width(channels - 1), 0, kMost);
    const int lanes = 1 << log_lanes, lane = thread_index() & (lanes - 1), group = thread_index() >> log_lanes;
    const int groups = block_threads() >> log_lanes;
#pragma unroll 1
    for (int first = 0; first < channels; first += groups) {
      const bool in = first + group < channels;
      const int channel = first_channel + first + group;
      const Partial sum = total(parity, channel, in, lane, lanes, count_of);
      if (in && lane == 0) use(channel, sum);
    }
  }
  // The sum of a channel over the gang. `lanes` neighbouring lanes compute it, and all of them get it. All lanes of the
  // warp take part, `in` or not.
  template <class Count>
  FASTNORM_DEVICE Partial total(int parity, int channel, bool in, int lane, int lanes, Count count_of) const {
    if (f_.pieces <= lanes) {
      return without_count(reduce_lanes(fetch<1>(parity, channel, in, lane, lanes, count_of), lanes));
    }
    decltype(fetch<1>(parity, channel, in, lane, lanes, count_of)) sum{};
#pragma unroll 1
    for (int piece = lane; piece < f_.pieces; piece += kFetchedPartials<Partial> * lanes) {
      sum.merge(fetch<kFetchedPartials<Partial>>(parity, channel, in, piece, lanes, count_of));
    }
    return without_count(reduce_lanes(sum, lanes));
  }
  // The sum over K pieces from the first, `step` apart; of those that there are.
  template <int K, class Count>
  FASTNORM_DEVICE auto fetch(int parity, int channel, bool in, int first, int step, Count count_of) const {
    Partial partials[K] = {};
    A counts[K] = {};
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int piece = first + k * step;
      if (!in || piece >= f_.pieces) continue;
      partials[k] = fetch_one(parity, piece, channel);
      counts[k] = count_of(piece);
    }
    return merge_partials(partials, counts);
  }
  FASTNORM_DEVICE Partial fetch_one(int parity, int piece, int channel) const {
    if (f_.gang == Gang::kCluster) return *cluster_shared(shared_ + parity * channels_ + channel, piece);
    const int64_t first = block_index() - block_index() % f_.pieces;
    return load_one(global(parity, first) + (piece * channels_ + channel));
  }
  // [2, blocks, channels] partials, then [2, gangs, channels] sums of scattered gangs.
  FASTNORM_DEVICE Partial* global(int parity, int64_t block) const {
    return static_cast<Partial*>(f_.partials) + (parity * grid_blocks() + block) * channels_;
  }
  FASTNORM_DEVICE Partial* totals_of(int parity) const {
    const int64_t gangs = grid_blocks() / f_.pieces, gang = block_index() / f_.pieces;
    return global(2, 0) + (parity * gangs + gang) * channels_;
  }

  const FusedShape& f_;
  Partial* shared_;
  int channels_;
  int met_ = 0;  // times that the blocks have met
};

// For a use() of for_waves that needs nothing before its copies.
struct Unprepared {
  FASTNORM_DEVICE Unprepared operator()(int64_t /*item*/) const { return {}; }
};

// The waves of a fused launch, for a team that takes item `mine` of each. prepare(item) loads what use() needs before
// the first copy group: behind the copies it would come last, which took large tensors of rows 6 to 10% longer on an
// H200. load(item, stage) begins to copy an item to a stage of shared memory, in kCopyGroups groups, and commits each.
// use(item, prepared, stage, parity, ready) finds a group and those before it there after ready(copy_group). All teams
// make the same number of calls; an item may lie beyond the last. started() is called once, when the first copies are
// on their way.
template <class Prepare, class Load, class Started, class Use>
FASTNORM_DEVICE void for_waves(const FusedShape& f, int64_t items, int64_t wave_items, int64_t mine, Prepare prepare,
                               Load load, Started started, Use use) {
  const auto begin = [&](int64_t item, int stage) {
    if (item < items) return load(item, stage);
    for (int copy_group = 0; copy_group < kCopyGroups; ++copy_group) commit_copies();
  };
  const bool ahead = f.stages == 2;  // the next wave is loaded during this one
  if (ahead) begin(mine, 0);
  int parity = 0;
  for (int64_t first = 0; first < items; first += wave_items, parity ^= 1) {
    const int64_t item = first + mine;
    const auto prepared = prepare(item);
    begin(ahead ? item + wave_items : item, ahead ? parity ^ 1 : 0);
    if (first == 0) started();
    use(item, prepared, ahead ? parity : 0, parity,
        [&](int copy_group) { wait_copies(kCopyGroups - 1 - copy_group + (ahead ? kCopyGroups : 0)); });
  }
}

}  // namespace fastnorm::cuda
