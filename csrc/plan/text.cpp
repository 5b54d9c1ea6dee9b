// Plans as text.
#include <cstdio>

#include "types.h"

namespace fastnorm {

const char* name_of(Strategy s) { return s == Strategy::kFused ? "fused" : s == Strategy::kSplit ? "split" : "apply"; }
const char* name_of(Gang g) { return g == Gang::kBlock ? "block" : g == Gang::kCluster ? "cluster" : "grid"; }
const char* name_of(Place p) { return p == Place::kShared ? "shared" : "registers"; }
const char* name_of(Exchange e) { return e == Exchange::kGather ? "gather" : "scatter"; }
const char* name_of(Traversal t) { return t == Traversal::kRows ? "rows" : "columns"; }
const char* name_of(ParamSums s) {
  return s == ParamSums::kNone        ? "none"
         : s == ParamSums::kFromCells ? "from_cells"
         : s == ParamSums::kInGang    ? "in_gang"
                                      : "own_launch";
}

namespace {

std::string number(int64_t n) { return std::to_string(n); }

std::string to_string(const Grid& grid) {
  const bool rows = grid.traversal == Traversal::kRows;
  std::string text = std::string(name_of(grid.traversal)) + ", pack " + number(grid.pack) + ", ";
  if (grid.gang != Gang::kBlock) {
    text += std::string(name_of(grid.gang)) + "s of " + number(grid.pieces) + " blocks, a piece each of ";
  } else {
    text += number(grid.pieces) + " pieces of ";
  }
  text += rows ? number(grid.piece_runs) + "x" + number(grid.piece_length) + " packs"
               : number(grid.piece_length) + " positions, tile " + number(grid.tile);
  if (grid.rereads()) text += ", " + number(grid.staged_length) + " of them in shared memory";
  if (grid.exchange == Exchange::kScatter) text += ", exchange scattered";
  text += ", " + number(grid.threads_x) + "x" + number(grid.threads_y) + " threads, " + number(grid.blocks) +
          " blocks for " + number(grid.items) + " items, " + number(grid.shared_bytes) + " B shared";
  if (grid.thread_packs > 0) text += ", " + number(grid.thread_packs) + " packs of a thread in registers";
  return grid.stages == 2 ? text + ", 2 stages" : text;
}

std::string to_string(const Estimate& e) {
  char text[128];
  std::snprintf(text, sizeof text, "; estimate %.1f us: memory %.1f, issue %.1f, waits %.1f, launches %.1f", e.total(),
                e.memory, e.issue, e.barriers, e.launches);
  return text;
}

std::string costs(int launches, int64_t workspace_bytes, const Estimate& estimate) {
  return "; " + number(launches) + (launches == 1 ? " launch" : " launches") + ", workspace " +
         number(workspace_bytes) + " B" + to_string(estimate);
}

}  // namespace

std::string to_string(const ForwardPlan& plan) {
  return std::string(name_of(plan.strategy)) + ": " + to_string(plan.grid) +
         costs(plan.launches, plan.workspace_bytes, plan.estimate);
}

std::string to_string(const BackwardPlan& plan) {
  std::string text = name_of(plan.strategy);
  if (plan.reduce.items > 0) text += ": " + to_string(plan.reduce);
  if (plan.units.threads > 0) {
    text += "; units of " + number(plan.units.threads) + " threads, " + number(plan.units.segments) + " segments of " +
            number(plan.units.length);
  }
  if (plan.apply.items > 0) text += "; apply: " + to_string(plan.apply);
  text += std::string("; parameters ") + name_of(plan.param_sums);
  if (plan.params.items > 0) text += ": " + to_string(plan.params);
  if (plan.grid_sync) text += ", folded after a grid sync";
  return text + costs(plan.launches, plan.workspace_bytes(), plan.estimate);
}

}  // namespace fastnorm
