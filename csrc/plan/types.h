// The values of CUDA planning: a device's facts, the cut of a launch, a plan. No choice is made here.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>

#include "core/activation.h"
#include "core/dtype.h"
#include "core/fields.h"
#include "core/geometry.h"

namespace fastnorm {

struct DeviceInfo {
  int capability;  // 90 for sm_90
  int num_sms;
  int clock_mhz;  // of the SMs
  int threads_per_sm;
  int64_t shared_per_sm, shared_per_block;  // bytes; per block: what a kernel may opt in to
  int64_t l2_bytes;
  int64_t bytes_per_us;       // peak bandwidth of global memory
  int largest_cluster;        // blocks; 1: no clusters
  int cluster_sms;            // SMs that clusters of the largest size cover at a time, with one block per SM
  bool cooperative;           // the device has cooperative launches, whose blocks may wait for each other
  bool cooperative_clusters;  // and these may have clusters

  bool operator==(const DeviceInfo&) const = default;
};
FASTNORM_FIELDS(DeviceInfo, capability, num_sms, clock_mhz, threads_per_sm, shared_per_sm, shared_per_block, l2_bytes,
                bytes_per_us, largest_cluster, cluster_sms, cooperative, cooperative_clusters)

// The threads of an SM: the kernels are compiled for one block of so many (__launch_bounds__), which leaves each 128
// registers. tests/check_sass.py holds the compiler's report to that.
constexpr int kResidentThreads = 512;
// The most threads of a block, two of which then share an SM; a block that has an SM to itself takes all of them.
constexpr int kBlockThreads = kResidentThreads / 2;
constexpr int kWarp = 32;
constexpr int kMaxCluster = 16;

// Rows in registers: a thread keeps so many elements of a row; fewer in backward, which keeps several numbers for each.
constexpr int kForwardElements = 32;
constexpr int kBackwardElements = 16;
// The shared memory of their reductions over a team: two numbers of every warp, for two reductions.
constexpr int kRegisterLadderBytes = 2 * (kResidentThreads / kWarp) * 2 * 4;

// A staged piece lands in so many cp.async groups: a block reduces the first while the last are under way.
constexpr int kCopyGroups = 4;

// A lane of a fold has so many partials under way.
constexpr int kFoldedTogether = 8;

// The shared memory of a reduction over a block: an accumulator of three numbers for every warp, and the result.
FASTNORM_HOST_DEVICE constexpr int ladder_bytes(int threads, int number_bytes) {
  return ((threads / kWarp + 1) * 3 * number_bytes + 15) / 16 * 16;
}

// Columns: the packs of accumulators that a block merges in shared memory. The lanes of a warp that have the same
// channels merge theirs by shuffles first.
FASTNORM_HOST_DEVICE constexpr int merged_packs(int threads, int threads_x) {
  return threads_x < kWarp ? threads / kWarp * threads_x : threads;
}

// Where a fused launch keeps its sets.
enum class Place : int { kShared = 0, kRegisters = 1 };

enum class Strategy : int { kFused = 0, kSplit = 1, kApply = 2 };

// What the blocks of a gang exchange for a channel, or a set of rows: two numbers.
constexpr int64_t partial_size(DType dtype) { return 2 * accum_size(dtype); }

// The blocks that share a set or a tile in a fused launch; each has a piece.
enum class Gang : int {
  kBlock = 0,    // one block: nothing to share
  kCluster = 1,  // a cluster: partials in distributed shared memory, a cluster barrier
  kGrid = 2,     // `pieces` blocks of a cooperative launch: partials in global memory, the grid's barrier
};

// How the blocks of a grid's gang come to the sums of its channels.
enum class Exchange : int {
  kGather = 0,   // every block merges the partials of all channels
  kScatter = 1,  // columns: a block merges those of some channels for its gang; a second barrier
};

// One launch. Rows: a team of threads_x threads takes a piece of a set, and a block has threads_y teams (more than one
// only where a team is a warp or less, or keeps rows in registers). Columns: a block takes threads_x packs of channels
// side by side and walks down a piece of the positions, threads_y at a time.
//
// Items are pieces. Fused: the pieces of a set or tile are neighbours, and so are the blocks of a gang. A wave is one
// item for every team of the launch, and waves follow each other.
struct Grid {
  Traversal traversal;
  int pack;  // elements of one access; divides every run, and every access is aligned
  int threads_x, threads_y;
  int64_t pieces;         // per set (rows) or per outer (columns, whose positions are cut); fused: the blocks of a gang
  int64_t piece_runs;     // rows: runs of a piece, whole ones where there is more than one; columns: 1
  int64_t piece_length;   // rows: packs of a run in a piece; columns: positions
  int64_t tile;           // columns: channels of a block, at most threads_x * pack; rows: 0
  int64_t items;          // sets * pieces (rows), outer * pieces * tiles (columns)
  int64_t blocks;         // of the launch; where there are more items, a block takes them in strides
  int64_t shared_bytes;   // dynamic shared memory of a block
  int64_t team_bytes;     // fused rows: each team's own part of it (not its weights, which registers need); else 0
  Gang gang;              // fused; else kBlock
  int stages;             // fused: 2 where the next wave is loaded during this one; else 1
  int64_t staged_length;  // columns, fused: positions of a piece that stay in shared memory; the rest is read twice
  Exchange exchange;      // kGrid
  int thread_packs;       // packs of a row that a thread keeps in registers, while its `stages` have the rows after it;
                          // 0: sets are kept in shared memory

