// fastnorm::norm: all that an eager call does, in one op: torch.nn's rules, forward, running statistics, and the node
// that autograd goes back through. torch.compile sees the functional ops of ops.h instead, through Python's
// autograd.Function.
//
// Why in C++: a layer on a small tensor costs its host time. A BatchNorm2d module on 2x8x4x4, one thread, forward and
// forward + backward: torch.nn 11.6 and 29.6 us; three ops under a Python Function 13.5 and 37.4; this op 7.7 and 25.8.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "ops.h"
#include "tensor_args.h"

namespace fastnorm::ops {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

Tensor value_or_undefined(const OptTensor& t) { return t.value_or(Tensor()); }
OptTensor optional(const Tensor& t) { return t.defined() ? OptTensor(t) : OptTensor(); }

// t in the layout it had when the mask was made: whoever packed the saved tensors may have changed it.
Tensor in_format(const Tensor& t, at::MemoryFormat format) {
  return t.suggest_memory_format() == format ? t : t.clone(format);
}

// A functional op, called through the dispatcher: modes and other devices see it.
template <class F>
c10::TypedOperatorHandle<F> find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<F>();
}

// norm_backward for whatever differentiates through it again; implemented in fastnorm/autograd.py.
using DifferentiableBackward = std::tuple<Tensor, Tensor, Tensor, Tensor>(const Tensor&, const Tensor&,
                                                                          const OptTensor&, const OptTensor&,
                                                                          const OptTensor&, const Tensor&,
                                                                          const Tensor&, int64_t, int64_t, double, bool,
                                                                          int64_t, double, std::array<bool, 3>);

struct Norm {
  int64_t kind, groups;
  double eps;
  int64_t activation;
  double activation_param;
};

struct Running {
  const OptTensor &mean, &var, &num_batches_tracked;
  bool use_input_stats;
  std::optional<double> momentum;

  bool present() const { return ops::present(mean) || ops::present(var); }
  bool moves() const { return use_input_stats && (present() || ops::present(num_batches_tracked)); }
  const OptTensor& frozen(const OptTensor& t) const {
    static const OptTensor kNone;
    return use_input_stats ? kNone : t;
  }
};

// What torch.nn refuses and the functional ops cannot, as no one of them sees all the arguments.
void check(const Tensor& x, const OptTensor& weight, const OptTensor& bias, const Running& running, const Norm& norm) {
  if (norm.kind == 0) {
    TORCH_CHECK(running.use_input_stats ? norm.eps > 0 : norm.eps >= 0, "fastnorm: eps is ", norm.eps,
                ", expected a positive one");
    TORCH_CHECK(x.dim() >= 2 && x.numel() > (running.use_input_stats ? x.size(1) : 0), "fastnorm: x has shape ",
                x.sizes(), ", expected several values per channel");
  }
  TORCH_CHECK(running.use_input_stats || running.present(), "fastnorm: there are no running statistics to use");
  const std::pair<const char*, const OptTensor&> buffers[] = {{"running_mean", running.mean},
                                                              {"running_var", running.var},
                                                              {"num_batches_tracked", running.num_batches_tracked}};
  for (const auto& [name, t] : buffers) {
    TORCH_CHECK(!present(t) || t->device() == x.device(), "fastnorm: ", name, " is on ", t->device(), ", expected ",
                x.device(), " like x");
  }
  if (!running.present()) return;
  TORCH_CHECK(norm.kind == 0 || (norm.kind == 1 && norm.groups == x.size(1)),
              "fastnorm: running statistics are given with groups = ", norm.groups, ", expected one per channel");
  const Tensor& like = present(weight) ? *weight : present(bias) ? *bias : value_or_undefined(running.mean);
  const std::pair<const char*, const OptTensor&> given[] = {{"running_mean", running.mean},
                                                            {"running_var", running.var}};
  for (const auto& [name, t] : given) {
    TORCH_CHECK(present(t), "fastnorm: ", name, " is absent, expected both running statistics or neither");
    TORCH_CHECK(t->dim() == 1 && t->size(0) == x.size(1), "fastnorm: ", name, " has shape ", t->sizes(), ", expected [",
                x.size(1), "]");
    TORCH_CHECK(
        t->scalar_type() == like.scalar_type() &&
            (t->scalar_type() == x.scalar_type() || (t->scalar_type() == at::kFloat && x.scalar_type() != at::kDouble)),
        "fastnorm: ", name, " has dtype ", t->scalar_type(), ", which does not go with x of ", x.scalar_type());
    TORCH_CHECK(!t->requires_grad(), "fastnorm: ", name, " requires grad, expected a constant");
  }
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const OptTensor& weight, const OptTensor& bias,
                                           const OptTensor& residual, const Running& running, const Norm& norm,
                                           bool save_mask) {
  static const auto norm_forward_op = find_op<decltype(norm_forward)>("fastnorm::norm_forward");
  static const auto update_op = find_op<decltype(update_running_stats_)>("fastnorm::update_running_stats_");
  check(x, weight, bias, running, norm);
  auto result =
      norm_forward_op.call(x, weight, bias, residual, running.frozen(running.mean), running.frozen(running.var),
                           norm.kind, norm.groups, norm.eps, norm.activation, norm.activation_param, save_mask);
  if (running.moves()) {
    const Tensor& stats = std::get<1>(result);
    update_op.call(running.mean, running.var, running.num_batches_tracked, stats, x.numel() / stats.size(1),
                   running.momentum);
  }
  return result;
}

