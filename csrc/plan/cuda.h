// How a call is cut into CUDA launches. These are pure functions of geometry, type, alignment and the device's facts,
// so that a plan can be printed, compared and tested on a machine without a GPU. Kernels do what the plan says and
// choose nothing.
//
// Three strategies:
//
//   fused   one launch; a gang of blocks keeps a set (rows) or a tile of whole sets (columns) in its shared memory, so
//           that x is read once. A gang is a block, a cluster, or a share of the whole grid. Teams may keep rows with a
//           weight for every element in registers instead.
//   split   reduce, fold, apply: sets are cut into pieces until every SM has work; apply walks backwards, over what
//           reduce has just left in L2
//   apply   one launch; statistics are given
//
// The planner estimates the cost of each plan (cost.h) and takes the cheapest.
#pragma once

#include <vector>

#include "types.h"

namespace fastnorm {

ForwardPlan plan_forward(const Geometry& geometry, DType dtype, const ForwardNeeds& needs, const DeviceInfo& device,
                         const PlanOptions& options = {});
BackwardPlan plan_backward(const Geometry& geometry, DType dtype, const BackwardNeeds& needs, const DeviceInfo& device,
                           const PlanOptions& options = {});

// The grid of the launch that tells plans apart.
inline const Grid& main_grid(const ForwardPlan& plan) { return plan.grid; }
inline const Grid& main_grid(const BackwardPlan& plan) { return plan.reduce; }

// Elements of the widest access that divides every run and keeps every address aligned.
int pack_width(const Geometry& geometry, DType dtype, int alignment);

// All plans that the choice is made from, cheapest first.
std::vector<ForwardPlan> compare_forward(const Geometry& geometry, DType dtype, const ForwardNeeds& needs,
                                         const DeviceInfo& device, const PlanOptions& options = {});
std::vector<BackwardPlan> compare_backward(const Geometry& geometry, DType dtype, const BackwardNeeds& needs,
                                           const DeviceInfo& device, const PlanOptions& options = {});

}  // namespace fastnorm