  int threads() const { return threads_x * threads_y; }
  // Packs that a staged run occupies in shared memory. Single elements are copied in aligned blocks of 16 bytes, so
  // that a run may begin in the middle of one.
  int64_t run_slots(DType dtype) const {
    const int64_t lanes = 16 / size_of(dtype);
    return pack > 1 ? piece_length : (piece_length + lanes - 2) / lanes * lanes + lanes;
  }
  // Bytes of one staged tensor of a piece.
  int64_t stream_bytes(DType dtype) const {
    const int64_t packs = traversal == Traversal::kRows ? piece_runs * run_slots(dtype) : tile * staged_length / pack;
    return (packs * pack * size_of(dtype) + 15) / 16 * 16;
  }
  // Bytes of the partials of gangs that are grids, for two waves, and of the sums that they exchange where they
  // scatter.
  int64_t partials_bytes(DType dtype) const {
    if (gang != Gang::kGrid) return 0;
    const int64_t channels = traversal == Traversal::kColumns ? tile : 1;
    const int64_t sums = exchange == Exchange::kScatter ? blocks / pieces : 0;
    return 2 * (blocks + sums) * channels * partial_size(dtype);
  }
  // Items that a block takes at a time.
  int teams() const { return traversal == Traversal::kRows ? threads_y : 1; }
  // Whether the gangs of a grid wait each for its own blocks: where there are several, and several waves.
  bool syncs_by_gang() const { return gang == Gang::kGrid && blocks > pieces && items > blocks; }
  bool rereads() const { return staged_length > 0 && staged_length < piece_length; }
  Place place() const { return thread_packs > 0 ? Place::kRegisters : Place::kShared; }
  bool operator==(const Grid&) const = default;
};
FASTNORM_FIELDS(Grid, traversal, pack, threads_x, threads_y, pieces, piece_runs, piece_length, tile, items, blocks,
                shared_bytes, team_bytes, gang, stages, staged_length, exchange, thread_packs)

// The number of pieces that a run is cut into; 1 where pieces have whole runs.
inline int64_t run_pieces(const Geometry& g, const Grid& grid) {
  const bool parts = grid.traversal == Traversal::kRows && grid.piece_runs == 1;
  return parts ? grid.pieces / rows_runs(g).count : 1;
}

// The microseconds that the planner expects of a call. They serve to compare plans and promise nothing.
struct Estimate {
  double memory;    // bytes over the part of the bandwidth that the launch can use
  double issue;     // instructions over what the SMs issue
  double barriers;  // of clusters and grids, and the latency of memory where nothing hides it
  double launches;

  // Memory and issue go on side by side, but neither without a pause: together they take longer than each.
  double total() const { return std::hypot(memory, issue) + barriers + launches; }
  Estimate operator+(const Estimate& o) const {
    return {memory + o.memory, issue + o.issue, barriers + o.barriers, launches + o.launches};
  }
};
FASTNORM_FIELDS(Estimate, memory, issue, barriers, launches)

struct ForwardPlan {
  Strategy strategy;
  Grid grid;                // of every launch except fold
  int64_t workspace_bytes;  // partials of split, or of gangs that are grids
  int launches;
  Estimate estimate;
};
FASTNORM_FIELDS(ForwardPlan, strategy, grid, workspace_bytes, launches, estimate)
// Plans are equal where their launches are, whatever the estimates.
inline bool operator==(const ForwardPlan& a, const ForwardPlan& b) {
  return without_last(fields(a)) == without_last(fields(b));
}

// Fused rows reduce a piece of several cells by units, because every cell's own sums are needed. A unit is a segment of
// a cell; `threads` neighbouring threads take it.
struct Units {
  int threads;       // a power of two, at most a warp and at most the team
  int64_t segments;  // of a cell
  int64_t length;    // packs of a segment

