#include "norm_backward.h"

#include <torch/csrc/dynamo/compiled_autograd.h>

#include "find_op.h"
#include "tensor_args.h"

namespace fastnorm::ops {

namespace {

using torch::autograd::SavedVariable;
using Saved = NormBackward::Saved;

// What is no tensor, one by one: packed, unpacked and compared by this list alone.
template <class Settings>
auto numbers(Settings& settings) {
  return std::tuple_cat(fields(settings.config), std::tie(settings.frozen, settings.format));
}

SavedVariable pack(const Tensor& input) {
  FASTNORM_SUPPORTED(!input.defined() || !input.is_inference(), "an inference tensor cannot be saved for backward");
  return {input, false};
}

OptTensor optional(const Tensor& t) { return t.defined() ? OptTensor(t) : OptTensor(); }

variable_list gradients_of(const Tensor& dy, const Saved& saved, const NeededGrads& needs) {
  variable_list result(needs.size());
  if (!dy.defined()) return result;
  const auto& [saved_x, weight, bias, residual, stats, mask] = saved.tensors;
  const auto& [c, frozen, format] = saved.settings;
  // In the layout it had when the mask was made: whoever packed the tensors may have changed it.
  const bool as_packed = mask.sym_numel() == 0 || saved_x.suggest_memory_format() == format;
  const Tensor x = as_packed ? saved_x : saved_x.clone(format);
  const bool linear = c.activation == 0;
  const auto [needs_x, needs_weight, needs_bias, needs_residual] = needs;
  const std::array<bool, 3> output_mask{needs_x, needs_weight || needs_bias, needs_residual && !linear};

  const auto call_op = [&](const c10::TypedOperatorHandle<BackwardSignature>& op) {
    return op.call(dy, x, optional(weight), optional(bias), optional(residual), stats, mask, c.groups,
                   c.normalized_dims, c.eps, c.activation, c.activation_param, frozen, output_mask);
  };
  const auto [dx, dweight, dbias, dresidual] = [&] {
    if (at::GradMode::is_enabled() || dy._fw_grad(0).defined() ||
        c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode)) {
      // For whatever differentiates through it again; implemented in fastnorm/autograd.py.
      static const auto op = find_op<BackwardSignature>("fastnorm::norm_backward_differentiable");
      return call_op(op);
    }
    static const auto op = find_op<BackwardSignature>("fastnorm::norm_backward");
    at::AutoDispatchBelowADInplaceOrView guard;
    return call_op(op);
  }();
  if (needs_x) result[0] = dx;
  if (needs_weight) result[1] = dweight;
  if (needs_bias) result[2] = dbias;
  if (needs_residual) result[3] = linear ? dy : dresidual;
  return result;
}

// gradients_of(), as compiled autograd calls it.
variable_list packed_gradients_of(const variable_list& gradients, const std::vector<c10::IValue>& values) {
  torch::dynamo::autograd::PackedArgs args(values);
  NeededGrads needs;
  for (bool& flag : needs) flag = args.unpack<bool>();
  Saved saved{};
  for (Tensor& t : saved.tensors) t = args.unpack<Tensor>();
  std::apply([&](auto&... n) { ((n = args.unpack<std::decay_t<decltype(n)>>()), ...); }, numbers(saved.settings));
  return gradients_of(gradients[0], saved, needs);
}

std::vector<c10::IValue> packed(const NeededGrads& needs, const Saved& saved) {
  torch::dynamo::autograd::PackedArgs args;
  for (const bool flag : needs) args.pack(flag);
  for (const Tensor& t : saved.tensors) args.pack(t);
  std::apply([&](const auto&... n) { (args.pack(n), ...); }, numbers(saved.settings));
  return std::move(args).vec();
}

}  // namespace

NormBackward::NormBackward(const Inputs& inputs, const Config& config, bool frozen)
    : Node(torch::autograd::collect_next_edges(inputs.x, inputs.weight, inputs.bias, inputs.residual)),
      settings_{config, frozen, inputs.x.suggest_memory_format()} {
  const auto& [x, weight, bias, residual] = inputs;
  // Without an activation, backward wants the bias's shape and of the residual nothing: both may change until then.
  const bool linear = config.activation == 0;
  const bool masked = present(residual) && is_two_sided(check_activation(config.activation));
  saved_[kX] = pack(x);
  if (present(weight)) saved_[kWeight] = pack(*weight);
  // Not the variable itself: changed in place by what follows, it would lead back to this node, which holds it.
  if (present(bias) && linear) linear_bias_ = bias->variable_data();
  if (present(bias) && !linear) saved_[kBias] = pack(*bias);
  if (present(residual) && !linear && !masked) saved_[kResidual] = pack(*residual);
}

void NormBackward::save_results(const Tensor& stats, const Tensor& mask) {
  saved_[kStats] = pack(stats);
  saved_[kMask] = pack(mask);
}

void NormBackward::release_variables() {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (SavedVariable& t : saved_) t.reset_data();
  linear_bias_.reset();
}

Saved NormBackward::unpack() const {
  Saved saved{{}, settings_};
  for (size_t i = 0; i < saved_.size(); ++i) saved.tensors[i] = saved_[i].unpack();
  if (linear_bias_.defined()) saved.tensors[kBias] = linear_bias_;
  return saved;
}

NeededGrads NormBackward::needed() const {
  NeededGrads needs{};
  for (size_t i = 0; i < needs.size(); ++i) needs[i] = task_should_compute_output(i);
  return needs;
}

variable_list NormBackward::apply(variable_list&& gradients) {
  const std::lock_guard<std::mutex> lock(mutex_);
  return gradients_of(gradients[0], unpack(), needed());
}

void NormBackward::compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const {
  for (const SavedVariable& t : saved_) args.collect(t, false);
  args.collect(linear_bias_);
  std::apply([&](const auto&... n) { (args.collect(n), ...); }, numbers(settings_));
}

variable_list NormBackward::apply_with_saved(const variable_list& gradients,
                                             torch::dynamo::autograd::SwapSavedVariables& saved) {
  using namespace torch::dynamo::autograd;
  for (SavedVariable& t : saved_) saved.before(t);
  saved.before(linear_bias_);
  const std::vector<c10::IValue> args = packed(needed(), unpack());
  std::vector<at::TypePtr> schema;
  for (const c10::IValue& value : args) schema.push_back(value.isTensor() ? at::TensorType::get() : value.type());
  const auto metadata =
      IValuePacker<std::vector<std::optional<torch::autograd::InputMetadata>>>::pack(get_input_metadata(next_edges()));
  const auto& python = getPyCompilerInterface();
  PyObject* compiler = saved.get_py_compiler();
  const std::string function = python->bind_function(compiler, name(), packed_gradients_of, schema,
                                                     /*is_custom_function=*/true, /*is_traceable=*/true);
  variable_list result = python->call_function(compiler, "apply_functional", function, gradients, args, metadata);
  for (SavedVariable& t : saved_) saved.after(t);
  saved.after(linear_bias_);
  return result;
}

}  // namespace fastnorm::ops
