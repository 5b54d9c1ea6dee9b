#include "ops.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/full.h>

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

void check_stats(const Tensor& stats, const Tensor& x, DType dtype, int64_t sets) {
  check_on(stats, "stats", x.device());
  FASTNORM_SUPPORTED(stats.scalar_type() == accum_type(dtype) && stats.sizes() == at::IntArrayRef({kStatsRows, sets}) &&
                         stats.is_contiguous(),
                     "stats has dtype ", stats.scalar_type(), " and shape ", stats.sizes(), ", expected a contiguous ",
                     accum_type(dtype), " [", kStatsRows, ", ", sets, "]");
}

// Where the statistics of a forward call come from: x, unless one of these is given.
struct Statistics {
  const OptTensor &mean, &var;
  const Tensor* stats = nullptr;  // of an earlier call
};

// running: the statistics that move, or null.
Forward run_forward(const Inputs& inputs, const Statistics& given, const Config& config, bool save_mask,
                    const Running* running) {
  const auto& [mean, var, given_stats] = given;
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
  if (given_stats != nullptr) check_stats(*given_stats, x, dtype, g.sets());
  if (running != nullptr) {
    running->check(x.device());
    args.running = running_args(*running, g.sets(), g.set_size());
    FASTNORM_SUPPORTED(!running->present() || args.running.channels == g.C, "there are running statistics of ",
                       args.running.channels, " channels, expected ", g.C);
  }

  // Small tensors first: malloc can then give the place of y, once that is gone, to the next one (cpu_memory.h).
  Tensor stats = given_stats != nullptr ? *given_stats : allocate.stats(g, dtype);
  const bool masked = save_mask && present(residual) && is_two_sided(args.activation);
  const Tensor mask = masked ? allocate.empty({mask_bytes(g, dtype)}, at::kByte) : Tensor();
  Tensor y = allocate.like_x(true, view);
  args.stats_given = given_stats != nullptr;
  args.stats = stats.data_ptr();
  args.running.dtype = dtype_of(stats, "stats");
  args.running.stats = args.stats;
  if (g.numel() == 0) {
    if (!args.stats_given) stats.zero_();
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

// A backward call, checked; it computes the outputs that are asked for.
struct BackwardCall {
  const Tensor& dy;
  const Inputs& inputs;
  const Tensor& mask;
  const Allocator allocate;
  const DType dtype;
  const View view;
  BackwardArgs args{};

  BackwardCall(const Tensor& dy_, const Inputs& inputs_, const Tensor& stats, const Tensor& mask_, const Config& config)
      : dy(dy_),
        inputs(inputs_),
        mask(mask_),
        allocate(inputs.x),
        dtype(dtype_of(inputs.x, "x")),
        view(inputs.x, config.groups, config.normalized_dims) {
    const auto& [x, weight, bias, residual] = inputs;
    args.geometry = view.geometry;
    args.dtype = dtype;
    args.activation = check_activation(config.activation);
    args.activation_param = config.activation_param;
    check_params(weight, "weight", x, view);
    check_params(bias, "bias", x, view);
    check_same_dtype(weight, bias, "weight and bias");
    check_stats(stats, x, dtype, view.geometry.sets());
    args.stats = stats.const_data_ptr();
    check_like_x(dy, "dy", x);
    if (present(residual)) check_like_x(*residual, "residual", x);
    if (mask.defined()) check_on(mask, "mask", x.device());
    const int64_t bytes = mask_bytes(view.geometry, dtype);
    FASTNORM_SUPPORTED(!is_masked() || (mask.scalar_type() == at::kByte && mask.is_contiguous() &&
                                        is_two_sided(args.activation) && mask.numel() == bytes),
                       "mask has dtype ", mask.scalar_type(), " and shape ", mask.sizes(), ", expected uint8 [", bytes,
                       "] of a norm_forward with the same arguments");
  }

  Tensor make_dx(bool needed) {
    Tensor dx = allocate.like_x(needed, view);
    if (needed) args.dx = dx.mutable_data_ptr();
    return dx;
  }
  // Without an activation it is dy, which the caller has.
  Tensor make_dresidual(bool needed) {
    needed = needed && args.activation != Activation::kNone;
    Tensor dresidual = allocate.like_x(needed, view);
    if (needed) args.dresidual = dresidual.mutable_data_ptr();
    return dresidual;
  }

  bool is_masked() const { return mask.defined() && mask.numel() > 0; }
  bool is_empty() const { return view.geometry.numel() == 0; }
  void run() {
    const auto& [x, weight, bias, residual] = inputs;
    Tensor keep_weight, keep_bias;
    args.weight = params_of(weight, keep_weight);
    args.bias = params_of(bias, keep_bias);
    const bool masked = is_masked();
    const bool residual_read = present(residual) && !masked && args.activation != Activation::kNone;
    const Tensor dense_x = view.dense(x), dense_dy = view.dense(dy),
                 dense_residual = residual_read ? view.dense(*residual) : Tensor();
    args.dy = dense_dy.const_data_ptr();
    args.x = dense_x.const_data_ptr();
    args.residual = residual_read ? dense_residual.const_data_ptr() : nullptr;
    args.mask = masked ? mask.const_data_ptr<uint8_t>() : nullptr;
    allocate.backend().backward(args, x.device());
  }
};

constexpr Config batch_config(int64_t activation, double activation_param) {
  return {0, 0, 0.0, activation, activation_param};
}

}  // namespace

Forward norm_forward(const Inputs& inputs, const OptTensor& mean, const OptTensor& var, const Config& config,
                     bool save_mask) {
  return run_forward(inputs, {mean, var}, config, save_mask, nullptr);
}

Forward batch_norm_forward_(const Inputs& inputs, const Running& running, const Config& config, bool save_mask) {
  Forward result = run_forward(inputs, {{}, {}}, config, save_mask, &running);
  // running_mean and running_var keep their versions, as torch's batch norm leaves them.
  count_version(running.num_batches_tracked);
  return result;
}

Backward norm_backward(const Tensor& dy, const Inputs& inputs, const Tensor& stats, const Tensor& mask,
                       const Config& config, bool frozen, std::array<bool, 3> output_mask) {
  BackwardCall call(dy, inputs, stats, mask, config);
  FASTNORM_SUPPORTED(!frozen || config.is_batch(), "frozen is set with groups = ", config.groups,
                     " and normalized_dims = ", config.normalized_dims, ", expected both 0 (batch norm)");
  call.args.frozen = frozen;
  Tensor dweight = call.allocate.like_param(output_mask[1], inputs.weight, call.args.dweight);
  Tensor dbias = call.allocate.like_param(output_mask[1], inputs.bias, call.args.dbias);
  Tensor dx = call.make_dx(output_mask[0]);
  Tensor dresidual = call.make_dresidual(output_mask[2]);
  if (call.is_empty()) {
    if (dweight.defined()) dweight.zero_();
    if (dbias.defined()) dbias.zero_();
  } else {
    call.run();
  }
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
  for (const OptTensor* t : {&running_mean, &running_var, &num_batches_tracked}) count_version(*t);
}

Tensor channel_stats(const Tensor& x, double eps) {
  const Allocator allocate(x);
  const DType dtype = dtype_of(x, "x");
  const View view(x, 0, 0);
  const Geometry& g = view.geometry;
  Tensor stats = allocate.stats(g, dtype);
  if (g.numel() == 0) return stats.zero_();
  const Tensor dense = view.dense(x);
  ForwardArgs args{};
  args.geometry = g;
  args.dtype = dtype;
  args.x = dense.const_data_ptr();
  args.stats = stats.mutable_data_ptr();
  args.eps = eps;
  allocate.backend().forward(args, x.device());
  return stats;
}

std::tuple<Tensor, Tensor> moments(const Tensor& x) {
  const Tensor stats = channel_stats(x, 0);
  return {stats[kMean].clone(), stats[kVar].clone()};
}

// ---- batch norm in steps ----

Tensor batch_norm_partial(const Tensor& x) {
  const Tensor stats = channel_stats(x, 0);
  const double count = x.size(1) == 0 ? 0 : static_cast<double>(x.numel() / x.size(1));
  return at::cat({stats[kMean], stats[kMeanLow], stats[kVar], at::full({1}, count, stats.options())});
}

std::tuple<Tensor, Tensor> batch_norm_fold_(const Tensor& partials, const Running& running, double eps) {
  const Backend& backend = backend_of(partials, "partials");
  check_on(partials, "partials", partials.device());
  FASTNORM_SUPPORTED((partials.scalar_type() == at::kFloat || partials.scalar_type() == at::kDouble) &&
                         partials.dim() == 2 && partials.size(1) % 3 == 1 && partials.is_contiguous(),
                     "partials has dtype ", partials.scalar_type(), " and shape ", partials.sizes(),
                     ", expected a contiguous float32 or float64 [ranks, 3 channels + 1]");
  FoldArgs args{};
  args.dtype = dtype_of(partials, "partials");
  args.ranks = partials.size(0);
  args.channels = partials.size(1) / 3;
  args.eps = eps;
  running.check(partials.device());
  RunningArgs moved = running_args(running, args.channels, 0);
  FASTNORM_SUPPORTED(!running.present() || moved.channels == args.channels, "there are running statistics of ",
                     moved.channels, " channels, expected ", args.channels);
  const auto make = [&](at::IntArrayRef sizes, at::ScalarType type) {
    return backend.make_empty(sizes, type, at::MemoryFormat::Contiguous, partials.device());
  };
  Tensor stats = make({kStatsRows, args.channels}, partials.scalar_type()), count = make({1}, at::kDouble);
  args.partials = partials.const_data_ptr();
  args.stats = stats.mutable_data_ptr();
  args.count = count.mutable_data_ptr<double>();
  if (args.channels == 0 || args.ranks == 0) {
    stats.zero_();
    count.zero_();
  } else {
    backend.fold_partials(args, partials.device());
  }
  if (running.moves()) {
    moved.dtype = args.dtype;
    moved.stats = args.stats;
    moved.given_count = args.count;
    backend.update_running_stats(moved, partials.device());
    count_version(running.num_batches_tracked);
  }
  return {stats, count};
}

std::tuple<Tensor, Tensor> batch_norm_apply(const Inputs& inputs, const Tensor& stats, int64_t activation,
                                            double activation_param, bool save_mask) {
  auto [y, same, mask] =
      run_forward(inputs, {{}, {}, &stats}, batch_config(activation, activation_param), save_mask, nullptr);
  return {y, mask};
}

Tensor batch_norm_backward_sums(const Tensor& dy, const Inputs& inputs, const Tensor& stats, const Tensor& mask,
                                int64_t activation, double activation_param) {
  BackwardCall call(dy, inputs, stats, mask, batch_config(activation, activation_param));
  const int64_t channels = call.view.geometry.C;
  Tensor sums = call.allocate.empty({2, channels}, accum_type(call.dtype));
  if (call.is_empty()) return sums.zero_();
  const DType dtype = dtype_of(sums, "sums");
  call.args.dbias = {sums.mutable_data_ptr(), dtype};
  call.args.dweight = {static_cast<char*>(sums.mutable_data_ptr()) + channels * size_of(dtype), dtype};
  call.args.frozen = true;  // no dx
  call.run();
  return sums;
}

std::tuple<Tensor, Tensor> batch_norm_backward_apply(const Tensor& dy, const Inputs& inputs, const Tensor& stats,
                                                     const Tensor& mask, const Tensor& sums, const Tensor& count,
                                                     int64_t activation, double activation_param,
                                                     std::array<bool, 2> output_mask) {
  BackwardCall call(dy, inputs, stats, mask, batch_config(activation, activation_param));
  const at::ScalarType type = accum_type(call.dtype);
  const int64_t channels = call.view.geometry.C;
  check_on(sums, "sums", dy.device());
  FASTNORM_SUPPORTED(
      sums.scalar_type() == type && sums.sizes() == at::IntArrayRef({2, channels}) && sums.is_contiguous(),
      "sums has dtype ", sums.scalar_type(), " and shape ", sums.sizes(), ", expected a contiguous ", type, " [2, ",
      channels, "]");
  check_on(count, "count", dy.device());
  FASTNORM_SUPPORTED(count.scalar_type() == at::kDouble && count.numel() == 1, "count has dtype ", count.scalar_type(),
                     " and ", count.numel(), " elements, expected one float64");
  Tensor dx = call.make_dx(output_mask[0]);
  Tensor dresidual = call.make_dresidual(output_mask[1]);
  if (call.is_empty() || (call.args.dx == nullptr && call.args.dresidual == nullptr)) return {dx, dresidual};
  call.args.sums = sums.const_data_ptr();
  call.args.count = count.const_data_ptr<double>();
  call.run();
  return {dx, dresidual};
}

}  // namespace fastnorm::ops
