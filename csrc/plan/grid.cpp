#include "grid.h"

#include <algorithm>
#include <numeric>

namespace fastnorm {

namespace {

// Each comment gives the basis of its figure. On an H200 benchmarks/tune.py has raced the plans that they lead to.

// Half of a launch's limit, because some launches contain the blocks of two grids.
constexpr int64_t kMaxBlocks = int64_t(1) << 30;

// Packs that a thread of a team has under way at a time (kRowsUnroll in csrc/cuda/rows.cuh). A team has as many threads
// as that needs.
constexpr int64_t kPacksPerThread = 4;
// A thread's instructions of one item are worth as many as those of five packs. Where the device has threads enough, a
// team has fewer of them, and each takes so many packs.
constexpr int64_t kMostPacksPerThread = 16;

// The least number of lanes that take neighbouring packs: the lanes that share a byte of the mask; in rows also those
// that share a sector of 32 bytes.
int min_lanes(int pack) { return 8 / pack; }
int min_team(int pack) { return std::max(2, min_lanes(pack)); }

// A multiple of so many packs ends with a whole byte of the mask, however narrow the packs are.
constexpr int64_t kMaskPacks = 8;

// The blocks per SM that a split aims at. Registers allow two or three at a time, and six is a multiple of both. More
// blocks would write more partials: 16 bytes per channel for columns.
constexpr int64_t kSplitBlocksPerSm = 6;

// The smallest piece that is worth a block of its own: 16 KB, the bytes that one SM of an H200 must have under way to
// be busy.
constexpr int64_t kMinPiecePacks = 1024;

// Up to these, offsets in a piece fit 32 bits, and float32 counts its elements exactly.
constexpr int64_t kMaxPiecePacks = int64_t(1) << 20;
constexpr int64_t kMaxPiecePositions = int64_t(1) << 20;
// Likewise the packs of memory between the first pack of a rows piece and its last.
constexpr int64_t kMaxPieceOffset = int64_t(1) << 31;

// The driver keeps 1 KB of every block's shared memory. An SM gives it out in units.
constexpr int64_t kReservedShared = 1024;
int64_t shared_unit(const DeviceInfo& device) { return device.capability < 80 ? 256 : 128; }

// In fused columns a warp merges the channels of a set. The tile of a wider set would have no room for positions.
constexpr int64_t kMaxMergedChannels = 256;

constexpr int kMaxTilePacks = 32;

// Rows in registers: the rows of a team fit 32 bits, however few blocks there are.
constexpr int64_t kMaxRegisterRows = int64_t(1) << 30;

int64_t align_up(int64_t bytes, int64_t unit = 16) { return div_up(bytes, unit) * unit; }
int64_t power_of_two(int64_t at_least) {
  int64_t p = 1;
  while (p < at_least) p *= 2;
  return p;
}

int64_t wanted_blocks(const DeviceInfo& device) { return kSplitBlocksPerSm * device.num_sms; }

// Chooses the threads of a team for so many packs, and the teams of a block: fewer where few items have to spread over
// the device.
void choose_team(Grid& grid, int64_t packs, const DeviceInfo& device, bool full_blocks,
                 int block_threads = kBlockThreads) {
  int64_t threads = power_of_two(div_up(packs, kPacksPerThread));
  while (threads > kWarp && threads / 2 * kMostPacksPerThread >= packs &&
         grid.items * threads / 2 >= kResidentThreads * device.num_sms) {
    threads /= 2;
  }
  grid.threads_x = static_cast<int>(std::clamp<int64_t>(threads, min_team(grid.pack), block_threads));
  if (full_blocks && grid.threads_x > kWarp) grid.threads_x = block_threads;
  const int64_t spread = full_blocks ? grid.items : grid.items / device.num_sms;
  if (grid.threads_x >= kWarp) {
    const int64_t most = grid.threads_x > kWarp ? 1 : block_threads / kWarp;
    grid.threads_y = static_cast<int>(full_blocks ? most : std::clamp<int64_t>(spread, 1, most));
  } else {
    const int per_warp = kWarp / grid.threads_x, most = block_threads / kWarp;
    grid.threads_y =
        per_warp * (full_blocks ? most : static_cast<int>(std::clamp<int64_t>(spread / per_warp, 1, most)));
  }
  grid.blocks = std::min(kMaxBlocks, div_up(grid.items, grid.threads_y));
}

// Cuts a set into pieces, about as many as that. A piece is several whole runs or a part of one.
void cut_runs(const Runs& runs, int64_t pieces, Grid& grid) {
  const int64_t run_packs = runs.length / grid.pack;
  const int64_t most_runs = std::max<int64_t>(1, kMaxPieceOffset / std::max<int64_t>(1, runs.stride / grid.pack));
  if (pieces > runs.count) {
    const int64_t parts = std::min(pieces / runs.count, run_packs);
    grid.piece_length = parts == 1 ? run_packs : align_up(div_up(run_packs, parts), kMaskPacks);
    grid.pieces = runs.count * div_up(run_packs, grid.piece_length);
  } else {
    grid.piece_length = run_packs;
    grid.piece_runs = std::min(most_runs, div_up(runs.count, pieces));
    grid.pieces = div_up(runs.count, grid.piece_runs);
  }
}

Grid split_rows(const Geometry& g, DType dtype, int pack, const DeviceInfo& device, bool full_blocks) {
  Grid grid = empty_grid(Traversal::kRows, pack);
  const Runs runs = rows_runs(g);
  const int64_t run_packs = runs.length / pack, packs = runs.count * run_packs;
  int64_t pieces = div_up(wanted_blocks(device), g.sets());
  pieces = std::clamp<int64_t>(pieces, 1, std::max<int64_t>(1, packs / kMinPiecePacks));
  const int64_t piece = std::min(kMaxPiecePacks, div_up(packs, pieces));
  if (run_packs > piece) {
    cut_runs(runs, runs.count * div_up(run_packs, piece), grid);
  } else {
    cut_runs(runs, div_up(runs.count, piece / run_packs), grid);
  }
  grid.items = g.sets() * grid.pieces;
  choose_team(grid, grid.piece_runs * grid.piece_length, device, full_blocks);
  grid.shared_bytes = ladder_bytes(grid.threads(), static_cast<int>(accum_size(dtype)));
  return grid;
}

// A row that a team keeps in registers. A thread's first half of packs exists in every team (RowTeam::has in
// csrc/cuda/register_rows.cuh).
bool register_rows(const Geometry& g, DType dtype, const Staging& staging, const FusedChoice& choice,
                   const DeviceInfo& device, Grid& grid) {
  if (!g.per_element() || g.G != 1 || grid.pack * size_of(dtype) != 16) return false;
  const int64_t packs = g.set_size() / grid.pack;
  const int elements = staging.backward ? kBackwardElements : kForwardElements;
  grid.thread_packs = elements / grid.pack;
  if (packs < grid.thread_packs / 2 * min_team(grid.pack) || packs > kResidentThreads * grid.thread_packs) return false;
  grid.piece_length = packs;
  grid.items = g.sets();
  const int64_t threads = div_up(packs, grid.thread_packs);
  grid.threads_x = static_cast<int>(threads > kWarp ? align_up(threads, kWarp)
                                                    : std::max<int64_t>(min_team(grid.pack), power_of_two(threads)));
  // Small blocks, because all teams of a block wait for each other. Backward has fewer partials with larger ones.
  const int threads_of_block = staging.backward ? kBlockThreads : kBlockThreads / 2;
  const int64_t step = std::max(1, kWarp / grid.threads_x), most = std::max(1, threads_of_block / grid.threads_x);
  // The ring of every thread and its weights, as float32; in forward also its biases.
  const int64_t thread_bytes = int64_t(choice.stages) * staging.streams * grid.thread_packs * 16;
  const int64_t team_bytes = grid.threads_x * (thread_bytes + elements * 4 * (staging.backward ? 1 : 2));
  const int64_t room = (shared_limit(choice.blocks_per_sm, device) - kRegisterLadderBytes) / team_bytes;
  const int64_t teams = std::min({most, room, std::max(step, g.sets() / device.num_sms)}) / step * step;
  grid.threads_y = static_cast<int>(teams);
  grid.team_bytes = grid.threads_x * thread_bytes;
  grid.shared_bytes = kRegisterLadderBytes + teams * team_bytes;
  return teams > 0 && g.sets() <= kMaxRegisterRows;
}

int64_t columns_merge_bytes(const Grid& grid, DType dtype) {
  return merged_packs(grid.threads(), grid.threads_x) * grid.pack * 2 * accum_size(dtype);
}

// The channels of a tile, which has whole sets and whole bytes of the mask.
int64_t fused_tile(const Geometry& g, DType dtype, int64_t tile_bytes) {
  const int64_t unit = std::lcm(g.set_channels(), int64_t(8));
  return std::min(g.C, unit * div_up(std::max<int64_t>(1, tile_bytes / size_of(dtype)), unit));
}

// Bytes of a cluster's partials of two waves, in each block's shared memory.
int64_t partial_bytes(Gang gang, int64_t channels, DType dtype) {
  return gang == Gang::kCluster ? align_up(2 * channels * partial_size(dtype)) : 0;
}

bool fused_rows(const Geometry& g, DType dtype, const Staging& staging, const FusedChoice& choice,
                const DeviceInfo& device, Grid& grid) {
  cut_runs(rows_runs(g), choice.pieces, grid);
  const int64_t packs = grid.piece_runs * grid.piece_length;
  if (packs > kMaxPiecePacks) return false;
  grid.items = g.sets() * grid.pieces;
  choose_team(grid, packs, device, false, choice.block_threads());
  if (choice.gang != Gang::kBlock) {  // few blocks of many threads have less to exchange
    grid.threads_x = static_cast<int>(std::clamp<int64_t>(power_of_two(packs), kWarp, choice.block_threads()));
    grid.threads_y = 1;
  }
  const int64_t pair = 2 * accum_size(dtype);
  grid.team_bytes = choice.stages * staging.streams * grid.stream_bytes(dtype);
  if (staging.gathers) grid.team_bytes += align_up(grid.piece_length * grid.pack * pair);
  if (staging.backward && has_units(g, grid)) {
    grid.team_bytes += align_up(grid.piece_runs * choose_units(grid).segments * pair);
  }
  const auto shared_bytes = [&] {
    return grid.threads_y * grid.team_bytes + ladder_bytes(grid.threads(), static_cast<int>(accum_size(dtype))) +
           partial_bytes(choice.gang, 1, dtype);
  };
  const int64_t limit = shared_limit(choice.blocks_per_sm, device);
  const int step = std::max(1, kWarp / grid.threads_x);
  while (grid.threads_y > step && shared_bytes() > limit) {
    grid.threads_y = std::max(step, grid.threads_y / 2 / step * step);
  }
  grid.shared_bytes = shared_bytes();
  return grid.shared_bytes <= limit;
}

bool fused_columns(const Geometry& g, DType dtype, const Staging& staging, const FusedChoice& choice,
                   const DeviceInfo& device, Grid& grid) {
  if (g.set_channels() > kMaxMergedChannels) return false;
  grid.tile = fused_tile(g, dtype, choice.tile_bytes);
  grid.threads_x =
      static_cast<int>(std::max<int64_t>(min_lanes(grid.pack), power_of_two(div_up(grid.tile, grid.pack))));
  grid.piece_length = div_up(g.positions(), std::min(choice.pieces, g.positions()));
  grid.pieces = div_up(g.positions(), grid.piece_length);
  grid.items = g.outer() * div_up(g.C, grid.tile) * grid.pieces;
  if (grid.threads_x > choice.block_threads() || grid.piece_length > kMaxPiecePositions) return false;
  grid.threads_y = choice.block_threads() / grid.threads_x;
  // The merge of the threads' sums, four numbers per set, and the cluster's partials; then the stages.
  grid.shared_bytes = columns_merge_bytes(grid, dtype) + align_up(grid.tile * 4 * accum_size(dtype)) +
                      partial_bytes(choice.gang, grid.tile, dtype);
  const int64_t limit = shared_limit(choice.blocks_per_sm, device);
  grid.staged_length = grid.piece_length;
  if (choice.staged_length > 0) {
    if (grid.pack * size_of(dtype) != 16) return false;  // there are no kernels for single elements
    const int64_t position_bytes = choice.stages * staging.streams * grid.tile * size_of(dtype);
    const int64_t room = std::min(choice.staged_length, (limit - grid.shared_bytes) / position_bytes);
    grid.staged_length = room / grid.threads_y * grid.threads_y;  // a thread goes on where it would have
    if (grid.staged_length <= 0 || grid.staged_length >= grid.piece_length) return false;
  }
  grid.shared_bytes += choice.stages * staging.streams * grid.stream_bytes(dtype);
  return grid.shared_bytes <= limit;
}

// Layer norm over the channels of planar maps: a block has a tile of positions with all their channels, and keeps as
// many rows of it as fit. A warp adds up the sums of a row, for the gradients of weight and bias. Where not even a row
// for each row of threads fits, the block has fewer of them.
bool fused_positions(const Geometry& g, DType dtype, const Staging& staging, const FusedChoice& choice,
                     const DeviceInfo& device, Grid& grid) {
  grid.tile = std::min(g.S, align_up(div_up(choice.tile_bytes, size_of(dtype)), 8));  // whole bytes of the mask
  const int64_t threads_x = std::max<int64_t>(min_lanes(grid.pack), power_of_two(div_up(grid.tile, grid.pack)));
  if (threads_x > kWarp) return false;
  grid.threads_x = static_cast<int>(threads_x);
  grid.piece_length = g.C;
  grid.items = g.N * div_up(g.S, grid.tile);
  const int64_t streams = choice.stages * staging.streams, row_bytes = streams * grid.tile * size_of(dtype);
  const int64_t wanted = choice.staged_length > 0 ? std::min(choice.staged_length, g.C) : g.C;
  for (int threads = choice.block_threads(); threads >= kWarp; threads /= 2) {
    grid.threads_y = threads / grid.threads_x;
    const int64_t merge = columns_merge_bytes(grid, dtype) + align_up(grid.tile * 4 * accum_size(dtype));
    // What remains of a tensor that is padded to whole blocks of 16 bytes.
    const int64_t room = shared_limit(choice.blocks_per_sm, device) - merge - streams * 16;
    grid.staged_length = std::min(wanted, room / row_bytes);
    if (grid.staged_length < g.C) grid.staged_length = grid.staged_length / grid.threads_y * grid.threads_y;
    grid.shared_bytes = merge + streams * grid.stream_bytes(dtype);
    if (grid.staged_length > 0) return true;
  }
  return false;
}

}  // namespace

int64_t moments_size(DType dtype) { return 4 * accum_size(dtype); }

int64_t shared_limit(int blocks_per_sm, const DeviceInfo& device) {
  return std::min(device.shared_per_block, device.shared_per_sm / blocks_per_sm - kReservedShared);
}

Grid empty_grid(Traversal traversal, int pack) {
  return {traversal, pack, kWarp, 1, 1, 1, 1, 0, 0, 0, 0, 0, Gang::kBlock, 1, 0, Exchange::kGather, 0};
}

Grid split_columns(int64_t outer, int64_t positions, int64_t C, DType dtype, int pack, const DeviceInfo& device) {
  Grid grid = empty_grid(Traversal::kColumns, pack);
  grid.threads_x = static_cast<int>(std::clamp<int64_t>(power_of_two(C / pack), min_lanes(pack), kMaxTilePacks));
  grid.threads_y = kBlockThreads / grid.threads_x;
  grid.tile = std::min<int64_t>(C, grid.threads_x * pack);
  const int64_t tiles = div_up(C, grid.tile), least = grid.threads_y * 2 * kPacksPerThread;
  int64_t pieces = div_up(wanted_blocks(device), outer * tiles);
  pieces = std::clamp<int64_t>(pieces, 1, std::max<int64_t>(1, positions / least));
  grid.piece_length = std::min(kMaxPiecePositions, div_up(positions, pieces));
  grid.pieces = div_up(positions, grid.piece_length);
  grid.items = outer * grid.pieces * tiles;
  grid.blocks = std::min(kMaxBlocks, grid.items);
  grid.shared_bytes = columns_merge_bytes(grid, dtype);
  return grid;
}

Grid split_grid(const Geometry& g, DType dtype, int pack, const DeviceInfo& device, bool full_blocks) {
  if (g.traversal() == Traversal::kRows) return split_rows(g, dtype, pack, device, full_blocks);
  return split_columns(g.outer(), g.positions(), g.C, dtype, pack, device);
}

bool has_units(const Geometry& g, const Grid& grid) { return g.cells_are_runs() && grid.piece_runs > 1; }

Units choose_units(const Grid& grid) {
  Units units{};
  units.threads = static_cast<int>(std::min<int64_t>({kWarp, grid.threads_x, power_of_two(grid.piece_length)}));
  const int64_t slots = grid.threads_x / units.threads;
  const int64_t most = std::max<int64_t>(1, grid.piece_length / units.threads);
  const int64_t segments = std::clamp<int64_t>(div_up(slots, grid.piece_runs), 1, most);
  units.length = div_up(grid.piece_length, segments);
  units.segments = div_up(grid.piece_length, units.length);
  return units;
}

StagedSets staged_sets(const Geometry& g, DType dtype, int64_t tile_bytes) {
  if (g.traversal() == Traversal::kRows) return {g.set_size() * size_of(dtype), g.sets()};
  const int64_t tile = fused_tile(g, dtype, tile_bytes);
  return {tile * g.positions() * size_of(dtype), g.outer() * div_up(g.C, tile)};
}

int64_t co_resident_blocks(const Grid& grid, const DeviceInfo& device) {
  const int64_t by_registers = kResidentThreads / grid.threads();
  const int64_t by_threads = device.threads_per_sm / grid.threads();
  const int64_t by_shared = device.shared_per_sm / align_up(grid.shared_bytes + kReservedShared, shared_unit(device));
  const int64_t each = std::min({by_registers, by_threads, by_shared});
  if (grid.gang != Gang::kCluster) return each * device.num_sms;
  // Smaller clusters lie within the places of the largest.
  const int64_t largest = device.largest_cluster;
  return largest > 0 ? device.cluster_sms / largest * (largest * each / grid.pieces) * grid.pieces : 0;
}

bool fused_grid(const Geometry& g, DType dtype, int pack, const Staging& staging, const FusedChoice& choice,
                const DeviceInfo& device, Grid& grid) {
  grid = empty_grid(g.traversal(), pack);
  if (dtype == DType::kFloat64 && !g.sets_are_positions()) return false;
  const auto make = g.sets_are_positions()              ? fused_positions
                    : choice.place == Place::kRegisters ? register_rows
                    : g.traversal() == Traversal::kRows ? fused_rows
                                                        : fused_columns;
  const bool fits = make(g, dtype, staging, choice, device, grid);
  // A gang of one block is Gang::kBlock, and no other gang has one.
  if (!fits || (grid.pieces == 1) != (choice.gang == Gang::kBlock)) return false;
  if (choice.gang == Gang::kCluster && grid.pieces > device.largest_cluster) return false;
  grid.gang = choice.gang;
  grid.stages = choice.stages;
  const int64_t blocks = div_up(grid.items, grid.teams());
  int64_t resident = co_resident_blocks(grid, device);
  resident = resident / grid.pieces * grid.pieces;
  grid.blocks = std::min(choice.persistent ? resident : kMaxBlocks / grid.pieces * grid.pieces, blocks);
  return resident > 0;
}

}  // namespace fastnorm
