// fastnorm::norm: all that an eager call does, in one op: torch.nn's rules, forward, running statistics, and the node
// that autograd goes back through. torch.compile sees the functional ops of ops.h instead, through Python's
// autograd.Function.
//
// Why in C++: a layer on a small tensor costs its host time, of which benchmarks/host_time.py tells.
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/library.h>

#include "find_op.h"
#include "norm_backward.h"
#include "ops.h"
#include "running.h"
#include "tensor_args.h"

namespace fastnorm::ops {

namespace {

// The arguments of the op.
struct Arguments {
  const Inputs& inputs;
  const Config& config;
  const Running& running;
  bool use_input_stats;
};

// A call, and how far its running statistics have got.
struct Call : Arguments {
  mutable bool has_moved_running = false;
  mutable Tensor moved_last;  // the stats that they move by when all is saved

  Call(const Inputs& inputs, const Config& config, const Running& running, bool use_input_stats)
      : Arguments{inputs, config, running, use_input_stats} {}

  void move_running(const Tensor& stats) const {
    static const auto op = find_op<UpdateSignature>("fastnorm::update_running_stats_");
    op.call(running.mean, running.var, running.num_batches_tracked, stats, inputs.x.sym_numel() / stats.sym_size(1),
            running.momentum);
    has_moved_running = true;
  }

