// aten's own norms by our kernels: native_batch_norm, native_group_norm, native_layer_norm, their backwards and what
// else F.batch_norm selects. Autograd, autocast, functorch and torch.compile stay torch's: they are above, and these
// outputs have the dtypes, shapes and strides of aten's kernels.
#include "aten_op.h"
#include "aten_statistics.h"
#include "running.h"

namespace fastnorm::ops {

namespace {

using Outputs = std::tuple<Tensor, Tensor, Tensor>;
using OutputsAndReserve = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using OutputMask = std::array<bool, 3>;

// ---- what torch's own arguments have to be ----

Config batch_config(double eps) { return {0, 0, eps, 0, 0}; }

void check_values(const Tensor& x, bool training) {
  FASTNORM_SUPPORTED(x.dim() >= 2 && x.numel() > (training ? x.size(1) : 0), "x has shape ", x.sizes(),
                     ", expected several values per channel");
}

void check_groups(const Tensor& x, const c10::SymInt& N, const c10::SymInt& C, const c10::SymInt& positions,
                  int64_t groups) {
  FASTNORM_SUPPORTED(x.dim() >= 2 && x.numel() > 0 && groups > 0 && x.size(0) == N && x.size(1) == C &&
                         x.numel() == N * C * positions && C % groups == 0,
                     "x has shape ", x.sizes(), ", expected (N, C, *) with ", groups, " groups");
}

// torch's kernels take parameters of one dtype, x's or float32 where x is half; whether they are wider goes by the
// first.
void check_dtypes(const Tensor& x, const OptTensor& first, std::initializer_list<const OptTensor*> params) {
  const bool is_half = x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kHalf;
  for (const OptTensor* t : params) {
    if (!present(*t)) continue;
    const at::ScalarType type = (*t)->scalar_type();
    const bool fits = type == x.scalar_type() || (is_half && type == at::kFloat && present(first));
    FASTNORM_SUPPORTED(fits && (!present(first) || type == first->scalar_type()), "a parameter has dtype ", type,
                       " with x of ", x.scalar_type());
  }
}

// torch's CUDA kernels keep the strides of any x that is dense; ours know two layouts.
void check_layout(const Tensor& x) {
  FASTNORM_SUPPORTED(x.is_cpu() || x.is_contiguous(x.suggest_memory_format()),
                     "x is neither contiguous nor channels_last");
}

// The number of trailing dims that normalized_shape names.
int64_t normalized_dims(const Tensor& x, c10::SymIntArrayRef shape) {
  const auto dims = static_cast<int64_t>(shape.size());
  FASTNORM_SUPPORTED(x.numel() > 0, "x has no elements");
  FASTNORM_SUPPORTED(dims > 0 && dims <= x.dim() && x.sym_sizes().slice(x.dim() - dims) == shape, "x has shape ",
                     x.sizes(), ", expected one that ends in ", shape);
  return dims;
}

// ---- forward ----

Outputs batch_norm(const Tensor& x, const OptTensor& weight, const OptTensor& bias, const OptTensor& running_mean,
                   const OptTensor& running_var, bool training, double momentum, double eps) {
  check_values(x, training);
  FASTNORM_SUPPORTED(training ? eps > 0 : eps >= 0, "eps is ", eps, ", expected a positive one");
  FASTNORM_SUPPORTED(present(running_mean) == present(running_var), "one of running_mean and running_var is given");
  FASTNORM_SUPPORTED(training || present(running_mean), "there are no running statistics to use");
  check_dtypes(x, present(weight) ? weight : running_mean, {&weight, &bias, &running_mean, &running_var});
  check_layout(x);
  const Inputs inputs{x, weight, bias, kAbsent};
  const at::ScalarType type = saved_type(x, {&weight, &bias, &running_mean, &running_var});
  if (!training) {
    const Tensor y = std::get<0>(norm_forward(inputs, running_mean, running_var, batch_config(eps), false));
    return {y, nothing(x, type), nothing(x, type)};
  }
  const Running running{running_mean, running_var, kAbsent, momentum};
  const auto [y, stats, mask] = running.present() ? batch_norm_forward_(inputs, running, batch_config(eps), false)
                                                  : norm_forward(inputs, {}, {}, batch_config(eps), false);
  const int64_t channels = stats.size(1);
  return {y, saved_row(stats, kMean, channels, type), saved_row(stats, kRstd, channels, type)};
}

Outputs batch_norm_legit(const Tensor& x, const OptTensor& weight, const OptTensor& bias, Tensor& running_mean,
                         Tensor& running_var, bool training, double momentum, double eps) {
  return batch_norm(x, weight, bias, running_mean, running_var, training, momentum, eps);
}

Outputs batch_norm_no_stats(const Tensor& x, const OptTensor& weight, const OptTensor& bias, bool training,
                            double momentum, double eps) {
  return batch_norm(x, weight, bias, {}, {}, training, momentum, eps);
}

Outputs batch_norm_no_training(const Tensor& x, const OptTensor& weight, const OptTensor& bias,
                               const Tensor& running_mean, const Tensor& running_var, double momentum, double eps) {
  return batch_norm(x, weight, bias, running_mean, running_var, false, momentum, eps);
}

// The last output is what the backward of torch's backend wants, as cuDNN's. An empty one tells cuDNN's operator that
// ours has to follow, whatever the switch then is.
OutputsAndReserve with_reserve(const Tensor& x, const Outputs& outputs) {
  const auto& [y, mean, rstd] = outputs;
  return {y, mean, rstd, nothing(x, at::kByte)};
}

OutputsAndReserve cudnn_batch_norm(const Tensor& x, const Tensor& weight, const OptTensor& bias,
                                   const OptTensor& running_mean, const OptTensor& running_var, bool training,
                                   double momentum, double eps) {
  return with_reserve(x, batch_norm(x, weight, bias, running_mean, running_var, training, momentum, eps));
}

// Where torch picks one of its backends itself. On a GPU it hands the choice to backward in the last output, whose
// format is torch's own.
void check_backend_is_ours(const Tensor& x) { FASTNORM_SUPPORTED(x.is_cpu(), "torch picks the backend of a GPU"); }

OutputsAndReserve batch_norm_with_update(const Tensor& x, const OptTensor& weight, const OptTensor& bias,
                                         Tensor& running_mean, Tensor& running_var, double momentum, double eps) {
  check_backend_is_ours(x);
  return with_reserve(x, batch_norm(x, weight, bias, running_mean, running_var, true, momentum, eps));
}

OutputsAndReserve batch_norm_no_update(const Tensor& x, const OptTensor& weight, const OptTensor& bias,
                                       const OptTensor& running_mean, const OptTensor& running_var, double momentum,
                                       double eps) {
  check_backend_is_ours(x);
  return with_reserve(x, batch_norm(x, weight, bias, running_mean, running_var, false, momentum, eps));
}

Outputs group_norm(const Tensor& x, const OptTensor& weight, const OptTensor& bias, c10::SymInt N, c10::SymInt C,
                   c10::SymInt positions, int64_t groups, double eps) {
  check_groups(x, N, C, positions, groups);
  FASTNORM_SUPPORTED(x.is_contiguous(x.is_cpu() ? x.suggest_memory_format() : at::MemoryFormat::Contiguous),
                     "x is not contiguous");
  check_dtypes(x, weight, {&weight, &bias});
  const auto [y, stats, mask] = norm_forward({x, weight, bias, kAbsent}, {}, {}, {groups, 0, eps, 0, 0}, false);
  const at::ScalarType type = saved_type(x, {&weight, &bias});
  const std::array<int64_t, 2> sizes{x.size(0), groups};
  return {y, saved_row(stats, kMean, sizes, type), saved_row(stats, kRstd, sizes, type)};
}

Outputs layer_norm(const Tensor& x, c10::SymIntArrayRef shape, const OptTensor& weight, const OptTensor& bias,
                   double eps) {
  const int64_t dims = normalized_dims(x, shape);
  check_dtypes(x, weight, {&weight, &bias});
  const auto [y, stats, mask] = norm_forward({x, weight, bias, kAbsent}, {}, {}, {0, dims, eps, 0, 0}, false);
  const at::ScalarType type = saved_type(x, {&weight, &bias});
  c10::DimVector sizes(x.sizes());
  std::fill(sizes.end() - dims, sizes.end(), 1);
  return {y, saved_row(stats, kMean, sizes, type), saved_row(stats, kRstd, sizes, type)};
}

// ---- backward ----

// bias: null where aten does not pass it. Only its dtype and shape matter here, which are weight's.
Outputs backward(const Tensor& dy, const Tensor& x, const OptTensor& weight, const OptTensor& bias, const Tensor& stats,
                 const Config& config, bool frozen, OutputMask wanted) {
  const OptTensor& like_bias = present(bias) ? bias : weight;
  FASTNORM_SUPPORTED((!wanted[1] || present(weight)) && (!wanted[2] || present(like_bias)),
                     "the gradient of a parameter is wanted that is not given");
  FASTNORM_SUPPORTED(dy.defined(), "the output has no gradient");
  auto [dx, dweight, dbias, dresidual] =
      norm_backward(dy, {x, weight, wanted[2] ? like_bias : kAbsent, kAbsent}, stats, Tensor(), config, frozen,
                    {wanted[0], wanted[1] || wanted[2], false});
  const auto given = [](bool is_wanted, Tensor& t) { return is_wanted ? std::move(t) : Tensor(); };
  return {given(wanted[0], dx), given(wanted[1], dweight), given(wanted[2], dbias)};
}

Outputs batch_norm_backward(const Tensor& dy, const Tensor& x, const OptTensor& weight, const OptTensor& running_mean,
                            const OptTensor& running_var, const OptTensor& save_mean, const OptTensor& save_rstd,
                            bool training, double eps, OutputMask wanted) {
  check_values(x, training);
  FASTNORM_SUPPORTED(
      training ? present(save_mean) && present(save_rstd) : present(running_mean) && present(running_var),
      "there are no statistics");
  check_layout(x);
  const Tensor &mean = training ? *save_mean : *running_mean, rstd = training ? *save_rstd : rstd_of(*running_var, eps);
  const Tensor stats = stats_of(mean, rstd, x.size(1), dtype_of(x, "x"));
  return backward(dy, x, weight, {}, stats, batch_config(eps), !training, wanted);
}

Outputs batch_norm_backward_of_backend(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                       const OptTensor& running_mean, const OptTensor& running_var,
                                       const OptTensor& save_mean, const OptTensor& save_rstd, bool update, double eps,
                                       OutputMask wanted, const Tensor& /*reserve*/) {
  check_backend_is_ours(x);
  return batch_norm_backward(dy, x, weight, running_mean, running_var, save_mean, save_rstd, update, eps, wanted);
}

Outputs cudnn_batch_norm_backward(const Tensor& x, const Tensor& dy, const Tensor& weight,
                                  const OptTensor& running_mean, const OptTensor& running_var,
                                  const OptTensor& save_mean, const OptTensor& save_rstd, double eps,
                                  const Tensor& reserve) {
  FASTNORM_SUPPORTED(reserve.numel() == 0, "cuDNN ran forward");
  return batch_norm_backward(dy, x, weight, running_mean, running_var, save_mean, save_rstd, true, eps,
                             {true, true, true});
}

Outputs group_norm_backward(const Tensor& dy, const Tensor& x, const Tensor& mean, const Tensor& rstd,
                            const OptTensor& weight, c10::SymInt N, c10::SymInt C, c10::SymInt positions,
                            int64_t groups, OutputMask wanted) {
  check_groups(x, N, C, positions, groups);
  check_layout(x);
  const Tensor stats = stats_of(mean, rstd, x.size(0) * groups, dtype_of(x, "x"));
  return backward(dy, x, weight, {}, stats, {groups, 0, 0, 0, 0}, false, wanted);
}

Outputs layer_norm_backward(const Tensor& dy, const Tensor& x, c10::SymIntArrayRef shape, const Tensor& mean,
                            const Tensor& rstd, const OptTensor& weight, const OptTensor& bias, OutputMask wanted) {
  const int64_t dims = normalized_dims(x, shape);
  const int64_t rows = c10::multiply_integers(x.sizes().slice(0, x.dim() - dims));
  const Tensor stats = stats_of(mean, rstd, rows, dtype_of(x, "x"));
  return backward(dy, x, weight, bias, stats, {0, dims, 0, 0, 0}, false, wanted);
}

}  // namespace

void add_aten_norms(torch::Library& library) {
  using enum AtenNorm;
  AtenOp<kBatch, "native_batch_norm", &batch_norm>{library};
  AtenOp<kBatch, "_native_batch_norm_legit", &batch_norm_legit>{library};
  AtenOp<kBatch, "_native_batch_norm_legit", &batch_norm_no_stats, "no_stats">{library};
  AtenOp<kBatch, "_native_batch_norm_legit_no_training", &batch_norm_no_training>{library};
  AtenOp<kBatch, "native_batch_norm_backward", &batch_norm_backward>{library};
  AtenOp<kBatch, "_batch_norm_with_update", &batch_norm_with_update>{library};
  AtenOp<kBatch, "_batch_norm_no_update", &batch_norm_no_update>{library};
  AtenOp<kBatch, "batch_norm_backward", &batch_norm_backward_of_backend>{library};
  AtenOp<kBatch, "cudnn_batch_norm", &cudnn_batch_norm>{library};
  AtenOp<kBatch, "cudnn_batch_norm_backward", &cudnn_batch_norm_backward, "", Asks::kKernel>{library};
  AtenOp<kGroup, "native_group_norm", &group_norm>{library};
  AtenOp<kGroup, "native_group_norm_backward", &group_norm_backward>{library};
  AtenOp<kLayer, "native_layer_norm", &layer_norm>{library};
  AtenOp<kLayer, "native_layer_norm_backward", &layer_norm_backward>{library};
}

void register_aten_kernels() {
  static torch::Library library = [] {
    torch::Library l(torch::Library::IMPL, "aten", c10::DispatchKey::BackendSelect, __FILE__, __LINE__);
    add_aten_norms(l);
    add_aten_sync(l);
    return l;
  }();
}

}  // namespace fastnorm::ops
