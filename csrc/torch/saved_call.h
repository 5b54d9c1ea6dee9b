// What a call keeps for its backward: packing beside unpacking.
//
// torch packs an operator's inputs before it runs and its results after. User code sees the order: a hook that raises
// on an input leaves the running statistics alone, and the recomputation of a checkpoint stops at the last result,
// when the statistics have moved. A C++ autograd Function packs all at the end. So where hooks are set, the inputs are
// packed by SavedCall itself, before the kernels run.
#pragma once

#include <ATen/SavedTensorHooks.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/saved_variable.h>

#include "ops.h"
#include "tensor_args.h"

namespace fastnorm::ops {

using torch::autograd::AutogradContext;

inline Tensor value_or_undefined(const OptTensor& t) { return t.value_or(Tensor()); }
inline OptTensor optional(const Tensor& t) { return t.defined() ? OptTensor(t) : OptTensor(); }

// The numbers of a call.
struct SavedSettings {
  Config config;
  bool frozen, has_residual;
  at::MemoryFormat format;  // of x

  c10::IValue pack() const {
    return c10::ivalue::Tuple::create({config.groups, config.normalized_dims, config.eps, config.activation,
                                       config.activation_param, frozen, has_residual, static_cast<int64_t>(format)});
  }
  static SavedSettings unpack(const c10::IValue& value) {
    const std::vector<c10::IValue> v = value.toTupleRef().elements().vec();
    return {{v[0].toInt(), v[1].toInt(), v[2].toDouble(), v[3].toInt(), v[4].toDouble()},
            v[5].toBool(),
            v[6].toBool(),
            static_cast<at::MemoryFormat>(v[7].toInt())};
  }
};

// x, weight, bias and residual, packed before the rest.
struct PackedInputs : torch::CustomClassHolder {
  std::array<torch::autograd::SavedVariable, 4> tensors;

  explicit PackedInputs(const torch::autograd::variable_list& inputs) {
    for (size_t i = 0; i < inputs.size(); ++i) tensors[i] = torch::autograd::SavedVariable(inputs[i], false);
  }
  // As torch releases saved tensors: unless the graph is to be gone through again.
  std::array<Tensor, 4> unpack() {
    std::array<Tensor, 4> inputs;
    for (size_t i = 0; i < inputs.size(); ++i) inputs[i] = tensors[i].unpack();
    if (!torch::autograd::get_current_graph_task_keep_graph()) tensors = {};
    return inputs;
  }
};

// Packs the inputs; finish() packs the results.
class SavedCall {
 public:
  SavedCall(AutogradContext* ctx, const Inputs& inputs, const Config& config, bool frozen) : ctx_(ctx) {
    const auto& [x, weight, bias, residual] = inputs;
    // Without activation, backward wants the bias's shape and of the residual nothing: both may change until then.
    const bool linear = config.activation == 0;
    const bool masked = present(residual) && is_two_sided(check_activation(config.activation));
    tensors_.reserve(6);
    tensors_.push_back(x);
    tensors_.push_back(value_or_undefined(weight));
    tensors_.push_back(linear ? Tensor() : value_or_undefined(bias));
    tensors_.push_back(linear || masked ? Tensor() : value_or_undefined(residual));
    for (const Tensor& t : tensors_) {
      FASTNORM_SUPPORTED(!t.defined() || !t.is_inference(), "an inference tensor cannot be saved for backward");
    }
    if (linear && present(bias)) ctx->saved_data["bias"] = *bias;
    ctx->saved_data["settings"] = SavedSettings{config, frozen, present(residual), x.suggest_memory_format()}.pack();
    if (at::SavedTensorDefaultHooks::get_tls_state().stack.empty()) return;
    ctx->saved_data["inputs"] = c10::IValue::make_capsule(c10::make_intrusive<PackedInputs>(tensors_));
    tensors_.assign(4, Tensor());
  }

  void finish(const Tensor& stats, const Tensor& mask) {
    tensors_.push_back(stats);
    tensors_.push_back(mask);
    ctx_->save_for_backward(std::move(tensors_));
  }

 private:
  AutogradContext* ctx_;
  torch::autograd::variable_list tensors_;  // x, weight, bias, residual; undefined where they are packed already
};

struct UnpackedCall {
  Tensor x, stats, mask;
  OptTensor weight, bias, residual;
  Config config;
  bool frozen, has_residual;

  explicit UnpackedCall(AutogradContext* ctx) {
    const auto saved = ctx->get_saved_variables();
    std::array<Tensor, 4> inputs{saved[0], saved[1], saved[2], saved[3]};
    if (const auto packed = ctx->saved_data.find("inputs"); packed != ctx->saved_data.end()) {
      inputs = c10::static_intrusive_pointer_cast<PackedInputs>(packed->second.toCapsule())->unpack();
    }
    const SavedSettings settings = SavedSettings::unpack(ctx->saved_data["settings"]);
    stats = saved[4], mask = saved[5];
    // In the layout it had when the mask was made: whoever packed the tensors may have changed it.
    x = mask.sym_numel() == 0 || inputs[0].suggest_memory_format() == settings.format
            ? inputs[0]
            : inputs[0].clone(settings.format);
    weight = optional(inputs[1]), bias = optional(inputs[2]), residual = optional(inputs[3]);
    if (const auto held = ctx->saved_data.find("bias"); held != ctx->saved_data.end()) bias = held->second.toTensor();
    config = settings.config, frozen = settings.frozen, has_residual = settings.has_residual;
  }
};

}  // namespace fastnorm::ops
