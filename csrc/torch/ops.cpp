#include "ops.h"

#include <ATen/MemoryOverlap.h>

#include "backend.h"
#include "core/formulas.h"
#include "running.h"
#include "tensor_args.h"

namespace fastnorm::ops {

namespace {

// New tensors where x lies.
class Allocator {
 public:
  explicit Allocator(const Tensor& x) : backend_(backend_of(x, "x")), x_(x) { check_on(x, "x", x.device()); }
  const Backend& backend() const { return backend_; }

  Tensor empty(at::IntArrayRef sizes, at::ScalarType type) const {
    return backend_.make_empty(sizes, type, at::MemoryFormat::Contiguous, x_.device());
  }
  Tensor stats(const Geometry& g, DType dtype) const { return empty({kStatsRows, g.sets()}, accum_type(dtype)); }
  Tensor like_x(bool needed, const View& view) const {
    return needed ? backend_.make_empty(x_.sizes(), x_.scalar_type(), view.format, x_.device()) : Tensor();
  }
  Tensor like_param(bool needed, const OptTensor& param, ParamGrads& grads) const {
    if (!needed || !present(param)) return Tensor();
    Tensor grad = empty(param->sizes(), param->scalar_type());
    grads = {grad.mutable_data_ptr(), dtype_of(grad, "a parameter")};
    return grad;
  }