class NormBackward : public torch::autograd::Function<NormBackward> {
 public:
  // Statistics move before anything is saved: the recomputation of a checkpoint stops at the last tensor saved, and
  // has to have moved them by then as torch.nn's norms have.
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const OptTensor& weight, const OptTensor& bias,
                        const OptTensor& residual, const Running& running, const Norm& norm) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [y, stats, mask] = ops::forward(x, weight, bias, residual, running, norm, true);
    // Without activation, backward wants the bias's shape and of the residual nothing: both may change until then.
    const bool linear = norm.activation == 0;
    const bool residual_saved = present(residual) && !linear && mask.numel() == 0;
    ctx->save_for_backward({x, value_or_undefined(weight), linear ? Tensor() : value_or_undefined(bias),
                            residual_saved ? *residual : Tensor(), stats, mask});
    if (linear && present(bias)) ctx->saved_data["bias"] = *bias;
    ctx->saved_data["norm"] = c10::ivalue::Tuple::create(
        {norm.kind, norm.groups, norm.eps, norm.activation, norm.activation_param, !running.use_input_stats,
         present(residual), static_cast<int64_t>(x.suggest_memory_format())});
    ctx->set_materialize_grads(false);
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list gradients) {
    const Tensor& dy = gradients[0];
    variable_list result(6);
    if (!dy.defined()) return result;
    const variable_list saved = ctx->get_saved_variables();
    const std::vector<c10::IValue> config = ctx->saved_data["norm"].toTupleRef().elements().vec();
    const Norm norm{config[0].toInt(), config[1].toInt(), config[2].toDouble(), config[3].toInt(),
                    config[4].toDouble()};
    const bool frozen = config[5].toBool(), has_residual = config[6].toBool();
    const Tensor& mask = saved[5];
    const Tensor x =
        mask.numel() == 0 ? saved[0] : in_format(saved[0], static_cast<at::MemoryFormat>(config[7].toInt()));
    const OptTensor weight = optional(saved[1]), residual = optional(saved[3]);
    OptTensor bias = optional(saved[2]);
    if (const auto held = ctx->saved_data.find("bias"); held != ctx->saved_data.end()) bias = held->second.toTensor();

    size_t edge = 0;  // absent tensors have none
    const auto needed = [&](bool is_present) { return is_present && ctx->needs_input_grad(edge++); };
    const bool needs_x = needed(true), needs_weight = needed(present(weight)), needs_bias = needed(present(bias)),
               needs_residual = needed(has_residual);
    const std::array<bool, 3> needs{needs_x, needs_weight || needs_bias, needs_residual && norm.activation != 0};

    const auto [dx, dweight, dbias, dresidual] = [&] {
      if (at::GradMode::is_enabled() || dy._fw_grad(0).defined() ||
          c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode)) {
        static const auto op = find_op<DifferentiableBackward>("fastnorm::norm_backward_differentiable");
        return op.call(dy, x, weight, bias, residual, saved[4], mask, norm.kind, norm.groups, norm.eps, frozen,
                       norm.activation, norm.activation_param, needs);
      }
      static const auto op = find_op<decltype(norm_backward)>("fastnorm::norm_backward");
      at::AutoDispatchBelowADInplaceOrView guard;
      return op.call(dy, x, weight, bias, residual, saved[4], mask, norm.kind, norm.groups, frozen, norm.activation,
                     norm.activation_param, needs);
    }();
    if (needs_x) result[0] = dx;
    if (needs_weight) result[1] = dweight;
    if (needs_bias) result[2] = dbias;
    if (needs_residual) result[3] = norm.activation == 0 ? dy : dresidual;
    return result;
  }
};

Tensor norm(const Tensor& x, const OptTensor& weight, const OptTensor& bias, const OptTensor& residual,
            const OptTensor& running_mean, const OptTensor& running_var, const OptTensor& num_batches_tracked,
            int64_t kind, int64_t groups, bool use_input_stats, std::optional<double> momentum, double eps,
            int64_t activation, double activation_param) {
  const Running running{running_mean, running_var, num_batches_tracked, use_input_stats, momentum};
  return std::get<0>(
      forward(x, weight, bias, residual, running, {kind, groups, eps, activation, activation_param}, false));
}

Tensor norm_autograd(const Tensor& x, const OptTensor& weight, const OptTensor& bias, const OptTensor& residual,
                     const OptTensor& running_mean, const OptTensor& running_var, const OptTensor& num_batches_tracked,
                     int64_t kind, int64_t groups, bool use_input_stats, std::optional<double> momentum, double eps,
                     int64_t activation, double activation_param) {
  const auto wants_grad = [](const OptTensor& t) { return present(t) && t->requires_grad(); };
  if (at::GradMode::is_enabled() &&
      (x.requires_grad() || wants_grad(weight) || wants_grad(bias) || wants_grad(residual))) {
    const Running running{running_mean, running_var, num_batches_tracked, use_input_stats, momentum};
    return NormBackward::apply(x, weight, bias, residual, running,
                               Norm{kind, groups, eps, activation, activation_param});
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return norm(x, weight, bias, residual, running_mean, running_var, num_batches_tracked, kind, groups, use_input_stats,
              momentum, eps, activation, activation_param);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastnorm, m) {
  m.def(
      "norm(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, int kind, int groups, bool use_input_stats, "
      "float? momentum, float eps, int activation, float activation_param) -> Tensor");
  m.def(
      "norm_backward_differentiable(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor stats, "
      "Tensor mask, int kind, int groups, float eps, bool frozen, int activation, float activation_param, "
      "bool[3] needs) -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual)");
}

TORCH_LIBRARY_IMPL(fastnorm, CompositeExplicitAutograd, m) { m.impl("norm", &norm); }
TORCH_LIBRARY_IMPL(fastnorm, Autograd, m) { m.impl("norm", &norm_autograd); }

}  // namespace fastnorm::ops
