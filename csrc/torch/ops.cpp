#include "ops.h"

#include <ATen/MemoryOverlap.h>

#include "backend.h"
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
  Tensor stats(const Geometry& g, DType dtype) const { return empty({4, g.sets()}, accum_type(dtype)); }
  // What an op returns for an output that is not needed.
  Tensor nothing() const { return empty({0}, x_.scalar_type()); }
  Tensor like_x(bool needed, const View& view) const {
    return needed ? backend_.make_empty(x_.sizes(), x_.scalar_type(), view.format, x_.device()) : nothing();
  }
  Tensor like_param(bool needed, const OptTensor& param, ParamGrads& grads) const {
    if (!needed || !present(param)) return nothing();
    Tensor grad = empty(param->sizes(), param->scalar_type());
    grads = {grad.mutable_data_ptr(), dtype_of(grad, "a parameter")};
    return grad;
  }

 private:
  const Backend& backend_;
  const Tensor& x_;
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> norm_forward(const Tensor& x, const OptTensor& weight, const OptTensor& bias,
                                                const OptTensor& residual, const OptTensor& mean, const OptTensor& var,
                                                int64_t kind, int64_t groups, double eps, int64_t activation,
                                                double activation_param, bool save_mask) {
  const Allocator allocate(x);
  const DType dtype = dtype_of(x, "x");
  const View view(x, kind, groups);
  const Geometry& g = view.geometry;
  ForwardArgs args{};
  args.geometry = g;
  args.dtype = dtype;
  args.activation = check_activation(activation);
  args.activation_param = activation_param;
  args.eps = eps;
  check_params(weight, "weight", x, view);
  check_params(bias, "bias", x, view);
  check_same_dtype(weight, bias, "weight and bias");
  TORCH_CHECK(present(mean) == present(var), "fastnorm: of mean and var one is given, expected both or neither");
  TORCH_CHECK(!present(mean) || kind == 0, "fastnorm: mean and var are given with kind ", kind,
              ", expected kind 0 (batch)");
  check_params(mean, "mean", x, view);
  check_params(var, "var", x, view);
  check_same_dtype(mean, var, "mean and var");
  if (present(residual)) check_like_x(*residual, "residual", x);

  Tensor y = allocate.like_x(true, view);
  Tensor stats = allocate.stats(g, dtype);
  const bool masked = save_mask && present(residual) && is_two_sided(args.activation);
  Tensor mask = allocate.empty({masked ? mask_bytes(g, dtype) : 0}, at::kByte);
  if (g.numel() == 0) {
    stats.zero_();
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
  args.stats = stats.mutable_data_ptr();
  allocate.backend().forward(args, x.device());
  return {y, stats, mask};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_backward(const Tensor& dy, const Tensor& x, const OptTensor& weight,
                                                         const OptTensor& bias, const OptTensor& residual,
                                                         const Tensor& stats, const Tensor& mask, int64_t kind,
                                                         int64_t groups, bool frozen, int64_t activation,
                                                         double activation_param, std::array<bool, 3> needs) {
  const Allocator allocate(x);
  const DType dtype = dtype_of(x, "x");
  const View view(x, kind, groups);
  const Geometry& g = view.geometry;
  TORCH_CHECK(!frozen || kind == 0, "fastnorm: frozen is set with kind ", kind, ", expected kind 0 (batch)");
  BackwardArgs args{};
  args.geometry = g;
  args.dtype = dtype;
  args.frozen = frozen;
  args.activation = check_activation(activation);
  args.activation_param = activation_param;
  check_params(weight, "weight", x, view);
  check_params(bias, "bias", x, view);
  check_same_dtype(weight, bias, "weight and bias");
  check_on(stats, "stats", x.device());
  TORCH_CHECK(stats.scalar_type() == accum_type(dtype) && stats.sizes() == at::IntArrayRef({4, g.sets()}) &&
                  stats.is_contiguous(),
              "fastnorm: stats has dtype ", stats.scalar_type(), " and shape ", stats.sizes(),
              ", expected a contiguous ", accum_type(dtype), " [4, ", g.sets(), "]");
  check_like_x(dy, "dy", x);
  if (present(residual)) check_like_x(*residual, "residual", x);
  check_on(mask, "mask", x.device());
  const bool masked = mask.numel() > 0;
  TORCH_CHECK(!masked || (mask.scalar_type() == at::kByte && mask.is_contiguous() && is_two_sided(args.activation) &&
                          mask.numel() == mask_bytes(g, dtype)),
              "fastnorm: mask has dtype ", mask.scalar_type(), " and shape ", mask.sizes(), ", expected uint8 [",
              mask_bytes(g, dtype), "] of a norm_forward with the same arguments");

  const bool residual_needed = needs[2] && args.activation != Activation::kNone;
  Tensor dx = allocate.like_x(needs[0], view);
  Tensor dresidual = allocate.like_x(residual_needed, view);
  Tensor dweight = allocate.like_param(needs[1], weight, args.dweight);
  Tensor dbias = allocate.like_param(needs[1], bias, args.dbias);
  if (g.numel() == 0) {
    dweight.zero_();
    dbias.zero_();
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
  args.dx = needs[0] ? dx.mutable_data_ptr() : nullptr;
  args.dresidual = residual_needed ? dresidual.mutable_data_ptr() : nullptr;
  allocate.backend().backward(args, x.device());
  return {dx, dweight, dbias, dresidual};
}

namespace {

ParamGrads check_running(const OptTensor& t, const char* name, const Tensor& stats, int64_t& stride) {
  if (!present(t)) return {nullptr, DType::kFloat32};
  check_on(*t, name, stats.device());
  const DType dtype = dtype_of(*t, name);
  at::assert_no_internal_overlap(*t);
  at::assert_no_overlap(*t, stats);
  const int64_t sets = stats.size(1);
  TORCH_CHECK(t->dim() == 1 && (t->numel() == 0 ? sets == 0 : sets % t->numel() == 0), "fastnorm: ", name,
              " has shape ", t->sizes(), ", expected one that divides the ", sets, " sets of stats");
  stride = t->stride(0);
  return {t->mutable_data_ptr(), dtype};
}

}  // namespace

void update_running_stats_(const OptTensor& running_mean, const OptTensor& running_var,
                           const OptTensor& num_batches_tracked, const Tensor& stats, int64_t count,
                           std::optional<double> momentum) {
  const Backend& backend = backend_of(stats, "stats");
  check_on(stats, "stats", stats.device());
  TORCH_CHECK((stats.scalar_type() == at::kFloat || stats.scalar_type() == at::kDouble) && stats.dim() == 2 &&
                  stats.size(0) == 4 && stats.is_contiguous(),
              "fastnorm: stats has dtype ", stats.scalar_type(), " and shape ", stats.sizes(),
              ", expected a contiguous float32 or float64 [4, sets]");
  RunningArgs args{};
  args.running_mean = check_running(running_mean, "running_mean", stats, args.mean_stride);
  args.running_var = check_running(running_var, "running_var", stats, args.var_stride);
  if (present(running_mean) && present(running_var)) {
    at::assert_no_overlap(*running_mean, *running_var);
    TORCH_CHECK(running_mean->sizes() == running_var->sizes(), "fastnorm: running_mean and running_var have shapes ",
                running_mean->sizes(), " and ", running_var->sizes(), ", expected one");
  }
  TORCH_CHECK(count >= 0, "fastnorm: count is ", count, ", expected the number of elements of a set");
  TORCH_CHECK(momentum.has_value() || present(num_batches_tracked),
              "fastnorm: momentum is absent, expected num_batches_tracked to average by");
  if (present(num_batches_tracked)) {
    check_on(*num_batches_tracked, "num_batches_tracked", stats.device());
    TORCH_CHECK(num_batches_tracked->scalar_type() == at::kLong && num_batches_tracked->numel() == 1,
                "fastnorm: num_batches_tracked has dtype ", num_batches_tracked->scalar_type(), " and ",
                num_batches_tracked->numel(), " elements, expected one int64");
    args.num_batches_tracked = num_batches_tracked->mutable_data_ptr<int64_t>();
  }
  args.dtype = dtype_of(stats, "stats");
  args.stats = stats.const_data_ptr();
  args.sets = stats.size(1);
  args.channels = present(running_mean) ? running_mean->numel() : present(running_var) ? running_var->numel() : 0;
  args.count = count;
  args.cumulative = !momentum.has_value();
  args.momentum = momentum.value_or(0);
  backend.update_running_stats(args, stats.device());
}

std::tuple<Tensor, Tensor> moments(const Tensor& x) {
  const Allocator allocate(x);
  const DType dtype = dtype_of(x, "x");
  const View view(x, 0, 0);
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
  return {stats[0].clone(), stats[2].clone()};
}

}  // namespace fastnorm::ops
