// The launches of one storage type and traversal (forward_rows.cu and its like define them) and the launches that
// depend on accumulation types only (fold.cu). Plain C++, so that dispatch.cpp can pick one.
#pragma once

#include "api.h"
#include "core/accum.h"

namespace fastnorm::cuda {

template <class T, Traversal kTraversal>
int forward_of(const ForwardArgs& args, const ForwardPlan& plan, void* workspace, void* stream);
template <class T, Traversal kTraversal>
int backward_of(const BackwardArgs& args, const BackwardPlan& plan, void* workspace, void* stream);

// Those of layer norm over the channels of planar maps.
template <class T>
int forward_positions_of(const ForwardArgs& args, const ForwardPlan& plan, void* stream);
template <class T>
int backward_positions_of(const BackwardArgs& args, const BackwardPlan& plan, void* workspace, void* stream);

// Partials lie as [outer, pieces, groups * columns]; a set has `columns` neighbouring partials of every piece.
template <class A>
struct FoldForwardArgs {
  const Welford<A>* partials;  // relative to the set's first element
  int64_t sets, pieces, groups, columns;
  const void* x;
  DType dtype;
  int64_t outer_stride, set_stride;  // of sets' first elements
  A* stats;                          // [kStatsRows, sets]
  RunningArgs running;
  double eps;
};
int launch_fold_forward(const FoldForwardArgs<float>& args, void* stream);
int launch_fold_forward(const FoldForwardArgs<double>& args, void* stream);

// The terms of dx for every set. Sums lie as [outer, pieces, groups * columns]. The fold weights them, unless
// `weighted` says that they are times weight and rstd already.
template <class A>
struct FoldTermsArgs {
  const GradSums<A>* sums;
  const A* stats;
  int64_t sets, pieces, groups, columns, set_size;
  Params weight;
  bool weighted;
  A* terms;  // [sets, 2]
};
int launch_fold_terms(const FoldTermsArgs<float>& args, void* stream);
int launch_fold_terms(const FoldTermsArgs<double>& args, void* stream);

// The same from the sums over all ranks, of BackwardArgs::sums.
template <class A>
struct GivenTermsArgs {
  const A* sums;  // [2, channels]: of d, and of d xhat
  const double* count;
  const A* stats;
  int64_t channels;
  Params weight;
  A* terms;  // [channels, 2]
};
int launch_given_terms(const GivenTermsArgs<float>& args, void* stream);
int launch_given_terms(const GivenTermsArgs<double>& args, void* stream);

// The gradients of weight and bias, from sums that lie as [outer, pieces, C]: in a launch of their own, or as a part of
// another launch.
template <class A>
struct FoldParamsArgs {
  const GradSums<A>* sums;
  const A* stats;
  int64_t sets, channels, outer, pieces, set_channels;
  bool scaled;                // the sums are of d xhat, not of d (x - mean)
  ParamGrads dweight, dbias;  // or null
};
int launch_fold_params(const FoldParamsArgs<float>& args, void* stream);
int launch_fold_params(const FoldParamsArgs<double>& args, void* stream);
// The number of blocks, of so many threads each, that have work in it.
int64_t fold_params_blocks(int64_t channels, int64_t partials, int threads);

}  // namespace fastnorm::cuda
