// Tells the interpreter which memory a call of an op may access: the tensors that it is given, as far as their strides
// reach, and what it allocates. Part of the ops' library alone.
#include <ATen/core/Tensor.h>
#include <c10/core/Allocator.h>
#include <torch/library.h>

#include "door.h"

namespace fastnorm::ptx {

namespace {

// torch tells the allocations of a thread to whoever profiles memory there.
class Allocated : public c10::MemoryReportingInfoBase {
 public:
  explicit Allocated(CallMemory& memory) : memory_(memory) {}
  bool memoryProfilingEnabled() const override { return true; }
  void reportMemoryUsage(void* at, int64_t bytes, size_t, size_t, c10::Device device) override {
    if (!device.is_cpu()) return;
    const auto address = reinterpret_cast<uint64_t>(at);
    if (bytes > 0) {
      memory_.add(address, static_cast<uint64_t>(bytes));
    } else {
      memory_.remove(address);
    }
  }

 private:
  CallMemory& memory_;
};

void add(CallMemory& memory, const at::Tensor& t) {
  if (!t.defined() || !t.has_storage() || !t.device().is_cpu() || t.numel() == 0) return;
  int64_t elements = 1;
  for (int64_t d = 0; d < t.dim(); ++d) elements += (t.size(d) - 1) * t.stride(d);
  memory.add(reinterpret_cast<uint64_t>(t.const_data_ptr()), static_cast<uint64_t>(elements * t.element_size()));
}

void call(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  CallMemory memory;
  for (const c10::IValue& argument : torch::jit::last(*stack, op.schema().arguments().size())) {
    if (argument.isTensor()) add(memory, argument.toTensor());
  }
  const c10::DebugInfoGuard guard(c10::DebugInfoKind::PROFILER_STATE, std::make_shared<Allocated>(memory));
  op.redispatchBoxed(keys & c10::DispatchKeySet(c10::DispatchKeySet::FULL_AFTER, c10::DispatchKey::BackendSelect),
                     stack);
}

}  // namespace

}  // namespace fastnorm::ptx

// Before the kernels of a device are chosen.
TORCH_LIBRARY_IMPL(fastnorm_ptx, BackendSelect, m) {
  for (const char* name : {"norm_forward", "batch_norm_forward_", "norm_backward", "update_running_stats_", "moments",
                           "normalize_images", "batch_norm_partial", "batch_norm_fold_", "batch_norm_apply",
                           "batch_norm_backward_sums", "batch_norm_backward_apply"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&fastnorm::ptx::call>());
  }
}