 private:
  const Backend& backend_;
  const Tensor& x_;
};

// The buffers as kernels take them, to be moved by statistics of so many sets of `count` elements each.
RunningArgs running_args(const Running& running, int64_t sets, int64_t count) {
  RunningArgs args{};
  args.sets = sets;
  for (const auto& [t, name, grads, stride] :
       {std::tuple(&running.mean, "running_mean", &args.running_mean, &args.mean_stride),
        std::tuple(&running.var, "running_var", &args.running_var, &args.var_stride)}) {
    if (!present(*t)) continue;
    const int64_t channels = (*t)->numel();
    FASTNORM_SUPPORTED(channels == 0 ? sets == 0 : sets % channels == 0, name, " has shape ", (*t)->sizes(),
                       ", expected one that divides the ", sets, " sets of stats");
    args.channels = channels;
    *grads = {(*t)->mutable_data_ptr(), dtype_of(**t, name)};
    *stride = (*t)->stride(0);
  }
  const OptTensor& batches = running.num_batches_tracked;
  if (present(batches)) args.num_batches_tracked = batches->mutable_data_ptr<int64_t>();
  args.count = count;
  args.unbiased = unbiased(static_cast<double>(count));
  args.cumulative = !running.momentum.has_value();
  args.momentum = running.momentum.value_or(0);
  return args;
}

// running: the statistics that move, or null.
Forward run_forward(const Inputs& inputs, const OptTensor& mean, const OptTensor& var, const Config& config,
                    bool save_mask, const Running* running) {
  const auto& [x, weight, bias, residual] = inputs;
  const Allocator allocate(x);
  const DType dtype = dtype_of(x, "x");
  const View view(x, config.groups, config.normalized_dims);
  const Geometry& g = view.geometry;
  ForwardArgs args{};
  args.geometry = g;
  args.dtype = dtype;
  args.activation = check_activation(config.activation);
  args.activation_param = config.activation_param;
  args.eps = config.eps;
  check_params(weight, "weight", x, view);
  check_params(bias, "bias", x, view);
  check_same_dtype(weight, bias, "weight and bias");
  FASTNORM_SUPPORTED(present(mean) == present(var), "of mean and var one is given, expected both or neither");
  FASTNORM_SUPPORTED(!present(mean) || config.is_batch(), "mean and var are given with groups = ", config.groups,
                     " and normalized_dims = ", config.normalized_dims, ", expected both 0 (batch norm)");
  check_params(mean, "mean", x, view);
  check_params(var, "var", x, view);
  check_same_dtype(mean, var, "mean and var");
  if (present(residual)) check_like_x(*residual, "residual", x);
  if (running != nullptr) {
    running->check(x.device());
    args.running = running_args(*running, g.sets(), g.set_size());
    FASTNORM_SUPPORTED(!running->present() || args.running.channels == g.C, "there are running statistics of ",
                       args.running.channels, " channels, expected ", g.C);
  }

  Tensor y = allocate.like_x(true, view);
  Tensor stats = allocate.stats(g, dtype);
  const bool masked = save_mask && present(residual) && is_two_sided(args.activation);
  const Tensor mask = masked ? allocate.empty({mask_bytes(g, dtype)}, at::kByte) : Tensor();
  args.stats = stats.mutable_data_ptr();
  args.running.dtype = dtype_of(stats, "stats");
  args.running.stats = args.stats;
  if (g.numel() == 0) {
    stats.zero_();
    args.running.count = 0;
    if (running != nullptr) allocate.backend().update_running_stats(args.running, x.device());
    return {y, stats, mask};
  }
  Tensor keep_weight, keep_bias, keep_mean, keep_var;
  args.weight = params_of(weight, keep_weight);
  args.bias = params_of(bias, keep_bias);
  args.running_mean = params_of(mean, keep_mean);
  args.running_var = params_of(var, keep_var);
  const Tensor dense = view.dense(x), dense_residual = present(residual) ? view.dense(*residual) : Tensor();
  args.x = dense.const_data_ptr();
  args.residual = dense_residual.defined() ? dense_residual.const_data_ptr() : nullptr;
  args.y = y.mutable_data_ptr();
  args.mask = masked ? mask.mutable_data_ptr<uint8_t>() : nullptr;
  allocate.backend().forward(args, x.device());
  return {y, stats, mask};
}

}  // namespace

Forward norm_forward(const Inputs& inputs, const OptTensor& mean, const OptTensor& var, const Config& config,
                     bool save_mask) {
  return run_forward(inputs, mean, var, config, save_mask, nullptr);
}

Forward batch_norm_forward_(const Inputs& inputs, const Running& running, const Config& config, bool save_mask) {
  return run_forward(inputs, {}, {}, config, save_mask, &running);
}

Backward norm_backward(const Tensor& dy, const Inputs& inputs, const Tensor& stats, const Tensor& mask,
                       const Config& config, bool frozen, std::array<bool, 3> output_mask) {
  const auto& [x, weight, bias, residual] = inputs;
  const Allocator allocate(x);
  const DType dtype = dtype_of(x, "x");
  const View view(x, config.groups, config.normalized_dims);
  const Geometry& g = view.geometry;
  FASTNORM_SUPPORTED(!frozen || config.is_batch(), "frozen is set with groups = ", config.groups,
                     " and normalized_dims = ", config.normalized_dims, ", expected both 0 (batch norm)");
  BackwardArgs args{};
  args.geometry = g;
  args.dtype = dtype;
  args.frozen = frozen;
  args.activation = check_activation(config.activation);
  args.activation_param = config.activation_param;
  check_params(weight, "weight", x, view);
  check_params(bias, "bias", x, view);
  check_same_dtype(weight, bias, "weight and bias");
  check_on(stats, "stats", x.device());
  FASTNORM_SUPPORTED(stats.scalar_type() == accum_type(dtype) &&
                         stats.sizes() == at::IntArrayRef({kStatsRows, g.sets()}) && stats.is_contiguous(),
                     "stats has dtype ", stats.scalar_type(), " and shape ", stats.sizes(), ", expected a contiguous ",
                     accum_type(dtype), " [", kStatsRows, ", ", g.sets(), "]");
  check_like_x(dy, "dy", x);
  if (present(residual)) check_like_x(*residual, "residual", x);
  if (mask.defined()) check_on(mask, "mask", x.device());
  const bool masked = mask.defined() && mask.numel() > 0;
  FASTNORM_SUPPORTED(!masked || (mask.scalar_type() == at::kByte && mask.is_contiguous() &&
                                 is_two_sided(args.activation) && mask.numel() == mask_bytes(g, dtype)),
                     "mask has dtype ", mask.scalar_type(), " and shape ", mask.sizes(), ", expected uint8 [",
                     mask_bytes(g, dtype), "] of a norm_forward with the same arguments");

  const bool residual_needed = output_mask[2] && args.activation != Activation::kNone;
  Tensor dx = allocate.like_x(output_mask[0], view);
  Tensor dresidual = allocate.like_x(residual_needed, view);
  Tensor dweight = allocate.like_param(output_mask[1], weight, args.dweight);
  Tensor dbias = allocate.like_param(output_mask[1], bias, args.dbias);
  if (g.numel() == 0) {
    if (dweight.defined()) dweight.zero_();
    if (dbias.defined()) dbias.zero_();
    return {dx, dweight, dbias, dresidual};
  }
  Tensor keep_weight, keep_bias;
  args.weight = params_of(weight, keep_weight);
  args.bias = params_of(bias, keep_bias);
  const bool residual_read = present(residual) && !masked && args.activation != Activation::kNone;
  const Tensor dense_x = view.dense(x), dense_dy = view.dense(dy),
               dense_residual = residual_read ? view.dense(*residual) : Tensor();
  args.dy = dense_dy.const_data_ptr();
  args.x = dense_x.const_data_ptr();
  args.residual = residual_read ? dense_residual.const_data_ptr() : nullptr;
  args.mask = masked ? mask.const_data_ptr<uint8_t>() : nullptr;
  args.stats = stats.const_data_ptr();
  args.dx = output_mask[0] ? dx.mutable_data_ptr() : nullptr;
  args.dresidual = residual_needed ? dresidual.mutable_data_ptr() : nullptr;
  allocate.backend().backward(args, x.device());
  return {dx, dweight, dbias, dresidual};
}

void update_running_stats_(const OptTensor& running_mean, const OptTensor& running_var,
                           const OptTensor& num_batches_tracked, const Tensor& stats, int64_t count,
                           std::optional<double> momentum) {
  const Backend& backend = backend_of(stats, "stats");
  check_on(stats, "stats", stats.device());
  FASTNORM_SUPPORTED((stats.scalar_type() == at::kFloat || stats.scalar_type() == at::kDouble) && stats.dim() == 2 &&
                         stats.size(0) == kStatsRows && stats.is_contiguous(),
                     "stats has dtype ", stats.scalar_type(), " and shape ", stats.sizes(),
                     ", expected a contiguous float32 or float64 [", kStatsRows, ", sets]");
  FASTNORM_SUPPORTED(count >= 0, "count is ", count, ", expected the number of elements of a set");
  const Running running{running_mean, running_var, num_batches_tracked, momentum};
  running.check(stats.device());
  for (const auto& [t, name] : {std::pair(&running_mean, "running_mean"), std::pair(&running_var, "running_var")}) {
    FASTNORM_SUPPORTED(!present(*t) || !overlap(**t, stats), name, " overlaps stats");
  }
  RunningArgs args = running_args(running, stats.size(1), count);
  args.dtype = dtype_of(stats, "stats");
  args.stats = stats.const_data_ptr();
  backend.update_running_stats(args, stats.device());
}

std::tuple<Tensor, Tensor> moments(const Tensor& x) {
  const Allocator allocate(x);
  const DType dtype = dtype_of(x, "x");
  const View view(x, 0, 0);  // as batch norm
  const Geometry& g = view.geometry;
  Tensor stats = allocate.stats(g, dtype);
  if (g.numel() == 0) {
    stats.zero_();
  } else {
    const Tensor dense = view.dense(x);
    ForwardArgs args{};
    args.geometry = g;
    args.dtype = dtype;
    args.x = dense.const_data_ptr();
    args.stats = stats.mutable_data_ptr();
    allocate.backend().forward(args, x.device());
  }
  return {stats[kMean].clone(), stats[kVar].clone()};
}

}  // namespace fastnorm::ops
