// The ops' schemas, in one place. What each argument means is said in ops.h.
#include <torch/library.h>

#include "ops.h"

// The emulated kernels are a library of their own, of the same ops for tensors on the CPU.
#if defined(FASTNORM_EMULATE)
#define FASTNORM_NAMESPACE fastnorm_emulated
#else
#define FASTNORM_NAMESPACE fastnorm
#endif
// One more step, so that the name is put in first.
#define FASTNORM_LIBRARY(name, m) TORCH_LIBRARY(name, m)
#define FASTNORM_LIBRARY_IMPL(name, key, m) TORCH_LIBRARY_IMPL(name, key, m)

FASTNORM_LIBRARY(FASTNORM_NAMESPACE, m) {
  m.def(
      "norm_forward(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? mean, Tensor? var, "
      "int kind, int groups, float eps, int activation, float activation_param, bool save_mask) "
      "-> (Tensor y, Tensor stats, Tensor mask)");
  m.def(
      "norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor stats, Tensor mask, "
      "int kind, int groups, bool frozen, int activation, float activation_param, bool[3] needs) "
      "-> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual)");
  m.def(
      "update_running_stats_(Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, "
      "Tensor stats, SymInt count, float? momentum) -> ()");
  m.def("moments(Tensor x) -> (Tensor mean, Tensor var)");
}

static void implement(torch::Library& m) {
  m.impl("norm_forward", &fastnorm::ops::norm_forward);
  m.impl("norm_backward", &fastnorm::ops::norm_backward);
  m.impl("update_running_stats_", &fastnorm::ops::update_running_stats_);
  m.impl("moments", &fastnorm::ops::moments);
}

FASTNORM_LIBRARY_IMPL(FASTNORM_NAMESPACE, CPU, m) { implement(m); }

// In a build without CUDA kernels, too: there the ops say so, and the caller turns to torch's.
#if !defined(FASTNORM_EMULATE)
FASTNORM_LIBRARY_IMPL(FASTNORM_NAMESPACE, CUDA, m) { implement(m); }
#endif
