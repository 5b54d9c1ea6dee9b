#include "ops.h"

#include <ATen/MemoryOverlap.h>

#include <cmath>
#include <limits>
#include <vector>

#include "tensor_args.h"

namespace fastnorm::ops {

namespace {

// What an op returns for an output that is not needed.
Tensor nothing(const Tensor& like) { return make_empty({0}, like.scalar_type()); }

// The C++ type that a tensor's elements have in ATen.
template <class F>
void dispatch_scalar(at::ScalarType type, F&& f) {
  switch (type) {
    case at::kDouble: return f(double{});
    case at::kBFloat16: return f(at::BFloat16{});
    case at::kHalf: return f(at::Half{});
    default: return f(float{});
  }
}

// The kernel's double sums as the gradient of `param`.
Tensor param_grad(const OptTensor& param, const double* sums, const Tensor& x) {
  if (!present(param)) return nothing(x);
  Tensor grad = make_empty(param->sizes(), param->scalar_type());
  dispatch_scalar(grad.scalar_type(), [&](auto zero) {
    using P = decltype(zero);
    P* out = grad.mutable_data_ptr<P>();
    for (int64_t c = 0; c < grad.numel(); ++c) {
      if constexpr (std::is_same_v<P, double>) {
        out[c] = sums[c];
      } else {
        out[c] = static_cast<P>(static_cast<float>(sums[c]));
      }
    }
  });
  return grad;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> norm_forward(const Tensor& x, const OptTensor& weight, const OptTensor& bias,
                                                const OptTensor& residual, const OptTensor& mean, const OptTensor& var,
                                                int64_t kind, int64_t groups, double eps, int64_t activation,
                                                double activation_param, bool save_mask) {
  check_cpu(x, "x");
  const DType dtype = dtype_of(x, "x");
  const View view(x, kind, groups);
  const Geometry& g = view.geometry;
  Tensor keep_weight, keep_bias, keep_mean, keep_var, keep_residual;
  ForwardArgs args{};
  args.geometry = g;
  args.dtype = dtype;
  args.activation = check_activation(activation);
  args.activation_param = activation_param;
  args.eps = eps;
  args.weight = check_params(weight, "weight", x, view.params(), keep_weight);
  args.bias = check_params(bias, "bias", x, view.params(), keep_bias);
  check_same_dtype(weight, bias, "weight and bias");
  TORCH_CHECK(present(mean) == present(var), "fastnorm: of mean and var one is given, expected both or neither");
  const bool frozen = present(mean);
  TORCH_CHECK(!frozen || kind == 0, "fastnorm: mean and var are given with kind ", kind, ", expected kind 0 (batch)");
  args.running_mean = check_params(mean, "mean", x, view.params(), keep_mean);
  args.running_var = check_params(var, "var", x, view.params(), keep_var);
  check_same_dtype(mean, var, "mean and var");
  if (present(residual)) keep_residual = check_like_x(*residual, "residual", x, view);

  const Tensor dense = view.dense(x);
  Tensor y = make_output(x.sizes(), x.scalar_type(), view.format);
  Tensor stats = make_empty({4, g.sets()}, accum_type(dtype));
  const bool masked = save_mask && keep_residual.defined() && is_two_sided(args.activation);
  Tensor mask = make_empty({masked ? mask_bytes(g, dtype) : 0}, at::kByte);

  if (g.numel() == 0) {
    stats.zero_();
    return {y, stats, mask};
  }
  args.parallel = parallel_for(g);
  args.plan = plan_cpu(g, dtype, 1, cpu_info(args.parallel.threads));
  args.x = dense.const_data_ptr();
  args.residual = keep_residual.defined() ? keep_residual.const_data_ptr() : nullptr;
  args.y = y.mutable_data_ptr();
  args.mask = masked ? mask.mutable_data_ptr<uint8_t>() : nullptr;
  args.stats = stats.mutable_data_ptr();
  cpu::kernels().forward(args);
  return {y, stats, mask};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_backward(const Tensor& dy, const Tensor& x, const OptTensor& weight,
                                                         const OptTensor& bias, const OptTensor& residual,
                                                         const Tensor& stats, const Tensor& mask, int64_t kind,
                                                         int64_t groups, bool frozen, int64_t activation,
                                                         double activation_param, std::array<bool, 3> needs) {
  check_cpu(x, "x");
  const DType dtype = dtype_of(x, "x");
  const View view(x, kind, groups);
  const Geometry& g = view.geometry;
  TORCH_CHECK(!frozen || kind == 0, "fastnorm: frozen is set with kind ", kind, ", expected kind 0 (batch)");
  Tensor keep_weight, keep_bias, keep_residual;
  BackwardArgs args{};
  args.geometry = g;
  args.dtype = dtype;
  args.frozen = frozen;
  args.activation = check_activation(activation);
  args.activation_param = activation_param;
  args.weight = check_params(weight, "weight", x, view.params(), keep_weight);
  args.bias = check_params(bias, "bias", x, view.params(), keep_bias);
  check_same_dtype(weight, bias, "weight and bias");
  check_cpu(stats, "stats");
  TORCH_CHECK(stats.scalar_type() == accum_type(dtype) && stats.sizes() == at::IntArrayRef({4, g.sets()}) &&
                  stats.is_contiguous(),
              "fastnorm: stats has dtype ", stats.scalar_type(), " and shape ", stats.sizes(),
              ", expected a contiguous ", accum_type(dtype), " [4, ", g.sets(), "]");
  const Tensor dense_dy = check_like_x(dy, "dy", x, view);
  if (present(residual)) keep_residual = check_like_x(*residual, "residual", x, view);
  check_cpu(mask, "mask");
  const bool masked = mask.numel() > 0;
  TORCH_CHECK(!masked || (mask.scalar_type() == at::kByte && mask.is_contiguous() && is_two_sided(args.activation) &&
                          mask.numel() == mask_bytes(g, dtype)),
              "fastnorm: mask has dtype ", mask.scalar_type(), " and shape ", mask.sizes(), ", expected uint8 [",
              mask_bytes(g, dtype), "] of a norm_forward with the same arguments");

  const bool activated = args.activation != Activation::kNone;
  Tensor dx = needs[0] ? make_output(x.sizes(), x.scalar_type(), view.format) : nothing(x);
  Tensor dresidual = needs[2] && activated ? make_output(x.sizes(), x.scalar_type(), view.format) : nothing(x);
  const bool params = needs[1] && (present(weight) || present(bias));
  std::vector<double> sums(params ? 2 * g.C : 0, 0.0);
  double* dweight = params ? sums.data() : nullptr;
  double* dbias = params ? dweight + g.C : nullptr;

  if (g.numel() > 0) {
    const Tensor dense_x = view.dense(x);
    args.parallel = parallel_for(g);
    args.plan = plan_cpu(g, dtype, 2, cpu_info(args.parallel.threads));
    args.dy = dense_dy.const_data_ptr();
    args.x = dense_x.const_data_ptr();
    args.residual = keep_residual.defined() && !masked ? keep_residual.const_data_ptr() : nullptr;
    args.mask = masked ? mask.const_data_ptr<uint8_t>() : nullptr;
    args.stats = stats.const_data_ptr();
    args.dx = needs[0] ? dx.mutable_data_ptr() : nullptr;
    args.dresidual = needs[2] && activated ? dresidual.mutable_data_ptr() : nullptr;
    args.dweight = dweight;
    args.dbias = dbias;
    cpu::kernels().backward(args);
  }
  if (!params) return {dx, nothing(x), nothing(x), dresidual};
  return {dx, param_grad(weight, dweight, x), param_grad(bias, dbias, x), dresidual};
}

namespace {

// running = (1 - momentum) running + momentum * factor * mean over samples of row[sample * C + c].
void blend(const Tensor& running, const Tensor& row, double momentum, double factor) {
  const int64_t C = running.numel(), samples = row.numel() / std::max<int64_t>(1, C);
  const bool wide = row.scalar_type() == at::kDouble;
  const double* wide_row = wide ? row.const_data_ptr<double>() : nullptr;
  const float* narrow_row = wide ? nullptr : row.const_data_ptr<float>();
  dispatch_scalar(running.scalar_type(), [&](auto zero) {
    using R = decltype(zero);
    R* out = running.mutable_data_ptr<R>();
    const int64_t stride = running.stride(0);
    for (int64_t c = 0; c < C; ++c) {
      double sum = 0;
      for (int64_t n = 0; n < samples; ++n) sum += wide ? wide_row[n * C + c] : narrow_row[n * C + c];
      const double value = sum / static_cast<double>(samples) * factor;
      R& r = out[c * stride];
      r = static_cast<R>((1 - momentum) * static_cast<double>(r) + momentum * value);
    }
  });
}

void check_running(const OptTensor& t, const char* name, int64_t sets) {
  if (!present(t)) return;
  check_cpu(*t, name);
  dtype_of(*t, name);
  at::assert_no_internal_overlap(*t);
  TORCH_CHECK(t->dim() == 1 && (t->numel() == 0 ? sets == 0 : sets % t->numel() == 0), "fastnorm: ", name,
              " has shape ", t->sizes(), ", expected one that divides the ", sets, " sets of stats");
}

}  // namespace

void update_running_stats_(const OptTensor& running_mean, const OptTensor& running_var,
                           const OptTensor& num_batches_tracked, const Tensor& stats, int64_t count,
                           std::optional<double> momentum) {
  check_cpu(stats, "stats");
  TORCH_CHECK((stats.scalar_type() == at::kFloat || stats.scalar_type() == at::kDouble) && stats.dim() == 2 &&
                  stats.size(0) == 4 && stats.is_contiguous(),
              "fastnorm: stats has dtype ", stats.scalar_type(), " and shape ", stats.sizes(),
              ", expected a contiguous float32 or float64 [4, sets]");
  check_running(running_mean, "running_mean", stats.size(1));
  check_running(running_var, "running_var", stats.size(1));
  if (present(running_mean) && present(running_var)) at::assert_no_overlap(*running_mean, *running_var);
  TORCH_CHECK(count >= 0, "fastnorm: count is ", count, ", expected the number of elements of a set");
  TORCH_CHECK(momentum.has_value() || present(num_batches_tracked),
              "fastnorm: momentum is absent, expected num_batches_tracked to average by");
  double batches = 0;
  if (present(num_batches_tracked)) {
    check_cpu(*num_batches_tracked, "num_batches_tracked");
    TORCH_CHECK(num_batches_tracked->scalar_type() == at::kLong && num_batches_tracked->numel() == 1,
                "fastnorm: num_batches_tracked has dtype ", num_batches_tracked->scalar_type(), " and ",
                num_batches_tracked->numel(), " elements, expected one int64");
    batches = static_cast<double>(++*num_batches_tracked->mutable_data_ptr<int64_t>());
  }
  if (count == 0) return;
  const double step = momentum.value_or(1 / batches);
  const double elements = static_cast<double>(count);
  if (present(running_mean)) blend(*running_mean, stats[0], step, 1);
  if (present(running_var)) blend(*running_var, stats[2], step, elements / (elements - 1));
}

std::tuple<Tensor, Tensor> moments(const Tensor& x) {
  check_cpu(x, "x");
  const DType dtype = dtype_of(x, "x");
  const View view(x, 0, 0);
  const Geometry& g = view.geometry;
  Tensor stats = make_empty({4, g.sets()}, accum_type(dtype));
  if (g.numel() == 0) {
    stats.zero_();
  } else {
    const Tensor dense = view.dense(x);
    ForwardArgs args{};
    args.geometry = g;
    args.dtype = dtype;
    args.parallel = parallel_for(g);
    args.plan = plan_cpu(g, dtype, 1, cpu_info(args.parallel.threads));
    args.x = dense.const_data_ptr();
    args.stats = stats.mutable_data_ptr();
    cpu::kernels().forward(args);
  }
  return {stats[0].clone(), stats[2].clone()};
}

}  // namespace fastnorm::ops
