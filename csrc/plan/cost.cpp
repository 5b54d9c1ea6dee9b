#include "cost.h"

#include <algorithm>

#include "grid.h"

namespace fastnorm {

namespace {

// Fitted to the times of an H200 (benchmarks/results/tune-h200-*.json) by benchmarks/refit.py, but where a comment says
// that nothing was measured. Devices that were never measured go by the same constants.

// A launch and the end of its kernel. Three launches in a row take 9 us where they have nothing to do.
constexpr double kLaunchUs = 3.1;
// The extra time that a cooperative launch takes to begin.
constexpr double kCooperativeUs = 0.3;

// A load from memory, as far as it takes longer than the start of a kernel hides.
constexpr double kLatencyUs = 0.4;
// Publish partials and sync: in a cluster, whose blocks also start and end together; in a grid through L2, with an
// atomic counter that all blocks watch.
constexpr double kClusterBarrierUs = 2.1;
constexpr double kGridBarrierUs = 1.5;
// A trip to the partials of other blocks, which fetches kFetchedPartials of csrc/cuda/gang.cuh for each lane: from the
// shared memory of another block of the cluster (not measured: 210 cycles); through L2.
constexpr double kClusterFetchUs = 0.12;
constexpr double kGridFetchUs = 0.7;
constexpr int64_t kFetchedPartials = 2;  // of moments; twice as many of sums of gradients
// The fraction of a wave's latency and barrier that takes time even if other loads are under way all the time.
constexpr double kExposed = 0.4;
// Of gangs that share a grid: this, and so much over their number. Two gangs hide a tenth.
constexpr double kExposedInGrid = 0.65;
constexpr double kExposedInStep = 0.45;

// A trip in which the 32 lanes of a warp fetch kFoldedTogether partials each of a set (fold_forward and fold_terms of
// csrc/cuda/fold.cuh), and merge them in double. And one in which a lane fetches and adds a partial of a channel
// (fold_params): there loads do not wait for each other.
constexpr double kFoldTripUs = 1.3;
constexpr double kFoldParamsTripUs = 0.5;

// Kernels reach 4.1 TB/s of an H200's 4.8; a copy reaches 4.2.
constexpr double kCopyShare = 0.86;

// An SM has four schedulers, each of which issues an instruction for 32 lanes in a cycle when one of its warps is
// ready. Warps wait for results most of the time: with so many for a scheduler it issues in every second cycle. A
// thread that keeps its row in registers has 16 or 32 elements that do not depend on each other, and waits less.
constexpr double kSchedulers = 4, kLanes = 32;
// Staged rows come with what they need first (for_waves in csrc/cuda/gang.cuh).
constexpr double kHalfBusyWarps = 2.8;
constexpr double kHalfBusyRowsWarps = 1.0;
constexpr double kHalfBusyRegisterWarps = 0.5;

// One SM can draw so many times its share of the memory's bandwidth, 90 GB/s of an H200's: copies into shared memory
// with any number of threads, loads into registers with all threads that it holds.
constexpr double kOneSmShare = 2.5;

// The fraction of L2 that still holds the data read last: hardly any, because the bytes that are written go through L2,
// too. And L2's speed relative to memory's, not measured.
constexpr double kL2Share = 0.1;
constexpr double kL2Speed = 2.0;

// Contiguous bytes cost as much as so many bytes more: memory moves 64 bytes at a time and opens rows of kilobytes. A
// tile of 64 bytes gets three quarters of the bandwidth.
constexpr double kContiguousBytes = 20;

// What is read twice takes so much more in forward of float32 and in backward that writes a residual's gradient: why,
// was not found. The passes of split do not take it.
constexpr double kRereadMore = 0.2;

// What an element of a fused backward over rows takes beside kResidualWork where packs are narrow: measured and not
// counted, in 14x14 maps (packs of 8 bytes) and 7x7 maps (single elements).
constexpr double kNarrowResidualWork = 25;

// The fraction of the bandwidth that contiguous pieces of this size get. Rows adjoin each other, and so do the
// positions of a tile of all channels: they get all of it.
double contiguous_share(const Grid& grid, const Streams& streams) {
  if (grid.traversal == Traversal::kRows || grid.tile == streams.C) return 1;
  const double bytes = static_cast<double>(grid.tile * size_of(streams.dtype));
  return bytes / (bytes + kContiguousBytes);
}

// The microseconds in which so many bytes are moved while so many SMs are busy.
double move_us(double bytes, double busy, const DeviceInfo& device) {
  const double share = std::min(1.0, busy * kOneSmShare / device.num_sms);
  return bytes / (share * kCopyShare * static_cast<double>(device.bytes_per_us));
}

double half_busy_warps(const Grid& fused) {
  if (fused.place() == Place::kRegisters) return kHalfBusyRegisterWarps;
  return fused.traversal == Traversal::kRows ? kHalfBusyRowsWarps : kHalfBusyWarps;
}

// The microseconds in which the busiest of the SMs executes so many instructions for each of a block's elements.
double issue_us(const Grid& grid, double half_busy, double elements, double instructions, int64_t blocks,
                const DeviceInfo& device) {
  const int64_t each = div_up(blocks, device.num_sms);
  const double warps = static_cast<double>(each * grid.threads()) / (kLanes * kSchedulers);
  const double issued = kSchedulers * kLanes * warps / (warps + half_busy) * device.clock_mhz;
  return static_cast<double>(each) * elements * instructions / issued;
}

// Memory and issue of blocks of which so many are on the device at a time; wave_of(blocks) is the estimate of a wave.
template <class WaveOf>
Estimate in_waves(int64_t blocks, int64_t together, WaveOf wave_of) {
  const int64_t more = div_up(blocks, together) - 1;
  const Estimate wave = wave_of(together), last = wave_of(blocks - more * together);
  const double times = static_cast<double>(more);
  return {times * wave.memory + last.memory, times * wave.issue + last.issue, 0, 0};
}

// The fraction of the lanes that have channels. In rows all have elements but for the end of a piece.
double busy_lanes(const Grid& grid, const Streams& streams) {
  if (grid.traversal == Traversal::kRows) return 1;
  const int64_t lanes = div_up(streams.C, grid.tile) * grid.threads_x * grid.pack;
  return static_cast<double>(streams.C) / static_cast<double>(lanes);
}

// The fraction of a piece that is read twice.
double reread_share(const Grid& grid) {
  if (!grid.rereads()) return 0;
  return static_cast<double>(grid.piece_length - grid.staged_length) / static_cast<double>(grid.piece_length);
}

// How much longer a launch moves bytes than their number says, because of those that it reads twice.
double reread_slowdown(const Grid& grid, const Streams& streams) {
  const bool forward = streams.read == 1;  // backward reads x and dy
  const bool slow = forward ? size_of(streams.dtype) > 2 : streams.applied > 1;
  return slow ? 1 + kRereadMore * reread_share(grid) : 1;
}

// The fraction of a wave's latency and barrier that other blocks cannot hide.
double exposed_share(const Grid& grid) {
  if (grid.gang != Gang::kGrid) return kExposed;
  return std::min(1.0, kExposedInGrid + kExposedInStep * static_cast<double>(grid.pieces) / grid.blocks);
}

// The trips in which the threads of a block fetch the partials of so many channels from so many pieces, after
// GangPartials::merge_channels.
double fetch_trips(const Grid& grid, int64_t channels, int64_t pieces) {
  int64_t lanes = 1;
  while (lanes < kWarp && 2 * channels * lanes <= grid.threads()) lanes *= 2;
  const int64_t rounds = div_up(channels * lanes, grid.threads());
  return static_cast<double>(rounds * div_up(pieces, lanes < pieces ? kFetchedPartials * lanes : lanes));
}

}  // namespace

double exchange_us(const Grid& grid, DType dtype, const DeviceInfo& device) {
  if (grid.gang == Gang::kBlock) return 0;
  const double trip = grid.gang == Gang::kCluster ? kClusterFetchUs : kGridFetchUs;
  const int64_t channels = grid.traversal == Traversal::kColumns ? grid.tile : 1;
  if (grid.gang == Gang::kCluster) return kClusterBarrierUs + trip * fetch_trips(grid, channels, grid.pieces);
  const auto through_l2 = [&](int64_t partials) {  // of each block
    const double bytes = static_cast<double>(grid.blocks * partials * partial_size(dtype));
    return bytes / (kL2Speed * kCopyShare * static_cast<double>(device.bytes_per_us));
  };
  if (grid.exchange == Exchange::kGather) {
    return kGridBarrierUs + trip * fetch_trips(grid, channels, grid.pieces) + through_l2(channels * grid.pieces);
  }
  const int64_t share = div_up(channels, grid.pieces);
  return 2 * kGridBarrierUs + trip * (fetch_trips(grid, share, grid.pieces) + fetch_trips(grid, channels, 1)) +
         through_l2(2 * channels);
}

ElementWork element_work(bool backward, const Geometry& g, int pack, DType dtype, Activation activation,
                         bool residual) {
  const bool columns = g.traversal() == Traversal::kColumns, positions = g.sets_are_positions();
  const int full = size_of(dtype) > 2;  // the table's last index
  ElementWork work = kElementWork[backward][positions ? 3 : columns ? 2 : g.per_element() ? 1 : 0][full];
  double more = kActivationWork[backward][static_cast<int>(activation)][full];
  const bool narrow = pack * size_of(dtype) < 16;
  double times = 1;
  if (narrow) {
    const int single = pack == 1;
    times = kNarrowPacks[backward][full][positions ? 3 + single : columns ? 2 : single];
    work = {0, work.shared * times, work.reduce * times, work.apply * times, work.piece};
  }
  const double again = backward ? more / 2 : 0;  // both passes of backward need the derivative
  if (residual) more += kResidualWork[backward][full] * times;
  if (residual && backward && narrow && !columns && !positions) work.shared += kNarrowResidualWork * times;
  work = {work.registers + more, work.shared + more, work.reduce + again, work.apply + more - again, work.piece};
  // An SM has half as many units for float64.
  if (dtype == DType::kFloat64) work = {0, 2 * work.shared, 2 * work.reduce, 2 * work.apply, work.piece};
  return work;
}

Estimate estimate_fused(const Grid& grid, const Streams& streams, const ElementWork& work, int64_t resident,
                        const DeviceInfo& device) {
  const int64_t wanted = div_up(grid.items, grid.teams());
  const int64_t together = std::min({wanted, resident, grid.blocks}), waves = div_up(wanted, together);
  const bool rows = grid.traversal == Traversal::kRows;
  const int64_t piece =
      rows ? grid.teams() * grid.piece_runs * grid.piece_length * grid.pack : grid.tile * grid.piece_length;
  const double stream = static_cast<double>(piece * size_of(streams.dtype)) / contiguous_share(grid, streams);
  // Of what is read twice, L2 has kept a part.
  const double again = stream * streams.read * reread_share(grid);
  const double found = std::min(again, kL2Share * static_cast<double>(device.l2_bytes) / static_cast<double>(together));
  const double moved = stream * (streams.read + streams.applied) + again - found * (1 - 1 / kL2Speed);
  const double bytes = moved * reread_slowdown(grid, streams);
  const double elements = static_cast<double>(piece) / busy_lanes(grid, streams);
  const double instructions = grid.place() == Place::kRegisters
                                  ? work.registers
                                  : work.shared + reread_share(grid) * (work.reduce + work.apply - work.shared);
  const auto issue_of = [&](double of_block, double of_element, int64_t blocks) {
    return issue_us(grid, half_busy_warps(grid), of_block, of_element, blocks, device);
  };
  const auto wave_of = [&](int64_t blocks) {
    const double busy = static_cast<double>(std::min<int64_t>(blocks, device.num_sms));
    return Estimate{move_us(bytes * static_cast<double>(blocks), busy, device),
                    issue_of(elements, instructions, blocks), 0, 0};
  };
  Estimate e = in_waves(wanted, together, wave_of);
  const auto average = [&](double us) { return us / static_cast<double>(waves); };
  // Nothing else goes on while a block reduces its last copy group, merges its sums and those of its gang, and prepares
  // to apply them.
  const double merge = issue_of(grid.threads(), work.piece, together);
  const double last_group = grid.rereads() ? 0 : elements / kCopyGroups;  // what is beyond comes without delay
  const double wait =
      kLatencyUs + exchange_us(grid, streams.dtype, device) + issue_of(last_group, work.reduce, together) + merge;
  // While a block waits, other blocks on the SM go on with their work, and so do the copies of its own second stage.
  // The blocks of a grid that sync as one wait together.
  double hidden = 0;
  if (grid.gang != Gang::kGrid || grid.syncs_by_gang()) {
    const int64_t stages = rows ? grid.stages : 1;  // over columns a second stage hides nothing: measured
    const double loads = static_cast<double>(stages * together) / device.num_sms;
    const double one = wave_of(std::min<int64_t>(together, device.num_sms)).total();
    if (loads > 1) hidden = std::min((loads - 1) * one, average(e.total()));
  }
  // What is hidden is work for the SM still.
  const double at_least = std::max(exposed_share(grid) * wait, average(e.issue - e.total()) + merge);
  const double shown = hidden > 0 ? std::max(at_least, wait - hidden) : wait;
  e.barriers = wait + static_cast<double>(waves - 1) * shown;
  return e;
}

Estimate estimate_pass(const Grid& grid, const Streams& streams, int moved, bool again, double instructions,
                       const DeviceInfo& device) {
  const double left = again ? kL2Share * static_cast<double>(device.l2_bytes) : 0;
  const double found = std::min(left, streams.bytes(streams.read));
  const double all = static_cast<double>(grid.blocks);
  const double bytes = (streams.bytes(moved) - found * (1 - 1 / kL2Speed)) / contiguous_share(grid, streams) / all;
  const double elements = static_cast<double>(streams.numel) / busy_lanes(grid, streams) / all;
  const int64_t each = std::max(1, kResidentThreads / grid.threads());
  const auto wave_of = [&](int64_t blocks) {
    const double full = static_cast<double>(blocks) / static_cast<double>(each);  // SMs
    return Estimate{move_us(bytes * static_cast<double>(blocks), full, device),
                    issue_us(grid, kHalfBusyWarps, elements, instructions, blocks, device), 0, 0};
  };
  Estimate e = in_waves(grid.blocks, std::min(grid.blocks, each * device.num_sms), wave_of);
  e.barriers = kLatencyUs;
  return e;
}

Estimate estimate_fold(int64_t sets, int64_t partials, const DeviceInfo& device) {
  const int64_t warps = int64_t(device.num_sms) * kResidentThreads / kWarp;  // each has a set at a time
  const int64_t trips = div_up(partials, kFoldedTogether * kWarp) + 1;       // and one to the set's own numbers
  return {0, 0, kFoldTripUs * static_cast<double>(trips * div_up(sets, warps)), 0};
}

Estimate estimate_fold_params(int64_t channels, int64_t partials, const DeviceInfo& device) {
  const int64_t trips = std::max(std::min<int64_t>(partials, 8), div_up(partials, kWarp));  // fold_lanes of fold.cuh
  const int64_t threads = int64_t(device.num_sms) * kResidentThreads, lanes = channels * div_up(partials, trips);
  return {0, 0, kFoldParamsTripUs * static_cast<double>((trips + 1) * div_up(lanes, threads)), 0};
}

Estimate estimate_launches(int launches, bool cooperative) {
  return {0, 0, 0, launches * kLaunchUs + (cooperative ? kCooperativeUs : 0)};
}

Estimate estimate_partials(int64_t bytes, const DeviceInfo& device) {
  return {2 * static_cast<double>(bytes) / (kL2Speed * static_cast<double>(device.bytes_per_us)), 0, 0, 0};
}

Estimate estimate_grid_sync() { return {0, 0, kGridBarrierUs, 0}; }

}  // namespace fastnorm
