// The ops of torch.ops.fastnorm: check, plan, allocate, call.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

namespace fastnorm::ops {

using at::Tensor;
using OptTensor = std::optional<Tensor>;

// y = act((x - mean) * rstd * weight + bias + residual).
//   kind, groups  0 batch (groups ignored), 1 group norm with `groups` groups, 2 layer norm over the last `groups` dims
//   mean, var     batch only: frozen statistics; absent: those of x
//   save_mask     ask for the mask that saves backward the residual
// Returns y; stats [4, sets] = mean, rstd, biased variance, what mean lost by rounding; mask, empty unless asked for
// and of use.
std::tuple<Tensor, Tensor, Tensor> norm_forward(const Tensor& x, const OptTensor& weight, const OptTensor& bias,
                                                const OptTensor& residual, const OptTensor& mean, const OptTensor& var,
                                                int64_t kind, int64_t groups, double eps, int64_t activation,
                                                double activation_param, bool save_mask);

// needs = dx, dweight and dbias, dresidual; what is not needed, or has no parameter, comes back with shape (0,).
std::tuple<Tensor, Tensor, Tensor, Tensor> norm_backward(const Tensor& dy, const Tensor& x, const OptTensor& weight,
                                                         const OptTensor& bias, const OptTensor& residual,
                                                         const Tensor& stats, const Tensor& mask, int64_t kind,
                                                         int64_t groups, bool frozen, int64_t activation,
                                                         double activation_param, std::array<bool, 3> needs);

// running = (1 - momentum) * running + momentum * stats, the variance unbiased by count / (count - 1), averaged over
// the samples where stats has several per channel; momentum absent: 1 / num_batches_tracked. count 0 moves nothing
// but num_batches_tracked.
void update_running_stats_(const OptTensor& running_mean, const OptTensor& running_var,
                           const OptTensor& num_batches_tracked, const Tensor& stats, int64_t count,
                           std::optional<double> momentum);

// Per-channel mean and biased variance over all other dims.
std::tuple<Tensor, Tensor> moments(const Tensor& x);

}  // namespace fastnorm::ops
