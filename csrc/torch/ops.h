// The ops of torch.ops.fastnorm: check, plan, allocate, call. library.cpp has their schemas.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

#include "core/fields.h"

namespace fastnorm::ops {

using at::Tensor;
using OptTensor = std::optional<Tensor>;

// The tensors that forward and backward both take.
struct Inputs {
  const Tensor& x;
  const OptTensor &weight, &bias, &residual;
};

// normalized_dims of a layer norm over dim 1 of (N, C, *).
constexpr int64_t kNormalizedChannels = -1;

// What is normalized, and what follows. fastnorm/dispatch.py has the same, and the settings of the `norm` op besides.
struct Config {
  int64_t groups;  // of group norm; else 0
  int64_t
      normalized_dims;  // trailing dims that layer norm normalizes, or kNormalizedChannels; else 0. Both 0: batch norm
  double eps;
  int64_t activation;  // Activation in csrc/core/activation.h
  double activation_param;

  bool is_batch() const { return groups == 0 && normalized_dims == 0; }
};
FASTNORM_FIELDS(Config, groups, normalized_dims, eps, activation, activation_param)

using Forward = std::tuple<Tensor, Tensor, Tensor>;           // y, stats, mask
using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // dx, dweight, dbias, dresidual

// y = act((x - mean) * rstd * weight + bias + residual).
//   mean, var     batch norm only: frozen statistics; absent: those of x
//   save_mask     ask for the mask that saves backward the residual
// stats is [kStatsRows, sets]; mask is undefined unless asked for and of use.
Forward norm_forward(const Inputs& inputs, const OptTensor& mean, const OptTensor& var, const Config& config,
                     bool save_mask);

// Batch norm with the statistics of x, which also moves the running statistics by them: norm_forward and
// update_running_stats_ in one, which on a GPU saves a launch. Without a gradient of its own: `norm` has it.
struct Running;  // running.h
Forward batch_norm_forward_(const Inputs& inputs, const Running& running, const Config& config, bool save_mask);

// mask may be undefined. output_mask = dx, dweight and dbias, dresidual; an output that is not wanted, or has no
// parameter, is undefined.
Backward norm_backward(const Tensor& dy, const Inputs& inputs, const Tensor& stats, const Tensor& mask,
                       const Config& config, bool frozen, std::array<bool, 3> output_mask);

// running = (1 - momentum) * running + momentum * stats, the variance unbiased by count / (count - 1), averaged over
// the samples where stats has several per channel; momentum absent: 1 / num_batches_tracked. count 0 moves nothing
// but num_batches_tracked.
void update_running_stats_(const OptTensor& running_mean, const OptTensor& running_var,
                           const OptTensor& num_batches_tracked, const Tensor& stats, int64_t count,
                           std::optional<double> momentum);

// The statistics of x as those of a batch norm, [kStatsRows, C]; zeros where it is empty.
Tensor channel_stats(const Tensor& x, double eps);

// Per-channel mean and biased variance over all other dims.
std::tuple<Tensor, Tensor> moments(const Tensor& x);

// y = (x - offset) * scale for images x (N, C, H, W), a number for each channel, in the dtype and memory format asked
// for (Preserve: x's) and in one pass. x may be uint8.
Tensor normalize_images(const Tensor& x, at::ArrayRef<double> offset, at::ArrayRef<double> scale, at::ScalarType dtype,
                        at::MemoryFormat format);

// Batch norm in steps, for statistics of several ranks: every rank takes its partial, gathers those of all, folds them
// and applies the statistics; backward it takes its sums, adds those of all ranks, and applies them. In between the
// caller exchanges them. No step waits for the device, and every step takes an empty x.
//
//   partial(x)              [3 C + 1]: mean, mean_low, biased variance, count (zeros where x is empty)
//   fold_(partials)         partials [ranks, 3 C + 1] -> stats [kStatsRows, C] and count, one float64; moves the running
//                           statistics, the variance unbiased by the whole count. Partials of count 0 are nothing; a
//                           running variance stays as it is where the whole count is 1
//   apply(x, stats)         y and mask, as norm_forward
//   backward_sums           [2, C]: the sums of d and d xhat over this rank, which are its dbias and dweight
//   backward_apply          dx and dresidual from the sums of all ranks
Tensor batch_norm_partial(const Tensor& x);
std::tuple<Tensor, Tensor> batch_norm_fold_(const Tensor& partials, const Running& running, double eps);
std::tuple<Tensor, Tensor> batch_norm_apply(const Inputs& inputs, const Tensor& stats, int64_t activation,
                                            double activation_param, bool save_mask);
Tensor batch_norm_backward_sums(const Tensor& dy, const Inputs& inputs, const Tensor& stats, const Tensor& mask,
                                int64_t activation, double activation_param);
std::tuple<Tensor, Tensor> batch_norm_backward_apply(const Tensor& dy, const Inputs& inputs, const Tensor& stats,
                                                     const Tensor& mask, const Tensor& sums, const Tensor& count,
                                                     int64_t activation, double activation_param,
                                                     std::array<bool, 2> output_mask);

// The same ops as the dispatcher calls them: every field is an argument, and what is undefined here has shape (0,).
using ForwardSignature = Forward(const Tensor&, const OptTensor&, const OptTensor&, const OptTensor&, const OptTensor&,
                                 const OptTensor&, int64_t, int64_t, double, int64_t, double, bool);
using BatchForwardSignature = Forward(const Tensor&, const OptTensor&, const OptTensor&, const OptTensor&,
                                      const OptTensor&, const OptTensor&, const OptTensor&, double, int64_t, double,
                                      bool, std::optional<double>);
using BackwardSignature = Backward(const Tensor&, const Tensor&, const OptTensor&, const OptTensor&, const OptTensor&,
                                   const Tensor&, const Tensor&, int64_t, int64_t, double, int64_t, double, bool,
                                   std::array<bool, 3>);
using NormSignature = Tensor(const Tensor&, const OptTensor&, const OptTensor&, const OptTensor&, const OptTensor&,
                             const OptTensor&, const OptTensor&, int64_t, int64_t, double, int64_t, double, bool,
                             std::optional<double>);
using UpdateSignature = void(const OptTensor&, const OptTensor&, const OptTensor&, const Tensor&, c10::SymInt,
                             std::optional<double>);

}  // namespace fastnorm::ops
