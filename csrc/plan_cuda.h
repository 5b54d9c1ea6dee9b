// How a call is cut into CUDA launches: pure functions of geometry, type, alignment and the device's facts, so that a
// plan can be printed, compared and tested on a machine without a GPU. Kernels do what the plan says and choose
// nothing.
//
// Three ways:
//   fused  one launch; a set (rows) or a tile of whole sets (columns) is staged in a block's shared memory: x is read
//   once split  reduce, fold, apply: sets are cut into pieces until every multiprocessor has work apply  one launch,
//   statistics are given
#pragma once

#include <cstdint>
#include <string>

#include "dtype.h"
#include "geometry.h"

namespace fastnorm {

struct DeviceInfo {
  int capability;  // 90 for sm_90
  int multiprocessors;
  int threads_per_multiprocessor;
  int64_t shared_per_multiprocessor, shared_per_block;  // bytes; per block: what a kernel may opt in to
  int64_t l2_bytes;
};

// Threads of a block, at most; kernels are compiled for as many (__launch_bounds__), two blocks to a multiprocessor:
// 128 registers a thread, which the compiler's report is checked against.
constexpr int kBlockThreads = 256;
constexpr int kResidentThreads = 2 * kBlockThreads;
constexpr int kWarp = 32;

enum class Strategy : int { kFused = 0, kSplit = 1, kApply = 2 };

// One launch. Rows: a team of threads_x threads takes a piece of a set, a block holds threads_y teams (more than one
// only when a team is a warp or less). Columns: a block takes threads_x packs of channels side by side and walks down
// a piece of the positions, threads_y at a time.
struct Grid {
  Traversal traversal;
  int pack;  // elements of one access; divides every run, and every access is aligned
  int threads_x, threads_y;
  int64_t pieces;        // of a set (rows) or of the positions of an outer (columns)
  int64_t piece_runs;    // rows: runs of a piece, each whole when there is more than one; columns: 1
  int64_t piece_length;  // rows: packs of a run in a piece; columns: positions
  int64_t tile;          // columns: channels of a block, at most threads_x * pack; rows: 0
  int64_t items;         // sets * pieces (rows), outer * pieces * tiles (columns)
  int64_t blocks;        // of the launch; a block takes items in strides where there are more
  int64_t shared_bytes;  // dynamic shared memory of a block
  int64_t team_bytes;    // fused rows: what of it is each team's own; else 0

  int threads() const { return threads_x * threads_y; }
  bool operator==(const Grid& o) const {
    return traversal == o.traversal && pack == o.pack && threads_x == o.threads_x && threads_y == o.threads_y &&
           pieces == o.pieces && piece_runs == o.piece_runs && piece_length == o.piece_length && tile == o.tile &&
           items == o.items && blocks == o.blocks && shared_bytes == o.shared_bytes && team_bytes == o.team_bytes;
  }
};

struct ForwardPlan {
  Strategy strategy;
  Grid grid;                // of every launch but fold
  int64_t workspace_bytes;  // the partials of split

  bool operator==(const ForwardPlan& o) const {
    return strategy == o.strategy && grid == o.grid && workspace_bytes == o.workspace_bytes;
  }
};

// Fused rows reduce a set by units, so that every cell's own sums come out: a unit is a segment of a cell, taken by
// unit_threads neighbouring threads.
struct Units {
  int threads;       // a power of two, at most a warp and at most the team
  int64_t segments;  // of a cell
  int64_t length;    // packs of a segment
  bool operator==(const Units& o) const { return threads == o.threads && segments == o.segments && length == o.length; }
};

// Where the sums of dweight and dbias come from. Weights that change with every element (LayerNorm) need sums of their
// own, down the rows instead of along them.
enum class ParamSums : int {
  kNone = 0,    // not wanted
  kShared = 1,  // the sums of the cells, which dx needs too
  kAlong = 2,   // gathered by each fused block over its rows; partials [blocks, C]
  kApart = 3,   // a launch of their own, over columns
};

struct BackwardPlan {
  Strategy strategy;
  ParamSums param_sums;
  Geometry cells;  // whose sets the sums are taken over: every cell a set of its own, unless weights change in a run
  Grid reduce;     // fused: the one launch
  Grid apply;      // split and apply
  Grid params;     // kApart
  Units units;     // fused rows
  int64_t sums_bytes, params_bytes, terms_bytes;  // of the workspace, in this order

  int64_t workspace_bytes() const { return sums_bytes + params_bytes + terms_bytes; }
  bool operator==(const BackwardPlan& o) const {
    return strategy == o.strategy && param_sums == o.param_sums && cells == o.cells && reduce == o.reduce &&
           apply == o.apply && params == o.params && units == o.units && sums_bytes == o.sums_bytes &&
           params_bytes == o.params_bytes && terms_bytes == o.terms_bytes;
  }
};

// alignment: the largest power of two, at most 16, that divides the address of every tensor of the call; of weight and
// bias too where they are read in packs (per_element).
struct ForwardNeeds {
  int alignment;
  bool output;  // y, not the statistics alone
  bool frozen;
};
struct BackwardNeeds {
  int alignment;
  bool residual;  // read again, no mask
  bool frozen;
  bool input;  // dx or dresidual
  bool params;
};

ForwardPlan plan_forward(const Geometry& geometry, DType dtype, const ForwardNeeds& needs, const DeviceInfo& device);
BackwardPlan plan_backward(const Geometry& geometry, DType dtype, const BackwardNeeds& needs, const DeviceInfo& device);

// Elements of the widest access that divides every run and keeps every address aligned.
int pack_width(const Geometry& geometry, DType dtype, int alignment);

std::string to_string(const ForwardPlan& plan);
std::string to_string(const BackwardPlan& plan);

}  // namespace fastnorm
