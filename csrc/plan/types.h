// The values of CUDA planning: what a device is, how a launch is cut, what a plan says. No choice is made here.
#pragma once

#include <cstdint>
#include <string>

#include "core/dtype.h"
#include "core/fields.h"
#include "core/geometry.h"

namespace fastnorm {

struct DeviceInfo {
  int capability;  // 90 for sm_90
  int num_sms;
  int threads_per_sm;
  int64_t shared_per_sm, shared_per_block;  // bytes; per block: what a kernel may opt in to
  int64_t l2_bytes;
  int64_t bytes_per_us;  // between global memory and the chip, at most
  int largest_cluster;   // blocks; 1: no clusters
  int cluster_sms;       // that clusters of the largest size cover at a time, with one block to each
  bool cooperative;      // the blocks of a launch may meet

  bool operator==(const DeviceInfo&) const = default;
};
FASTNORM_FIELDS(DeviceInfo, capability, num_sms, threads_per_sm, shared_per_sm, shared_per_block, l2_bytes,
                bytes_per_us, largest_cluster, cluster_sms, cooperative)

// Threads of a block, at most; kernels are compiled for as many (__launch_bounds__), two blocks to a multiprocessor:
// 128 registers a thread, which the compiler's report is checked against.
constexpr int kBlockThreads = 256;
constexpr int kResidentThreads = 2 * kBlockThreads;
constexpr int kWarp = 32;
constexpr int kMaxCluster = 16;

// A staged piece lands share by share: the first are reduced while the last are under way.
constexpr int kCopyGroups = 4;

// Shared memory of a reduction over a block: an accumulator of three numbers for every warp, and the result.
FASTNORM_HOST_DEVICE constexpr int ladder_bytes(int threads, int number_bytes) {
  return ((threads / kWarp + 1) * 3 * number_bytes + 15) / 16 * 16;
}

enum class Strategy : int { kFused = 0, kSplit = 1, kApply = 2 };

// Who shares a set or a tile in a fused launch, a piece each.
enum class Gang : int {
  kBlock = 0,    // one block: nothing to share
  kCluster = 1,  // a cluster: partials in distributed shared memory, a cluster barrier
  kGrid = 2,     // `pieces` blocks of a cooperative launch: partials in global memory, the grid's barrier
};

// One launch. Rows: a team of threads_x threads takes a piece of a set, a block holds threads_y teams (more than one
// only when a team is a warp or less). Columns: a block takes threads_x packs of channels side by side and walks down
// a piece of the positions, threads_y at a time.
//
// Items are pieces. Fused: the pieces of a set or tile are neighbours, and so are the blocks of a gang; a wave is an
// item for every team of the launch, and waves follow each other.
struct Grid {
  Traversal traversal;
  int pack;  // elements of one access; divides every run, and every access is aligned
  int threads_x, threads_y;
  int64_t pieces;        // of a set (rows) or of the positions of an outer (columns); fused: the blocks of a gang
  int64_t piece_runs;    // rows: runs of a piece, each whole when there is more than one; columns: 1
  int64_t piece_length;  // rows: packs of a run in a piece; columns: positions
  int64_t tile;          // columns: channels of a block, at most threads_x * pack; rows: 0
  int64_t items;         // sets * pieces (rows), outer * pieces * tiles (columns)
  int64_t blocks;        // of the launch; a block takes items in strides where there are more
  int64_t shared_bytes;  // dynamic shared memory of a block
  int64_t team_bytes;    // fused rows: what of it is each team's own; else 0
  Gang gang;             // fused; else kBlock
  int stages;            // fused: 2 where the next wave is loaded during this one; else 1

  int threads() const { return threads_x * threads_y; }
  // Packs that a staged run takes in shared memory. Single elements are staged in blocks of 16 bytes that begin where
  // memory has them.
  int64_t run_slots(DType dtype) const {
    const int64_t lanes = 16 / size_of(dtype);
    return pack > 1 ? piece_length : (piece_length + lanes - 2) / lanes * lanes + lanes;
  }
  // Bytes of one staged tensor of a piece.
  int64_t stream_bytes(DType dtype) const {
    const int64_t packs = traversal == Traversal::kRows ? piece_runs * run_slots(dtype) : tile * piece_length / pack;
    return (packs * pack * size_of(dtype) + 15) / 16 * 16;
  }
  // Items that a block takes at a time.
  int teams() const { return traversal == Traversal::kRows ? threads_y : 1; }
  bool operator==(const Grid&) const = default;
};
FASTNORM_FIELDS(Grid, traversal, pack, threads_x, threads_y, pieces, piece_runs, piece_length, tile, items, blocks,
                shared_bytes, team_bytes, gang, stages)

// Pieces that a run is cut into, where pieces are not of whole runs.
inline int64_t run_pieces(const Geometry& g, const Grid& grid) {
  const bool parts = grid.traversal == Traversal::kRows && grid.piece_runs == 1;
  return parts ? grid.pieces / rows_runs(g).count : 1;
}

// What the planner expects a call to take, in microseconds; for comparing plans, not for promises.
struct Estimate {
  double memory;    // bytes over what of the bandwidth the launch can use
  double barriers;  // of clusters and grids, and the latency of memory where nothing hides it
  double launches;

