#include "plan_cuda.h"

#include <algorithm>
#include <numeric>

namespace fastnorm {

namespace {

// None of the figures below has been measured on a GPU yet; each says what it rests on.

constexpr int64_t kMaxBlocks = (int64_t(1) << 31) - 1;

// Packs that a thread of a team takes in one go (kUnroll in csrc/cuda/rows.cuh): a team is as wide as that needs.
constexpr int64_t kPacksPerThread = 4;

// Lanes that take neighbouring packs: as many as share a byte of the mask, and over rows a sector of 32 bytes.
int min_lanes(int pack) { return 8 / pack; }
int min_team(int pack) { return std::max(2, min_lanes(pack)); }

// A multiple of this many packs ends with a byte of the mask, however narrow they are.
constexpr int64_t kMaskPacks = 8;

// Blocks to a multiprocessor that a split aims at: two or three are there at a time, as registers allow, and either
// number goes into six whole rounds. More would be more partials: of 12 bytes a channel for columns.
constexpr int64_t kBlocksPerMultiprocessor = 6;

// The smallest piece worth a block of its own: 16 KB, what one multiprocessor of an H200 must have under way to be
// busy.
constexpr int64_t kMinPiecePacks = 1024;

// Offsets in a piece fit 32 bits, and its count of elements is exact in float32.
constexpr int64_t kMaxPiecePacks = int64_t(1) << 20;
constexpr int64_t kMaxPiecePositions = int64_t(1) << 20;

// Two blocks must fit a multiprocessor, so that one loads while the other stores; the driver keeps 1 KB of each.
constexpr int64_t kReservedShared = 1024;

// Sectors are 32 bytes and come in pairs: narrower tiles read what they do not use.
constexpr int64_t kMinTileBytes = 64;

// A warp merges the channels of a set in fused columns; the tile of a wider set would have no room for positions.
constexpr int64_t kMaxMergedChannels = 256;

constexpr int kMaxTilePacks = 32;

int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t align_up(int64_t bytes, int64_t unit = 16) { return div_up(bytes, unit) * unit; }
int64_t power_of_two(int64_t at_least) {
  int64_t p = 1;
  while (p < at_least) p *= 2;
  return p;
}

int64_t accum_size(DType dtype) { return dtype == DType::kFloat64 ? 8 : 4; }

// Shared memory of one block-wide reduction: a partial of three numbers a warp, and the result.
int64_t ladder_bytes(int threads, DType dtype) { return align_up((threads / kWarp + 1) * 3 * accum_size(dtype)); }

int64_t shared_limit(const DeviceInfo& device) {
  return std::min(device.shared_per_block, device.shared_per_multiprocessor / 2 - kReservedShared);
}

int64_t wanted_blocks(const DeviceInfo& device) { return kBlocksPerMultiprocessor * device.multiprocessors; }

Grid empty_grid(Traversal traversal, int pack) { return {traversal, pack, kWarp, 1, 1, 1, 1, 0, 0, 0, 0, 0}; }

// Threads of a team for so many packs, and teams of a block, spread over the device when there are few items.
void choose_team(Grid& grid, int64_t packs, const DeviceInfo& device) {
  const int64_t threads = power_of_two(div_up(packs, kPacksPerThread));
  grid.threads_x = static_cast<int>(std::clamp<int64_t>(threads, min_team(grid.pack), kBlockThreads));
  if (grid.threads_x >= kWarp) {
    const int64_t most = grid.threads_x > kWarp ? 1 : kBlockThreads / kWarp;
    grid.threads_y = static_cast<int>(std::clamp<int64_t>(grid.items / device.multiprocessors, 1, most));
  } else {
    const int per_warp = kWarp / grid.threads_x;
    const int64_t warps = grid.items / device.multiprocessors / per_warp;
    grid.threads_y = per_warp * static_cast<int>(std::clamp<int64_t>(warps, 1, kBlockThreads / kWarp));
  }
  grid.blocks = std::min(kMaxBlocks, div_up(grid.items, grid.threads_y));
}

Runs rows_runs(const Geometry& g) { return g.per_element() ? stat_runs(g) : weight_runs(g); }

// ---- rows ----

Grid split_rows(const Geometry& g, DType dtype, int pack, const DeviceInfo& device) {
  Grid grid = empty_grid(Traversal::kRows, pack);
  const Runs runs = rows_runs(g);
  const int64_t run_packs = runs.length / pack, packs = runs.count * run_packs;
  int64_t pieces = div_up(wanted_blocks(device), g.sets());
  pieces = std::clamp<int64_t>(pieces, 1, std::max<int64_t>(1, packs / kMinPiecePacks));
  const int64_t piece = std::min(kMaxPiecePacks, div_up(packs, pieces));
  if (run_packs > piece) {
    grid.piece_length = align_up(div_up(run_packs, div_up(run_packs, piece)), kMaskPacks);
    grid.pieces = runs.count * div_up(run_packs, grid.piece_length);
  } else {
    grid.piece_length = run_packs;
    grid.piece_runs = piece / run_packs;
    grid.pieces = div_up(runs.count, grid.piece_runs);
  }
  grid.items = g.sets() * grid.pieces;
  choose_team(grid, grid.piece_runs * grid.piece_length, device);
  grid.shared_bytes = ladder_bytes(grid.threads(), dtype);
  return grid;
}

// A team to a set; `set_bytes` of shared memory for each. False where no block has as much.
bool fused_rows(const Geometry& g, DType dtype, int pack, int64_t set_bytes, const DeviceInfo& device, Grid& grid) {
  grid = empty_grid(Traversal::kRows, pack);
  const Runs runs = rows_runs(g);
  grid.piece_runs = runs.count;
  grid.piece_length = runs.length / pack;
  grid.items = g.sets();
  const int64_t packs = grid.piece_runs * grid.piece_length;
  if (dtype == DType::kFloat64 || packs > kMaxPiecePacks) return false;
  choose_team(grid, packs, device);
  const int64_t ladder = ladder_bytes(kBlockThreads, dtype), limit = shared_limit(device) - ladder;
  const int step = std::max(1, kWarp / grid.threads_x);
  while (grid.threads_y > step && grid.threads_y * set_bytes > limit) {
    grid.threads_y = std::max(step, grid.threads_y / 2 / step * step);
  }
  grid.blocks = std::min(kMaxBlocks, div_up(grid.items, grid.threads_y));
  grid.team_bytes = set_bytes;
  grid.shared_bytes = grid.threads_y * set_bytes + ladder;
  return grid.threads_y * set_bytes <= limit;
}

// ---- columns ----

int64_t columns_merge_bytes(const Grid& grid, DType dtype) {
  return grid.threads() * grid.pack * 2 * accum_size(dtype);
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

// A block to a tile of whole sets and all their positions, `streams` tensors of it staged.
bool fused_columns(const Geometry& g, DType dtype, int pack, int streams, const DeviceInfo& device, Grid& grid) {
  grid = empty_grid(Traversal::kColumns, pack);
  if (dtype == DType::kFloat64 || g.set_channels() > kMaxMergedChannels) return false;
  // Whole sets, and whole bytes of the mask.
  const int64_t unit = std::lcm(g.set_channels(), int64_t(8)), size = size_of(dtype);
  grid.tile = std::min(g.C, unit * div_up(kMinTileBytes / size, unit));
  grid.threads_x = static_cast<int>(std::max<int64_t>(min_lanes(pack), power_of_two(grid.tile / pack)));
  grid.piece_length = g.positions();
  grid.items = g.outer() * div_up(g.C, grid.tile);
  if (grid.threads_x > kBlockThreads || g.positions() > kMaxPiecePositions) return false;
  grid.threads_y = kBlockThreads / grid.threads_x;
  grid.blocks = std::min(kMaxBlocks, grid.items);
  const int64_t staged = streams * align_up(grid.tile * g.positions() * size);
  // The merge of the threads' sums, and four numbers a set.
  grid.shared_bytes = staged + columns_merge_bytes(grid, dtype) + align_up(grid.tile * 4 * accum_size(dtype));
  return grid.shared_bytes <= shared_limit(device);
}

Grid split_grid(const Geometry& g, DType dtype, int pack, const DeviceInfo& device) {
  if (g.traversal() == Traversal::kRows) return split_rows(g, dtype, pack, device);
  return split_columns(g.outer(), g.positions(), g.C, dtype, pack, device);
}

// Partials that a fold merges: [outer, pieces, columns].
int64_t partials(const Geometry& g, const Grid& grid) {
  if (grid.traversal == Traversal::kColumns) return g.outer() * grid.pieces * g.C;
  return g.sets() * grid.pieces;
}

// ---- backward ----

// Every cell a set of its own, where a cell is a run or more.
Geometry cells_of(const Geometry& g) {
  Geometry cells = g;
  if (g.traversal() == Traversal::kRows && g.kind == Kind::kGroup && !g.per_element()) cells.G = g.C;
  return cells;
}

Units choose_units(const Geometry& g, const Grid& grid) {
  const int64_t cells = g.set_channels(), packs = grid.piece_runs * grid.piece_length / cells;
  Units units{};
  units.threads = static_cast<int>(std::min<int64_t>({kWarp, grid.threads_x, power_of_two(packs)}));
  const int64_t slots = grid.threads_x / units.threads;
  const int64_t segments = std::clamp<int64_t>(div_up(slots, cells), 1, std::max<int64_t>(1, packs / units.threads));
  units.length = div_up(packs, segments);
  units.segments = div_up(packs, units.length);
  return units;
}

// Shared memory of a team of fused backward rows: the staged tensors, the units' sums, the rows' gathered gradients.
bool fused_backward_rows(const Geometry& g, DType dtype, int pack, int streams, bool along, const DeviceInfo& device,
                         BackwardPlan& plan) {
  const int64_t staged = streams * align_up(g.set_size() * size_of(dtype)), pair = 2 * accum_size(dtype);
  if (g.per_element()) {
    const int64_t set_bytes = staged + (along ? align_up(g.D() * pair) : 0);
    if (!fused_rows(g, dtype, pack, set_bytes, device, plan.reduce)) return false;
    if (!along) return true;
    // Blocks stay and gather: as many as fit the device.
    const int64_t fit =
        std::min<int64_t>(kResidentThreads / plan.reduce.threads(),
                          device.shared_per_multiprocessor / (plan.reduce.shared_bytes + kReservedShared));
    plan.reduce.blocks = std::min(plan.reduce.blocks, std::max<int64_t>(1, fit) * device.multiprocessors);
    return true;
  }
  if (!fused_rows(g, dtype, pack, staged, device, plan.reduce)) return false;
  plan.units = choose_units(g, plan.reduce);
  const int64_t unit_sums = align_up(g.set_channels() * plan.units.segments * pair);
  return fused_rows(g, dtype, pack, staged + unit_sums, device, plan.reduce);
}

bool plan_fused_backward(const Geometry& g, DType dtype, int pack, const BackwardNeeds& needs, const DeviceInfo& device,
                         BackwardPlan& plan) {
  const int streams = needs.residual ? 3 : 2;
  const bool fits =
      g.traversal() == Traversal::kColumns
          ? fused_columns(g, dtype, pack, streams, device, plan.reduce)
          : fused_backward_rows(g, dtype, pack, streams, plan.param_sums == ParamSums::kAlong, device, plan);
  if (!fits) return false;
  plan.strategy = Strategy::kFused;
  const int64_t pair = 2 * accum_size(dtype);
  // A batch norm's fused sums are final, and are written as the gradients themselves.
  if (plan.param_sums == ParamSums::kShared && g.kind != Kind::kBatch) plan.sums_bytes = g.outer() * g.C * pair;
  if (plan.param_sums == ParamSums::kAlong) plan.params_bytes = plan.reduce.blocks * g.C * pair;
  return true;
}

}  // namespace

int pack_width(const Geometry& g, DType dtype, int alignment) {
  if (dtype == DType::kFloat64) return 1;
  const int64_t run = g.mask_run(), size = size_of(dtype);
  const bool rows = g.traversal() == Traversal::kRows;
  for (const int pack : {8, 4}) {
    // Half a pack of a half type serves rows alone: 14x14 maps; channels are multiples of 8 or odd.
    const bool instantiated = pack * size == 16 || (rows && pack * size == 8);
    if (instantiated && run % pack == 0 && pack * size <= alignment) return pack;
  }
  return 1;
}

ForwardPlan plan_forward(const Geometry& g, DType dtype, const ForwardNeeds& needs, const DeviceInfo& device) {
  const int pack = pack_width(g, dtype, needs.alignment);
  ForwardPlan plan{Strategy::kSplit, {}, 0};
  if (needs.frozen) {
    plan.strategy = Strategy::kApply;
  } else if (g.traversal() == Traversal::kColumns) {
    if (fused_columns(g, dtype, pack, 1, device, plan.grid)) plan.strategy = Strategy::kFused;
  } else {
    const int64_t set_bytes = align_up(g.set_size() * size_of(dtype));
    if (fused_rows(g, dtype, pack, set_bytes, device, plan.grid)) plan.strategy = Strategy::kFused;
  }
  if (plan.strategy == Strategy::kFused) return plan;
  plan.grid = split_grid(g, dtype, pack, device);
  if (plan.strategy == Strategy::kSplit) plan.workspace_bytes = partials(g, plan.grid) * 3 * accum_size(dtype);
  return plan;
}

BackwardPlan plan_backward(const Geometry& g, DType dtype, const BackwardNeeds& needs, const DeviceInfo& device) {
  const int pack = pack_width(g, dtype, needs.alignment);
  const Grid none = empty_grid(g.traversal(), pack);
  BackwardPlan plan{Strategy::kSplit, ParamSums::kNone, g, none, none, none, {}, 0, 0, 0};
  if (needs.frozen && !needs.params) {
    plan.strategy = Strategy::kApply;
    plan.apply = split_grid(g, dtype, pack, device);
    return plan;
  }
  if (needs.params) {
    // Gathered along the rows a channel has one place in every row, which several groups do not give.
    plan.param_sums = !g.per_element() ? ParamSums::kShared : g.G == 1 ? ParamSums::kAlong : ParamSums::kApart;
  }
  bool fused = needs.input && plan_fused_backward(g, dtype, pack, needs, device, plan);
  if (!fused && plan.param_sums == ParamSums::kAlong) {  // without what is gathered a set may fit
    plan.param_sums = ParamSums::kApart;
    fused = needs.input && plan_fused_backward(g, dtype, pack, needs, device, plan);
  }
  const int64_t pair = 2 * accum_size(dtype);
  if (!fused) {
    const bool terms = needs.input && !needs.frozen;
    plan.units = {};
    plan.reduce = none;
    if (terms || plan.param_sums == ParamSums::kShared) {
      plan.cells = cells_of(g);
      plan.reduce = split_grid(plan.cells, dtype, pack, device);
      plan.sums_bytes = partials(plan.cells, plan.reduce) * pair;
    }
    if (terms) plan.terms_bytes = g.sets() * pair;
    if (needs.input) plan.apply = split_grid(g, dtype, pack, device);
  }
  if (plan.param_sums == ParamSums::kApart) {
    // Rows have half packs of the half types, columns have not.
    plan.params = split_columns(1, g.N, g.C, dtype, pack * size_of(dtype) == 16 ? pack : 1, device);
    plan.params_bytes = plan.params.pieces * g.C * pair;
  }
  return plan;
}

namespace {

std::string to_string(const Grid& grid) {
  const auto number = [](int64_t n) { return std::to_string(n); };
  const bool rows = grid.traversal == Traversal::kRows;
  const std::string team = number(grid.threads_x) + "x" + number(grid.threads_y) + " threads";
  const std::string pieces =
      rows ? number(grid.pieces) + " pieces of " + number(grid.piece_runs) + "x" + number(grid.piece_length) + " packs"
           : number(grid.pieces) + " pieces of " + number(grid.piece_length) + " positions, tile " + number(grid.tile);
  return std::string(rows ? "rows" : "columns") + ", pack " + number(grid.pack) + ", " + pieces + ", " + team + ", " +
         number(grid.blocks) + " blocks, " + number(grid.shared_bytes) + " B shared";
}

const char* name_of(Strategy strategy) {
  return strategy == Strategy::kFused ? "fused" : strategy == Strategy::kSplit ? "split" : "apply";
}

}  // namespace

std::string to_string(const ForwardPlan& plan) {
  return std::string(name_of(plan.strategy)) + ": " + to_string(plan.grid) + "; workspace " +
         std::to_string(plan.workspace_bytes) + " B";
}

std::string to_string(const BackwardPlan& plan) {
  static const char* kSources[] = {"none", "shared", "along", "apart"};
  std::string text = name_of(plan.strategy);
  if (plan.reduce.items > 0) text += ": " + to_string(plan.reduce);
  if (plan.strategy == Strategy::kFused && plan.units.threads > 0) {
    text += "; units of " + std::to_string(plan.units.threads) + " threads, " + std::to_string(plan.units.segments) +
            " segments of " + std::to_string(plan.units.length);
  }
  if (plan.apply.items > 0) text += "; apply: " + to_string(plan.apply);
  text += std::string("; parameters ") + kSources[static_cast<int>(plan.param_sums)];
  if (plan.params.items > 0) text += ": " + to_string(plan.params);
  return text + "; workspace " + std::to_string(plan.workspace_bytes()) + " B";
}

}  // namespace fastnorm
