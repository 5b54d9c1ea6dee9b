// The node that autograd goes back through: what a call keeps for its backward, and the gradients.
//
// A node as torch generates them for its own operators, with its tensors packed in their order: inputs before the
// kernels run, results after. User code sees the order: a hook that raises on an input leaves the running statistics
// alone, and the recomputation of a checkpoint stops at the last result, when the statistics have moved. (A
// torch::autograd::Function packs all at the end, and its context takes 1.5 us of a tiny call.)
#pragma once

#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/saved_variable.h>

#include "ops.h"

namespace fastnorm::ops {

using torch::autograd::variable_list;

// Which gradients are wanted: of x, weight, bias and residual.
using NeededGrads = std::array<bool, 4>;

class NormBackward : public torch::autograd::Node {
 public:
  // A node for a call on these inputs, packed.
  static auto make(const Inputs& inputs, const Config& config, bool frozen);

  NormBackward(const Inputs& inputs, const Config& config, bool frozen);
  void save_results(const Tensor& stats, const Tensor& mask);

  std::string name() const override { return "NormBackward"; }
  void release_variables() override;
  // For compiled autograd, which calls the gradients by an operator of its own.
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override;
  variable_list apply_with_saved(const variable_list& gradients,
                                 torch::dynamo::autograd::SwapSavedVariables& saved) override;

  enum { kX, kWeight, kBias, kResidual, kStats, kMask, kTensors };
  struct Settings {
    Config config;
    bool frozen;
    at::MemoryFormat format;  // of x when the mask was made
  };
  // What is kept, unpacked.
  struct Saved {
    std::array<Tensor, kTensors> tensors;  // undefined where absent
    Settings settings;
  };

 private:
  variable_list apply(variable_list&& gradients) override;
  Saved unpack() const;
  NeededGrads needed() const;

  std::array<torch::autograd::SavedVariable, kTensors> saved_;
  Tensor linear_bias_;  // without an activation: of its values nothing is wanted, and they may change
  Settings settings_;
};

// torch 2.11 and older count the references of a node by std::shared_ptr.
inline auto NormBackward::make(const Inputs& inputs, const Config& config, bool frozen) {
  using torch::autograd::Node;
  constexpr bool is_shared = std::is_same_v<decltype(torch::autograd::Edge::function), std::shared_ptr<Node>>;
  if constexpr (is_shared) {
    // Their deleter keeps a deep graph from being destroyed recursively; newer headers do not declare it.
    const auto destroy = [](auto* node) { deleteNode(node); };
    return std::shared_ptr<NormBackward>(new NormBackward(inputs, config, frozen), destroy);
  } else {
    return c10::make_intrusive<NormBackward>(inputs, config, frozen);
  }
}

}  // namespace fastnorm::ops