  double total() const { return memory + barriers + launches; }
  Estimate operator+(const Estimate& o) const {
    return {memory + o.memory, barriers + o.barriers, launches + o.launches};
  }
};
FASTNORM_FIELDS(Estimate, memory, barriers, launches)

struct ForwardPlan {
  Strategy strategy;
  Grid grid;                // of every launch but fold
  int64_t workspace_bytes;  // partials: of split, or of gangs that are grids
  int launches;
  Estimate estimate;
};
FASTNORM_FIELDS(ForwardPlan, strategy, grid, workspace_bytes, launches, estimate)
// Plans are equal that launch the same, whatever is expected of them.
inline bool operator==(const ForwardPlan& a, const ForwardPlan& b) {
  return without_last(fields(a)) == without_last(fields(b));
}

// Fused rows reduce a piece of several cells by units, so that every cell's own sums come out: a unit is a segment of a
// cell, taken by unit_threads neighbouring threads.
struct Units {
  int threads;       // a power of two, at most a warp and at most the team
  int64_t segments;  // of a cell
  int64_t length;    // packs of a segment

  bool operator==(const Units&) const = default;
};
FASTNORM_FIELDS(Units, threads, segments, length)

// Where the sums of dweight and dbias come from. Weights that change with every element (LayerNorm) need sums of their
// own, down the rows instead of along them.
enum class ParamSums : int {
  kNone = 0,       // not wanted
  kFromCells = 1,  // the sums of the cells, which dx needs too
  kInGang = 2,     // gathered by each fused gang over its rows; partials [gangs, C]
  kOwnLaunch = 3,  // over columns: by blocks of their own in the launch of reduce, or in a launch of their own
};

struct BackwardPlan {
  Strategy strategy;
  ParamSums param_sums;
  Geometry cells;  // whose sets the sums are taken over: every cell a set of its own, unless weights change in a run
  Grid reduce;     // fused: the one launch
  Grid apply;      // split and apply
  Grid params;     // kOwnLaunch; as many threads as `reduce` has, where that is launched too
  Units units;     // fused rows, pieces of several cells
  bool grid_sync;  // fused: a cooperative launch, whose blocks meet at the end and fold the parameters' gradients
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

// alignment: the largest power of two, at most 16, that divides the address of every tensor of the call; of weight and
// bias too where they are read in packs (per_element).
struct ForwardNeeds {
  int alignment;
  bool output;  // y, not the statistics alone
  bool frozen;

  bool operator==(const ForwardNeeds&) const = default;
};
FASTNORM_FIELDS(ForwardNeeds, alignment, output, frozen)

struct BackwardNeeds {
  int alignment;
  bool residual;  // read again, no mask
  bool frozen;
  bool input;  // dx or dresidual
  bool params;

  bool operator==(const BackwardNeeds&) const = default;
};
FASTNORM_FIELDS(BackwardNeeds, alignment, residual, frozen, input, params)

// What a plan has to be, for tests and tuning; -1: whatever is cheapest. Where no plan is so, planning throws
// std::invalid_argument.
struct Forced {
  int strategy = -1;       // Strategy; not of calls with given statistics, whose strategy is apply
  int gang = -1;           // Gang
  int pieces = -1;         // blocks of a gang, at most
  int stages = -1;         // 1 or 2
  int blocks_per_sm = -1;  // blocks to a multiprocessor that shared memory is shared out to
  int tile_bytes = -1;     // columns

  bool operator==(const Forced&) const = default;
};
FASTNORM_FIELDS(Forced, strategy, gang, pieces, stages, blocks_per_sm, tile_bytes)

struct PlanOptions {
  int free_sms = 0;  // that launches whose blocks meet leave free, for communication beside them
  Forced forced;

  bool operator==(const PlanOptions&) const = default;
};
FASTNORM_FIELDS(PlanOptions, free_sms, forced)

const char* name_of(Strategy strategy);
const char* name_of(Gang gang);
const char* name_of(Traversal traversal);
const char* name_of(ParamSums sums);

// The plan and its estimate, on one line.
std::string to_string(const ForwardPlan& plan);
std::string to_string(const BackwardPlan& plan);

}  // namespace fastnorm