  bool frozen() const { return !use_input_stats; }
  bool moves_running() const { return use_input_stats && running.moves(); }
  const OptTensor& statistics(const OptTensor& t) const {
    static const OptTensor kNone;
    return frozen() ? t : kNone;
  }
};

// Whether x has several values per channel (statistics are x's) or any at all.
bool has_values(const Tensor& x, bool use_input_stats) {
  if (!x.unsafeGetTensorImpl()->has_symbolic_sizes_strides()) return x.numel() > (use_input_stats ? x.size(1) : 0);
  return x.sym_numel() > (use_input_stats ? x.sym_size(1) : c10::SymInt(0));
}

// What torch.nn refuses and the functional ops cannot, as none of them sees all the arguments. Sizes may be symbolic.
// Whatever else the arguments may be refused for, norm_forward and update_running_stats_ check before they write.
void check(const Call& call) {
  const auto& [inputs, config, running, use_input_stats] = static_cast<const Arguments&>(call);
  const Tensor& x = inputs.x;
  if (c10::impl::dispatch_mode_enabled() && !x.key_set().has(c10::DispatchKey::Python)) {
    FASTNORM_SUPPORTED(!c10::impl::TorchDispatchModeTLS::get_mode(c10::impl::TorchDispatchModeKey::PROXY),
                       "make_fx records torch's operators");
  }
  if (config.is_batch()) {
    FASTNORM_SUPPORTED(use_input_stats ? config.eps > 0 : config.eps >= 0, "eps is ", config.eps,
                       ", expected a positive one");
    FASTNORM_SUPPORTED(x.dim() >= 2 && has_values(x, use_input_stats), "x has shape ", x.sym_sizes(),
                       ", expected several values per channel");
  }
  for (const auto& [t, name] :
       {std::pair(&inputs.weight, "weight"), std::pair(&inputs.bias, "bias"), std::pair(&running.mean, "running_mean"),
        std::pair(&running.var, "running_var"), std::pair(&running.num_batches_tracked, "num_batches_tracked")}) {
    FASTNORM_SUPPORTED(!present(*t) || (*t)->device() == x.device(), name, " is on ", (*t)->device(), ", expected ",
                       x.device(), " like x");
  }
  FASTNORM_SUPPORTED(use_input_stats || running.present(), "there are no running statistics to use");
  if (!running.present()) return;
  FASTNORM_SUPPORTED(present(running.mean) && present(running.var),
                     "one of running_mean and running_var is given, expected both or neither");
  const bool per_channel = config.is_batch() || (config.normalized_dims == 0 && config.groups == x.sym_size(1));
  FASTNORM_SUPPORTED(per_channel, "running statistics are given with groups = ", config.groups,
                     " and normalized_dims = ", config.normalized_dims, ", expected statistics for every channel");
  const Tensor& like = present(inputs.weight) ? *inputs.weight : present(inputs.bias) ? *inputs.bias : *running.mean;
  for (const auto& [t, name] : {std::pair(&*running.mean, "running_mean"), std::pair(&*running.var, "running_var")}) {
    FASTNORM_SUPPORTED(t->dim() == 1 && t->sym_size(0) == x.sym_size(1), name, " has shape ", t->sym_sizes(),
                       ", expected [", x.sym_size(1), "]");
    FASTNORM_SUPPORTED(
        t->scalar_type() == like.scalar_type() &&
            (t->scalar_type() == x.scalar_type() || (t->scalar_type() == at::kFloat && x.scalar_type() != at::kDouble)),
        name, " has dtype ", t->scalar_type(), ", which does not go with x of ", x.scalar_type());
    FASTNORM_SUPPORTED(!t->requires_grad(), name, " requires grad, expected a constant");
  }
}

// Runs forward. Batch norm moves the running statistics at once, instance norm when all is saved: as torch.nn does.
Forward forward(const Call& call, bool save_mask) {
  static const auto forward_op = find_op<ForwardSignature>("fastnorm::norm_forward");
  static const auto batch_op = find_op<BatchForwardSignature>("fastnorm::batch_norm_forward_");
  const auto& [inputs, c, running, use_input_stats] = static_cast<const Arguments&>(call);
  if (call.moves_running() && c.is_batch()) {
    Forward result = batch_op.call(inputs.x, inputs.weight, inputs.bias, inputs.residual, running.mean, running.var,
                                   running.num_batches_tracked, c.eps, c.activation, c.activation_param, save_mask,
                                   running.momentum);
    call.has_moved_running = true;
    return result;
  }
  Forward result = forward_op.call(inputs.x, inputs.weight, inputs.bias, inputs.residual, call.statistics(running.mean),
                                   call.statistics(running.var), c.groups, c.normalized_dims, c.eps, c.activation,
                                   c.activation_param, save_mask);
  if (call.moves_running()) call.moved_last = std::get<1>(result);
  return result;
}

// Calls body, which may run code of the user's. torch.nn has counted the batch before anything can fail; here it is
// counted by the kernel that moves the statistics, so where body fails before that it is counted now. After a refusal
// torch's own forward runs, and counts.
template <class Body>
Tensor counting_batches(const Call& call, Body body) {
  try {
    const Tensor y = body();
    if (call.moved_last.defined()) {
      at::AutoDispatchBelowADInplaceOrView guard;
      call.move_running(call.moved_last);
    }
    return y;
  } catch (const c10::NotImplementedError&) {
    throw;
  } catch (...) {
    const OptTensor& batches = call.running.num_batches_tracked;
    if (call.use_input_stats && !call.has_moved_running && present(batches) && has_data(*batches)) {
      // An exception of Python's may be on its way, and then no more Python can run.
      const c10::impl::ExcludeDispatchKeyGuard no_modes(
          c10::DispatchKeySet({c10::DispatchKey::Python, c10::DispatchKey::PythonTLSSnapshot}));
      at::AutoDispatchBelowADInplaceOrView guard;
      batches->add_(1);
      count_version(batches);
    }
    throw;
  }
}

// forward(), with a node for its gradients.
Tensor forward_with_grad(const Call& call) {
  const auto node = NormBackward::make(call.inputs, call.config, call.frozen());
  const auto [y, stats, mask] = [&] {
    at::AutoDispatchBelowADInplaceOrView guard;
    return forward(call, true);
  }();
  torch::autograd::set_history(y, node);
  node->save_results(stats, mask);
  return y;
}

Tensor norm(const Call& call) {
  check(call);
  return counting_batches(call, [&] { return std::get<0>(forward(call, false)); });
}

Tensor norm_autograd(const Call& call) {
  const auto& [x, weight, bias, residual] = call.inputs;
  using torch::autograd::isFwGradDefined;
  FASTNORM_SUPPORTED(
      !x._fw_grad(0).defined() && !isFwGradDefined(weight) && !isFwGradDefined(bias) && !isFwGradDefined(residual),
      "an input has a forward-mode gradient");
  if (torch::autograd::compute_requires_grad(x, weight, bias, residual)) {
    check(call);
    return counting_batches(call, [&] { return forward_with_grad(call); });
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return norm(call);
}

// The op as the dispatcher calls it.
template <Tensor (*implementation)(const Call&)>
Tensor flat_norm(const Tensor& x, const OptTensor& weight, const OptTensor& bias, const OptTensor& residual,
                 const OptTensor& running_mean, const OptTensor& running_var, const OptTensor& num_batches_tracked,
                 int64_t groups, int64_t normalized_dims, double eps, int64_t activation, double activation_param,
                 bool use_input_stats, std::optional<double> momentum) {
  return implementation({{x, weight, bias, residual},
                         {groups, normalized_dims, eps, activation, activation_param},
                         {running_mean, running_var, num_batches_tracked, momentum},
                         use_input_stats});
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastnorm, m) {
  m.def(
      "norm(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, int groups, int normalized_dims, float eps, "
      "int activation, float activation_param, bool use_input_stats, float? momentum) -> Tensor");
  m.def(
      "norm_backward_differentiable(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor stats, "
      "Tensor mask, int groups, int normalized_dims, float eps, int activation, float activation_param, bool frozen, "
      "bool[3] output_mask) -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual)");
  m.def(
      "batch_norm_apply_synchronized(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor stats, "
      "Tensor count, float eps, int activation, float activation_param, bool save_mask, str group) "
      "-> (Tensor y, Tensor mask)");
}

TORCH_LIBRARY_IMPL(fastnorm, CompositeExplicitAutograd, m) { m.impl("norm", &flat_norm<norm>); }
TORCH_LIBRARY_IMPL(fastnorm, Autograd, m) { m.impl("norm", &flat_norm<norm_autograd>); }

}  // namespace fastnorm::ops
