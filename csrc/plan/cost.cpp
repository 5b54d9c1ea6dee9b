#include "cost.h"

#include <algorithm>

#include "grid.h"

namespace fastnorm {

namespace {

// We have measured none of these constants yet (benchmarks/tune.py will). Each comment gives the constant's basis.

// From the end of one launch of a stream to the full speed of the next: the first drains, the second starts.
constexpr double kLaunchUs = 2.0;
// The extra time that a cooperative launch takes to begin.
constexpr double kCooperativeUs = 1.0;

// A load from memory and the merge of a block's threads.
constexpr double kLatencyUs = 1.0;
// Bytes of staged tensors that an SM reduces: 7.5 instructions per element of two bytes, 128 lanes, 1.7 GHz. Only the
// reduction of a wave's last copy group takes time of its own.
constexpr double kReduceBytesPerUs = 58000;
// Publish partials, sync and fetch: in a cluster through shared memory; in a grid through L2, with an atomic counter
// that all blocks watch: two trips of 0.7 us.
constexpr double kClusterBarrierUs = 0.5;
constexpr double kGridBarrierUs = 1.5;
// The fraction of a wave's latency and barrier that takes time even if other loads are under way all the time.
constexpr double kExposed = 0.1;

// One SM can draw so many times its share of the memory's bandwidth: two thirds of the SMs keep the memory busy.
constexpr double kOneSmShare = 1.5;

// The fraction of L2 that still holds the data read last, and L2's speed relative to memory's.
constexpr double kL2Share = 0.5;
constexpr double kL2Speed = 2.0;

// Contiguous bytes cost as much as so many bytes more: memory moves 64 bytes at a time and opens rows of kilobytes. A
// tile of 64 bytes gets four fifths of the bandwidth.
constexpr double kContiguousBytes = 16;

// The fraction of the bandwidth that contiguous pieces of this size get. Rows adjoin each other, and so do the
// positions of a tile of all channels: they get all of it.
double contiguous_share(const Grid& grid, const Streams& streams) {
  if (grid.traversal == Traversal::kRows || grid.tile == streams.C) return 1;
  const double bytes = static_cast<double>(grid.tile * size_of(streams.dtype));
  return bytes / (bytes + kContiguousBytes);
}

// The microseconds in which `blocks` blocks move so many bytes each.
double move_us(double bytes, int64_t blocks, const DeviceInfo& device) {
  const double busy = static_cast<double>(std::min<int64_t>(blocks, device.num_sms));
  const double share = std::min(1.0, busy * kOneSmShare / device.num_sms);
  return bytes * static_cast<double>(blocks) / (share * static_cast<double>(device.bytes_per_us));
}

double barrier_us(Gang gang) {
  return gang == Gang::kGrid ? kGridBarrierUs : gang == Gang::kCluster ? kClusterBarrierUs : 0;
}

}  // namespace

Estimate estimate_fused(const Grid& grid, const Streams& streams, int64_t resident, const DeviceInfo& device) {
  const int64_t wanted = div_up(grid.items, grid.teams());
  const int64_t together = std::min({wanted, resident, grid.blocks}), waves = div_up(wanted, together);
  const bool rows = grid.traversal == Traversal::kRows;
  const int64_t piece =
      rows ? grid.teams() * grid.piece_runs * grid.piece_length * grid.pack : grid.tile * grid.piece_length;
  const double stream = static_cast<double>(piece * size_of(streams.dtype)) / contiguous_share(grid, streams);
  const double bytes = stream * (streams.read + streams.written);
  Estimate e{};
  e.memory = static_cast<double>(waves - 1) * move_us(bytes, together, device) +
             move_us(bytes, wanted - (waves - 1) * together, device);
  // While a block waits, other copies use the memory: those of its second stage, and those of other blocks on the SM.
  // The blocks of a grid all wait together, so there only the second stage counts.
  const double staged = stream * streams.read * static_cast<double>(div_up(together, device.num_sms));
  const double wait = kLatencyUs + barrier_us(grid.gang) + staged / kCopyGroups / kReduceBytesPerUs;
  double hidden = 0;
  if (grid.gang == Gang::kGrid) {
    if (grid.stages == 2) hidden = move_us(stream * streams.read, together, device);
  } else {
    const double loads = static_cast<double>(grid.stages * together) / device.num_sms;
    const double one = move_us(bytes, std::min<int64_t>(together, device.num_sms), device);
    if (loads > 1) hidden = std::min((loads - 1) * one, move_us(bytes, together, device));
  }
  const double shown = std::max(hidden > 0 ? kExposed * wait : wait, wait - hidden);
  e.barriers = wait + static_cast<double>(waves - 1) * shown;
  return e;
}

Estimate estimate_passes(const Grid& grid, const Streams& streams, int passes, const DeviceInfo& device) {
  const double read = streams.bytes(streams.read);
  const double found = std::min(read, kL2Share * static_cast<double>(device.l2_bytes));
  const double bytes = passes * read + streams.bytes(streams.written) - (passes - 1) * found * (1 - 1 / kL2Speed);
  Estimate e{};
  e.memory = move_us(bytes / static_cast<double>(grid.blocks) / contiguous_share(grid, streams), grid.blocks, device);
  e.barriers = passes * kLatencyUs;
  return e;
}

Estimate estimate_launches(int launches, bool cooperative) {
  return {0, 0, launches * kLaunchUs + (cooperative ? kCooperativeUs : 0)};
}

Estimate estimate_partials(int64_t bytes, const DeviceInfo& device) {
  return {2 * static_cast<double>(bytes) / (kL2Speed * static_cast<double>(device.bytes_per_us)), 0, 0};
}

Estimate estimate_grid_sync() { return {0, kGridBarrierUs, 0}; }

}  // namespace fastnorm
