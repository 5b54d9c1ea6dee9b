// The arguments of a call: plain structs, raw pointers, sizes. The caller (csrc/torch) has checked them; kernels only
// compute.
#pragma once

#include <cstdint>

#include "activation.h"
#include "dtype.h"
#include "geometry.h"

namespace fastnorm {

// The rows of a call's statistics, [kStatsRows, sets] of Accum<dtype>. kMeanLow is what rounding cut off the mean.
enum StatsRow : int { kMean, kRstd, kVar, kMeanLow, kStatsRows };

// A vector of C parameters of its own type; null pointers mean "absent".
struct Params {
  const void* data;
  DType dtype;
};
struct ParamGrads {
  void* data;
  DType dtype;
};

// running = (1 - momentum) running + momentum * stats, averaged over the samples where there are several sets per
// channel; see update_running_stats_ in csrc/torch/ops.h.
struct RunningArgs {
  DType dtype;  // of stats
  const void* stats;
  int64_t sets, channels;
  int64_t count;                         // elements of a set; 0: only num_batches_tracked moves
  const double* given_count;             // that count where only the device knows it, beside `stats`; else null
  double unbiased;                       // the factor that makes a variance unbiased: count / (count - 1)
  ParamGrads running_mean, running_var;  // [C], `*_stride` apart
  int64_t mean_stride, var_stride;
  int64_t* num_batches_tracked;  // or null
  bool cumulative;               // momentum is 1 / num_batches_tracked
  double momentum;

  bool moves() const { return running_mean.data || running_var.data || num_batches_tracked; }
  // Whether a thread that has the statistics of a set can move those of its channel: it needs no other's.
  bool moves_set_by_set() const { return moves() && sets == channels && !cumulative; }
};

// A rank's partial of the statistics of a batch norm: mean[C], mean_low[C], var[C], and the count of its elements.
FASTNORM_HOST_DEVICE inline int64_t partial_size(int64_t channels) { return 3 * channels + 1; }

// Partials, merged in the order of ranks; one whose count is 0 is nothing.
struct FoldArgs {
  DType dtype;  // of partials and stats
  int64_t ranks, channels;
  const void* partials;  // [ranks, partial_size(channels)]
  void* stats;           // [kStatsRows, channels]; zeros where all counts are 0
  double* count;         // [1]: the sum of counts
  double eps;
};

// y = act((x - mean) * rstd * weight + bias + residual), x and y as geometry says, all dense.
struct ForwardArgs {
  Geometry geometry;
  DType dtype;
  const void* x;
  const void* residual;              // or null
  void* y;                           // null: only the statistics are wanted
  uint8_t* mask;                     // mask_bytes(...) or null: one bit per element, the side of a two-sided activation
  Params weight, bias;               // [C]
  Params running_mean, running_var;  // [C]: frozen statistics, or null
  void* stats;                       // [kStatsRows, sets]
  bool stats_given;                  // `stats` is read, not written: batch norm with statistics of several ranks
  RunningArgs running;               // the running statistics that these stats move; all null: none
  double eps;
  Activation activation;
  double activation_param;

  // Whether there is nothing to reduce.
  bool has_statistics() const { return stats_given || running_mean.data != nullptr; }
};

// d = dy * act'(z); dx = rstd * (w d - mean(w d) - xhat mean(w d xhat)), or rstd w d when frozen;
// dweight = sum(d xhat), dbias = sum(d), dresidual = d. A null output is not computed.
struct BackwardArgs {
  Geometry geometry;
  DType dtype;
  const void* dy;
  const void* x;
  const void* residual;
  const uint8_t* mask;
  Params weight, bias;
  const void* stats;
  bool frozen;
  const void* sums;     // [2, C]: the sums of d and d xhat over all ranks, so that there is nothing to reduce; or null
  const double* count;  // [1]: the elements of a set on all ranks; beside `sums`
  Activation activation;
  double activation_param;
  void* dx;
  void* dresidual;
  ParamGrads dweight, dbias;  // [C]
};

// Bytes of the mask: every run (planar) or position (channels last) starts at a whole pack of 16 lanes.
inline int64_t mask_row_bytes(int64_t run, DType dtype) {
  const int64_t lanes = dtype == DType::kFloat64 ? 8 : 16;
  return (run + lanes - 1) / lanes * lanes / 8;
}
inline int64_t mask_bytes(const Geometry& g, DType dtype) {
  const int64_t run = g.mask_run();
  return run == 0 ? 0 : g.numel() / run * mask_row_bytes(run, dtype);
}

}  // namespace fastnorm
