// The ops' schemas, in one place. What each argument means is said in ops.h.
#include <torch/library.h>

#include "backend.h"
#include "ops.h"
#include "running.h"

// The CUDA kernels without a GPU are libraries of their own, of the same ops for tensors on the CPU; each has a
// namespace.
#if !defined(FASTNORM_NAMESPACE)
#define FASTNORM_NAMESPACE fastnorm
#endif
// One more step, so that the name is put in first.
#define FASTNORM_LIBRARY(name, m) TORCH_LIBRARY(name, m)
#define FASTNORM_LIBRARY_IMPL(name, key, m) TORCH_LIBRARY_IMPL(name, key, m)

FASTNORM_LIBRARY(FASTNORM_NAMESPACE, m) {
  m.def(
      "norm_forward(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? mean, Tensor? var, "
      "int groups, int normalized_dims, float eps, int activation, float activation_param, bool save_mask) "
      "-> (Tensor y, Tensor stats, Tensor mask)");
  m.def(
      "batch_norm_forward_(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, float eps, int activation, float activation_param, "
      "bool save_mask, float? momentum) -> (Tensor y, Tensor stats, Tensor mask)");
  m.def(
      "norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor stats, Tensor mask, "
      "int groups, int normalized_dims, float eps, int activation, float activation_param, bool frozen, "
      "bool[3] output_mask) "
      "-> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual)");
  m.def(
      "update_running_stats_(Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, "
      "Tensor stats, SymInt count, float? momentum) -> ()");
  m.def("moments(Tensor x) -> (Tensor mean, Tensor var)");
  m.def(
      "normalize_images(Tensor x, float[] offset, float[] scale, ScalarType dtype, MemoryFormat memory_format) "
      "-> Tensor");
  m.def("batch_norm_partial(Tensor x) -> Tensor partial");
  m.def(
      "batch_norm_fold_(Tensor partials, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
      "Tensor(c!)? num_batches_tracked, float eps, float? momentum) -> (Tensor stats, Tensor count)");
  m.def(
      "batch_norm_apply(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor stats, int activation, "
      "float activation_param, bool save_mask) -> (Tensor y, Tensor mask)");
  m.def(
      "batch_norm_backward_sums(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor stats, "
      "Tensor mask, int activation, float activation_param) -> Tensor sums");
  m.def(
      "batch_norm_backward_apply(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor stats, "
      "Tensor mask, Tensor sums, Tensor count, int activation, float activation_param, bool[2] output_mask) "
      "-> (Tensor dx, Tensor dresidual)");
}

namespace fastnorm::ops {

// An operator's output is a tensor, wanted or not. type: of what was not wanted.
template <class Outputs>
static Outputs defined(Outputs outputs, at::ScalarType type, const Tensor& x) {
  const auto define = [&](Tensor& t) {
    if (!t.defined()) t = backend_of(x, "x").make_empty({0}, type, at::MemoryFormat::Contiguous, x.device());
  };
  std::apply([&](auto&... t) { (define(t), ...); }, outputs);
  return outputs;
}

static Forward flat_forward(const Tensor& x, const OptTensor& weight, const OptTensor& bias, const OptTensor& residual,
                            const OptTensor& mean, const OptTensor& var, int64_t groups, int64_t normalized_dims,
                            double eps, int64_t activation, double activation_param, bool save_mask) {
  return defined(norm_forward({x, weight, bias, residual}, mean, var,
                              {groups, normalized_dims, eps, activation, activation_param}, save_mask),
                 at::kByte, x);
}

static Forward flat_batch_forward(const Tensor& x, const OptTensor& weight, const OptTensor& bias,
                                  const OptTensor& residual, const OptTensor& running_mean,
                                  const OptTensor& running_var, const OptTensor& num_batches_tracked, double eps,
                                  int64_t activation, double activation_param, bool save_mask,
                                  std::optional<double> momentum) {
  return defined(
      batch_norm_forward_({x, weight, bias, residual}, {running_mean, running_var, num_batches_tracked, momentum},
                          {0, 0, eps, activation, activation_param}, save_mask),
      at::kByte, x);
}

static Backward flat_backward(const Tensor& dy, const Tensor& x, const OptTensor& weight, const OptTensor& bias,
                              const OptTensor& residual, const Tensor& stats, const Tensor& mask, int64_t groups,
                              int64_t normalized_dims, double eps, int64_t activation, double activation_param,
                              bool frozen, std::array<bool, 3> output_mask) {
  return defined(norm_backward(dy, {x, weight, bias, residual}, stats, mask,
                               {groups, normalized_dims, eps, activation, activation_param}, frozen, output_mask),
                 x.scalar_type(), x);
}

static std::tuple<Tensor, Tensor> flat_fold(const Tensor& partials, const OptTensor& running_mean,
                                            const OptTensor& running_var, const OptTensor& num_batches_tracked,
                                            double eps, std::optional<double> momentum) {
  return batch_norm_fold_(partials, {running_mean, running_var, num_batches_tracked, momentum}, eps);
}

static std::tuple<Tensor, Tensor> flat_apply(const Tensor& x, const OptTensor& weight, const OptTensor& bias,
                                             const OptTensor& residual, const Tensor& stats, int64_t activation,
                                             double activation_param, bool save_mask) {
  return defined(batch_norm_apply({x, weight, bias, residual}, stats, activation, activation_param, save_mask),
                 at::kByte, x);
}

static Tensor flat_backward_sums(const Tensor& dy, const Tensor& x, const OptTensor& weight, const OptTensor& bias,
                                 const OptTensor& residual, const Tensor& stats, const Tensor& mask, int64_t activation,
                                 double activation_param) {
  return batch_norm_backward_sums(dy, {x, weight, bias, residual}, stats, mask, activation, activation_param);
}

static std::tuple<Tensor, Tensor> flat_backward_apply(const Tensor& dy, const Tensor& x, const OptTensor& weight,
                                                      const OptTensor& bias, const OptTensor& residual,
                                                      const Tensor& stats, const Tensor& mask, const Tensor& sums,
                                                      const Tensor& count, int64_t activation, double activation_param,
                                                      std::array<bool, 2> output_mask) {
  return defined(batch_norm_backward_apply(dy, {x, weight, bias, residual}, stats, mask, sums, count, activation,
                                           activation_param, output_mask),
                 x.scalar_type(), x);
}

static void implement(torch::Library& m) {
  m.impl("norm_forward", &flat_forward);
  m.impl("batch_norm_forward_", &flat_batch_forward);
  m.impl("norm_backward", &flat_backward);
  m.impl("update_running_stats_", &update_running_stats_);
  m.impl("moments", &moments);
  m.impl("normalize_images", &normalize_images);
  m.impl("batch_norm_partial", &batch_norm_partial);
  m.impl("batch_norm_fold_", &flat_fold);
  m.impl("batch_norm_apply", &flat_apply);
  m.impl("batch_norm_backward_sums", &flat_backward_sums);
  m.impl("batch_norm_backward_apply", &flat_backward_apply);
}

}  // namespace fastnorm::ops

using fastnorm::ops::implement;

FASTNORM_LIBRARY_IMPL(FASTNORM_NAMESPACE, CPU, m) { implement(m); }

// In a build without CUDA kernels, too: there the ops say so, and the caller turns to torch's.
#if !defined(FASTNORM_EMULATE)
FASTNORM_LIBRARY_IMPL(FASTNORM_NAMESPACE, CUDA, m) { implement(m); }
#endif
