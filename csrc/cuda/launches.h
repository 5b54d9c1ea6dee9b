// The launches of one storage type, defined in forward.cu and backward.cu, and those that know accumulation types only,
// defined in fold.cu. Plain C++: dispatch.cpp picks.
#pragma once

#include "api.h"
#include "core/accum.h"

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
  A* stats;                          // [kStatsRows, sets]
  double eps;
};
int launch_fold_forward(const FoldForwardArgs<float>& args, void* stream);
int launch_fold_forward(const FoldForwardArgs<double>& args, void* stream);

// The terms of dx of sets. Sums lie as [outer, pieces, groups * columns] and are weighted here, unless they have been,
// by rstd too.
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

// The gradients of weight and bias, from sums that lie as [outer, pieces, C]: alone, or beside another launch's work.
template <class A>
struct FoldParamsArgs {
  const GradSums<A>* sums;
  const A* stats;
  int64_t sets, channels, outer, pieces, set_channels;
  bool scaled;                // sums of d xhat already, not of d (x - mean)
  ParamGrads dweight, dbias;  // or null
};
int launch_fold_params(const FoldParamsArgs<float>& args, void* stream);
int launch_fold_params(const FoldParamsArgs<double>& args, void* stream);
// BlockRange of so many threads that are of use to it.
int64_t fold_params_blocks(int64_t channels, int64_t partials, int threads);

}  // namespace fastnorm::cuda
