// aten's own norms by our kernels: native_batch_norm, native_group_norm, native_layer_norm, their backwards and what
// else F.batch_norm selects. Autograd, autocast, functorch and torch.compile stay torch's: they are above, and these
// outputs have the dtypes, shapes and strides of aten's kernels.
//
// Where: the dispatch key BackendSelect, which every call passes below autograd and above the devices. A kernel there
// overrides none, so that torch's remain, for all that is not served, by going on to the next key. (A kernel for the
// CPU key replaces torch's, which warns, and has nothing to go on to.)
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/add.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include "aten_switches.h"
#include "ops.h"
#include "running.h"
#include "tensor_args.h"

namespace fastnorm::ops {

namespace {

using c10::DispatchKeySet;
using Outputs = std::tuple<Tensor, Tensor, Tensor>;
using CudnnOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using OutputMask = std::array<bool, 3>;

constexpr DispatchKeySet kBelow(DispatchKeySet::FULL_AFTER, c10::DispatchKey::BackendSelect);

// ---- statistics: ours are [kStatsRows, sets], aten's a tensor each ----

// The dtype that aten saves statistics in: on the CPU x's own, unless parameters are wider.
at::ScalarType saved_type(const Tensor& x, std::initializer_list<const OptTensor*> params) {
  const at::ScalarType type = x.scalar_type();
  if (type == at::kDouble || type == at::kFloat) return type;
  if (!x.is_cpu()) return at::kFloat;
  for (const OptTensor* t : params) {
    if (present(*t) && (*t)->scalar_type() == at::kFloat) return at::kFloat;
  }
  return type;
}

template <class F>
void dispatch_type(at::ScalarType type, F&& f) {
  switch (type) {
    case at::kDouble: return f(double{});
    case at::kBFloat16: return f(at::BFloat16{});
    case at::kHalf: return f(at::Half{});
    default: return f(float{});
  }
}

// to[i] = from[i], on the CPU and without the dispatcher: calls on small tensors are made of little else.
template <class To, class From>
void convert(To* to, const From* from, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<To>(from[i]);
}

Tensor nothing(const Tensor& x, at::ScalarType type) {
  if (!x.is_cpu()) return at::empty({0}, x.options().dtype(type));
  return at::detail::empty_cpu({0}, type, false, at::MemoryFormat::Contiguous);
}

Tensor saved_row(const Tensor& stats, StatsRow row, at::IntArrayRef sizes, at::ScalarType type) {
  if (!stats.is_cpu()) return stats.select(0, row).view(sizes);
  const int64_t sets = stats.size(1);
  Tensor saved = at::detail::empty_cpu(sizes, type, false, at::MemoryFormat::Contiguous);
  dispatch_type(stats.scalar_type(), [&](auto from) {
    dispatch_type(type, [&](auto to) {
      convert(saved.mutable_data_ptr<decltype(to)>(), stats.const_data_ptr<decltype(from)>() + row * sets, sets);
    });
  });
  return saved;
}

// Ours from aten's. What rounding cut off the mean is not known; the variance is read to find rows next to the smallest
// numbers, and eps does no harm there.
Tensor stats_of(const Tensor& mean, const Tensor& rstd, int64_t sets, DType dtype) {
  for (const auto& [t, name] : {std::pair(&mean, "mean"), std::pair(&rstd, "rstd")}) {
    FASTNORM_SUPPORTED(t->defined() && t->numel() == sets, name, " is absent or has another size than ", sets);
    dtype_of(*t, name);
  }
  const at::ScalarType type = accum_type(dtype);
  if (!mean.is_cpu() || !rstd.is_cpu()) {
    const Tensor r = rstd.reshape({1, sets}).to(type);
    return at::cat({mean.reshape({1, sets}).to(type), r, r.pow(-2), at::zeros_like(r)});
  }
  Tensor stats = at::detail::empty_cpu({kStatsRows, sets}, type, false, at::MemoryFormat::Contiguous);
  const Tensor dense_mean = mean.contiguous(), dense_rstd = rstd.contiguous();
  dispatch_type(type, [&](auto zero) {
    using A = decltype(zero);
    A* const s = stats.mutable_data_ptr<A>();
    for (const auto& [t, row] : {std::pair(&dense_mean, kMean), std::pair(&dense_rstd, kRstd)}) {
      dispatch_type(t->scalar_type(), [&, t = t, row = row](auto from) {
        convert(s + row * sets, t->template const_data_ptr<decltype(from)>(), sets);
      });
    }
    const A* const r = s + kRstd * sets;
    for (int64_t i = 0; i < sets; ++i) s[kVar * sets + i] = 1 / (r[i] * r[i]);
    std::fill_n(s + kMeanLow * sets, sets, A(0));
  });
  return stats;
}

// 1 / sqrt(var + eps) in float64, as evaluation takes it.
Tensor rstd_of(const Tensor& var, double eps) {
  if (!var.is_cpu()) return at::add(var.to(at::kDouble), eps).rsqrt();
  dtype_of(var, "running_var");
  const Tensor dense = var.contiguous();
  Tensor rstd = at::detail::empty_cpu(var.sizes(), at::kDouble, false, at::MemoryFormat::Contiguous);
  dispatch_type(dense.scalar_type(), [&](auto zero) {
    const auto* const v = dense.const_data_ptr<decltype(zero)>();
    auto* const r = rstd.mutable_data_ptr<double>();
    for (int64_t i = 0; i < dense.numel(); ++i) r[i] = 1 / std::sqrt(static_cast<double>(v[i]) + eps);
  });
  return rstd;
}

// ---- forward ----

const OptTensor kAbsent;

Config batch_config(double eps) { return {0, 0, eps, 0, 0}; }

// torch's kernels take parameters of one dtype.
void check_one_dtype(std::initializer_list<const OptTensor*> params) {
  const Tensor* first = nullptr;
  for (const OptTensor* t : params) {
    if (!present(*t)) continue;
    if (first == nullptr) first = &**t;
    FASTNORM_SUPPORTED((*t)->scalar_type() == first->scalar_type(), "parameters have dtypes ", first->scalar_type(),
                       " and ", (*t)->scalar_type());
  }
}

// torch's CUDA kernels keep the strides of any x that is dense; ours know two layouts.
void check_layout(const Tensor& x) {
  FASTNORM_SUPPORTED(x.is_cpu() || x.is_contiguous(x.suggest_memory_format()),
                     "x is neither contiguous nor channels_last");
}

Outputs batch_norm(const Tensor& x, const OptTensor& weight, const OptTensor& bias, const OptTensor& running_mean,
                   const OptTensor& running_var, bool training, double momentum, double eps) {
  FASTNORM_SUPPORTED(x.dim() >= 2 && x.numel() > (training ? x.size(1) : 0), "x has shape ", x.sizes(),
                     ", expected several values per channel");
  FASTNORM_SUPPORTED(training ? eps > 0 : eps >= 0, "eps is ", eps, ", expected a positive one");
  FASTNORM_SUPPORTED(present(running_mean) == present(running_var), "one of running_mean and running_var is given");
  FASTNORM_SUPPORTED(training || present(running_mean), "there are no running statistics to use");
  check_one_dtype({&weight, &bias, &running_mean, &running_var});
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

// The last output is what cuDNN's backward wants. An empty one tells that ours has to follow, whatever the switch then
// is.
CudnnOutputs cudnn_batch_norm(const Tensor& x, const Tensor& weight, const OptTensor& bias,
                              const OptTensor& running_mean, const OptTensor& running_var, bool training,
                              double momentum, double eps) {
  auto [y, mean, rstd] = batch_norm(x, weight, bias, running_mean, running_var, training, momentum, eps);
  return {y, mean, rstd, nothing(x, at::kByte)};
}

Outputs group_norm(const Tensor& x, const OptTensor& weight, const OptTensor& bias, c10::SymInt N, c10::SymInt C,
                   c10::SymInt positions, int64_t groups, double eps) {
  FASTNORM_SUPPORTED(x.dim() >= 2 && x.numel() > 0 && groups > 0 && x.size(0) == N && x.size(1) == C &&
                         x.numel() == N * C * positions && C % groups == 0,
                     "x has shape ", x.sizes(), ", expected (N, C, *) with ", groups, " groups");
  FASTNORM_SUPPORTED(x.is_contiguous(x.is_cpu() ? x.suggest_memory_format() : at::MemoryFormat::Contiguous),
                     "x is not contiguous");
  check_one_dtype({&weight, &bias});
  const auto [y, stats, mask] = norm_forward({x, weight, bias, kAbsent}, {}, {}, {groups, 0, eps, 0, 0}, false);
  const at::ScalarType type = saved_type(x, {&weight, &bias});
  const std::array<int64_t, 2> sizes{x.size(0), groups};
  return {y, saved_row(stats, kMean, sizes, type), saved_row(stats, kRstd, sizes, type)};
}

// The number of trailing dims that normalized_shape names.
int64_t normalized_dims(const Tensor& x, c10::SymIntArrayRef shape) {
  const auto dims = static_cast<int64_t>(shape.size());
  FASTNORM_SUPPORTED(x.numel() > 0, "x has no elements");
  FASTNORM_SUPPORTED(dims > 0 && dims <= x.dim() && x.sym_sizes().slice(x.dim() - dims) == shape, "x has shape ",
                     x.sizes(), ", expected one that ends in ", shape);
  return dims;
}

Outputs layer_norm(const Tensor& x, c10::SymIntArrayRef shape, const OptTensor& weight, const OptTensor& bias,
                   double eps) {
  const int64_t dims = normalized_dims(x, shape);
  check_one_dtype({&weight, &bias});
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
  FASTNORM_SUPPORTED(x.dim() >= 2 && x.numel() > (training ? x.size(1) : 0), "x has shape ", x.sizes(),
                     ", expected several values per channel");
  FASTNORM_SUPPORTED(
      training ? present(save_mean) && present(save_rstd) : present(running_mean) && present(running_var),
      "there are no statistics");
  check_layout(x);
  const Tensor &mean = training ? *save_mean : *running_mean, rstd = training ? *save_rstd : rstd_of(*running_var, eps);
  const Tensor stats = stats_of(mean, rstd, x.size(1), dtype_of(x, "x"));
  return backward(dy, x, weight, {}, stats, batch_config(eps), !training, wanted);
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
  FASTNORM_SUPPORTED(x.dim() >= 2 && x.numel() > 0 && groups > 0 && x.size(0) == N && x.size(1) == C &&
                         x.numel() == N * C * positions && C % groups == 0,
                     "x has shape ", x.sizes(), ", expected (N, C, *) with ", groups, " groups");
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

// ---- the dispatcher ----

// Text as a template's argument.
template <size_t n>
struct Text {
  char text[n];
  constexpr Text(const char (&s)[n]) { std::copy_n(s, n, text); }
};

// Asks: whether the switch decides, or the kernel alone.
enum class Asks { kSwitch, kKernel };

template <AtenNorm norm, Text name, auto kernel, Text overload = "", Asks asks = Asks::kSwitch>
struct AtenOp;
template <AtenNorm norm, Text name, class R, class... A, R (*kernel)(A...), Text overload, Asks asks>
struct AtenOp<norm, name, kernel, overload, asks> {
  static R call(DispatchKeySet keys, A... args) {
    const DispatchKeySet below = keys & kBelow;
    const c10::DispatchKey key = below.highestPriorityTypeId();
    if (key == c10::DispatchKey::CPU || key == c10::DispatchKey::CUDA) {
      AtenSwitch& calls = aten_switch(norm, key == c10::DispatchKey::CPU ? AtenDevice::kCpu : AtenDevice::kCuda);
      const bool is_on = calls.is_on();
      if (is_on || asks == Asks::kKernel) {
        try {
          R result = kernel(args...);
          calls.count_served();
          return result;
        } catch (const c10::NotImplementedError& refusal) {  // before anything is written
          if (is_on) calls.count_left(refusal.what_without_backtrace());
        }
      }
    }
    static const auto torchs = c10::Dispatcher::singleton()
                                   .findSchemaOrThrow((std::string("aten::") + name.text).c_str(), overload.text)
                                   .template typed<R(A...)>();
    return torchs.redispatch(below, std::forward<A>(args)...);
  }

  explicit AtenOp(torch::Library& library) {
    const std::string suffix = *overload.text ? std::string(".") + overload.text : "";
    library.impl((name.text + suffix).c_str(), TORCH_FN(call));
  }
};

}  // namespace

void register_aten_kernels() {
  static torch::Library library = [] {
    torch::Library l(torch::Library::IMPL, "aten", c10::DispatchKey::BackendSelect, __FILE__, __LINE__);
    using enum AtenNorm;
    AtenOp<kBatch, "native_batch_norm", &batch_norm>{l};
    AtenOp<kBatch, "_native_batch_norm_legit", &batch_norm_legit>{l};
    AtenOp<kBatch, "_native_batch_norm_legit", &batch_norm_no_stats, "no_stats">{l};
    AtenOp<kBatch, "_native_batch_norm_legit_no_training", &batch_norm_no_training>{l};
    AtenOp<kBatch, "native_batch_norm_backward", &batch_norm_backward>{l};
    AtenOp<kBatch, "cudnn_batch_norm", &cudnn_batch_norm>{l};
    AtenOp<kBatch, "cudnn_batch_norm_backward", &cudnn_batch_norm_backward, "", Asks::kKernel>{l};
    AtenOp<kGroup, "native_group_norm", &group_norm>{l};
    AtenOp<kGroup, "native_group_norm_backward", &group_norm_backward>{l};
    AtenOp<kLayer, "native_layer_norm", &layer_norm>{l};
    AtenOp<kLayer, "native_layer_norm_backward", &layer_norm_backward>{l};
    return l;
  }();
}

}  // namespace fastnorm::ops
