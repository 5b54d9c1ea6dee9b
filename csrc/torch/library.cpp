// The ops' schemas, in one place. What each argument means is said in ops.h.
#include <torch/library.h>

#include "ops.h"

TORCH_LIBRARY(fastnorm, m) {
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

TORCH_LIBRARY_IMPL(fastnorm, CPU, m) {
  m.impl("norm_forward", &fastnorm::ops::norm_forward);
  m.impl("norm_backward", &fastnorm::ops::norm_backward);
  m.impl("update_running_stats_", &fastnorm::ops::update_running_stats_);
  m.impl("moments", &fastnorm::ops::moments);
}