  bool operator==(const Units&) const = default;
};
FASTNORM_FIELDS(Units, threads, segments, length)

// The source of the sums of dweight and dbias. Weights that change with every element (LayerNorm) need sums of their
// own, down the rows instead of along them.
enum class ParamSums : int {
  kNone = 0,       // not wanted
  kFromCells = 1,  // the sums of the cells, which dx needs too
  kInGang = 2,     // each fused gang gathers them over its rows; partials [gangs, C]
  kOwnLaunch = 3,  // over columns, by a launch of their own or by blocks of their own in the launch of reduce
};

struct BackwardPlan {
  Strategy strategy;
  ParamSums param_sums;
  Geometry cells;  // the sums are taken over its sets: every cell is one, unless weights change within a run
  Grid reduce;     // fused: the one launch
  Grid apply;      // split and apply
  Grid params;     // kOwnLaunch; it has as many threads as `reduce`, where that is in the same launch
  Units units;     // fused rows, pieces of several cells
  bool grid_sync;  // fused: a cooperative launch, whose blocks sync at the end and fold the parameters' gradients
  int64_t sums_bytes, params_bytes, terms_bytes, gang_bytes;  // of the workspace, in this order
  int launches;
  Estimate estimate;

  int64_t workspace_bytes() const { return sums_bytes + params_bytes + terms_bytes + gang_bytes; }
};
FASTNORM_FIELDS(BackwardPlan, strategy, param_sums, cells, reduce, apply, params, units, grid_sync, sums_bytes,
                params_bytes, terms_bytes, gang_bytes, launches, estimate)
inline bool operator==(const BackwardPlan& a, const BackwardPlan& b) {
  return without_last(fields(a)) == without_last(fields(b));
}

// A call as the planner needs it. alignment: the largest power of two, at most 16, that divides the address of every
// tensor of the call, and those of weight and bias where kernels read them in packs.
struct ForwardNeeds {
  int alignment;
  bool output;  // y is wanted, and not the statistics alone
  bool frozen;
  bool residual;
  Activation activation;

  bool operator==(const ForwardNeeds&) const = default;
};
FASTNORM_FIELDS(ForwardNeeds, alignment, output, frozen, residual, activation)

struct BackwardNeeds {
  int alignment;
  bool residual;  // it is read again, because there is no mask
  bool mask;
  bool frozen;
  bool input;      // dx or dresidual
  bool dresidual;  // besides dx
  bool params;
  Activation activation;

  bool operator==(const BackwardNeeds&) const = default;
};
FASTNORM_FIELDS(BackwardNeeds, alignment, residual, mask, frozen, input, dresidual, params, activation)

// Requirements on a plan, for tests and tuning. -1 leaves the choice to the planner. Where no plan meets them, planning
// throws std::invalid_argument.
struct Forced {
  int strategy = -1;       // Strategy; ignored where statistics are given: the strategy is apply
  int gang = -1;           // Gang
  int pieces = -1;         // blocks of a gang, at most
  int stages = -1;         // 1 or 2
  int blocks_per_sm = -1;  // the shared memory of an SM is divided among so many
  int tile_bytes = -1;     // columns
  int place = -1;          // Place
  int staged_length = -1;  // columns: pieces go on beyond so many positions in shared memory
  int exchange = -1;       // Exchange
  int traversal = -1;      // Traversal, where there is a choice

  bool operator==(const Forced&) const = default;
};
FASTNORM_FIELDS(Forced, strategy, gang, pieces, stages, blocks_per_sm, tile_bytes, place, staged_length, exchange,
                traversal)

struct PlanOptions {
  int free_sms = 0;  // launches whose blocks wait for each other leave so many SMs to other kernels
  Forced forced;

  bool operator==(const PlanOptions&) const = default;
};
FASTNORM_FIELDS(PlanOptions, free_sms, forced)

const char* name_of(Strategy strategy);
const char* name_of(Gang gang);
const char* name_of(Place place);
const char* name_of(Exchange exchange);
const char* name_of(Traversal traversal);
const char* name_of(ParamSums sums);

// The plan and its estimate, on one line.
std::string to_string(const ForwardPlan& plan);
std::string to_string(const BackwardPlan& plan);

}  // namespace fastnorm
