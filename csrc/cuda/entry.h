// The launches of one storage type, defined in forward.cu and backward.cu, and those that know accumulation types only,
// defined in fold.cu. Plain C++: dispatch.cpp picks.
#pragma once

#include "../accum.h"
#include "../kernels.h"

namespace fastnorm::cuda {

template <class T>
int forward_of(const ForwardArgs& args, const ForwardPlan& plan, void* workspace, void* stream);
template <class T>
int backward_of(const BackwardArgs& args, const BackwardPlan& plan, void* workspace, void* stream);

// Partials lie as [outer, pieces, groups * columns]; a set takes `columns` neighbours of every piece.
template <class A>
struct FoldForwardArgs {
  const Welford<A>* partials;  // relative to the set's first element
  int64_t sets, pieces, groups, columns;
  const void* x;
  DType dtype;
  int64_t outer_stride, set_stride;  // of sets' first elements
  A* stats;                          // [4, sets]
  double eps;
};
int launch_fold_forward(const FoldForwardArgs<float>& args, void* stream);
int launch_fold_forward(const FoldForwardArgs<double>& args, void* stream);

// `terms` of sets and gradients of channels, in one launch; either may be absent. Sums of sets lie as [outer, pieces,
// groups * columns] and are weighted here, unless they have been, by rstd too; those of channels as [param_outer,
// param_pieces, C].
template <class A>
struct FoldBackwardArgs {
  const GradSums<A>* sums;
  const A* stats;
  int64_t sets, pieces, groups, columns, set_size;
  Params weight;
  bool weighted;
  A* terms;  // [sets, 2], or null

  const GradSums<A>* param_sums;
  int64_t channels, param_outer, param_pieces, set_channels;
  bool scaled;                // sums of d xhat already, not of d (x - mean)
  ParamGrads dweight, dbias;  // or null
};
int launch_fold_backward(const FoldBackwardArgs<float>& args, void* stream);
int launch_fold_backward(const FoldBackwardArgs<double>& args, void* stream);

}  // namespace fastnorm::cuda
