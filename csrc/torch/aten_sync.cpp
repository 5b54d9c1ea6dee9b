// The steps of torch.nn.SyncBatchNorm by our kernels: those that walk the tensor. What is left to torch is a fold of a
// few numbers for each rank. (On the CPU torch has no kernels for these.)
#include <ATen/ops/mul.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/sum.h>

#include "aten_op.h"
#include "aten_statistics.h"

namespace fastnorm::ops {

namespace {

void check_values(const Tensor& x) {
  FASTNORM_SUPPORTED(x.dim() >= 2 && x.numel() > 0, "x has shape ", x.sizes(), ", expected some values per channel");
}

Tensor stats_of_channels(const Tensor& x, const Tensor& mean, const Tensor& rstd) {
  check_values(x);
  return stats_of(mean, rstd, x.size(1), dtype_of(x, "x"));
}

std::tuple<Tensor, Tensor> batch_norm_stats(const Tensor& x, double eps) {
  check_values(x);
  const Tensor stats = channel_stats(x, eps);
  const auto row = [&](StatsRow r) { return saved_row(stats, r, x.size(1), stats.scalar_type()); };
  return {row(kMean), row(kRstd)};
}

Tensor batch_norm_elemt(const Tensor& x, const OptTensor& weight, const OptTensor& bias, const Tensor& mean,
                        const Tensor& rstd, double /*eps*/) {
  return std::get<0>(
      batch_norm_apply({x, weight, bias, kAbsent}, stats_of_channels(x, mean, rstd), 0, 0.0, /*save_mask=*/false));
}

// Sums of dy and of dy (x - mean), and the gradients of weight and bias.
std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_backward_reduce(const Tensor& dy, const Tensor& x,
                                                                      const Tensor& mean, const Tensor& rstd,
                                                                      const OptTensor& weight, bool input_wanted,
                                                                      bool weight_wanted, bool bias_wanted) {
  const Tensor stats = stats_of_channels(x, mean, rstd);
  const Tensor sums = batch_norm_backward_sums(dy, {x, weight, kAbsent, kAbsent}, stats, Tensor(), 0, 0.0);
  const Tensor sum_dy = sums.select(0, 0), sum_dy_xhat = sums.select(0, 1);
  std::tuple<Tensor, Tensor, Tensor, Tensor> result;
  if (input_wanted) {
    std::get<0>(result) = sum_dy.clone();
    std::get<1>(result) = sum_dy_xhat.div(rstd);
  }
  const auto like_weight = [&](const Tensor& t) { return present(weight) ? t.to(weight->scalar_type()) : t; };
  if (weight_wanted) std::get<2>(result) = like_weight(sum_dy_xhat.clone());
  if (bias_wanted) std::get<3>(result) = like_weight(sum_dy.clone());
  return result;
}

// The sums are those of all ranks, count has a number for each.
Tensor batch_norm_backward_elemt(const Tensor& dy, const Tensor& x, const Tensor& mean, const Tensor& rstd,
                                 const OptTensor& weight, const Tensor& sum_dy, const Tensor& sum_dy_xmu,
                                 const Tensor& count) {
  const Tensor stats = stats_of_channels(x, mean, rstd);
  const at::ScalarType type = stats.scalar_type();
  const Tensor sums = at::stack({sum_dy.to(type), at::mul(sum_dy_xmu, rstd).to(type)});
  const Tensor whole = count.sum().to(at::kDouble);
  return std::get<0>(batch_norm_backward_apply(dy, {x, weight, kAbsent, kAbsent}, stats, Tensor(), sums, whole, 0, 0.0,
                                               {true, false}));
}

}  // namespace

void add_aten_sync(torch::Library& library) {
  using enum AtenNorm;
  AtenOp<kBatch, "batch_norm_stats", &batch_norm_stats>{library};
  AtenOp<kBatch, "batch_norm_elemt", &batch_norm_elemt>{library};
  AtenOp<kBatch, "batch_norm_backward_reduce", &batch_norm_backward_reduce>{library};
  AtenOp<kBatch, "batch_norm_backward_elemt", &batch_norm_backward_elemt>{library};
}

}  // namespace fastnorm::ops
