// The running statistics of a call, and what must hold of them before any of them moves.
#pragma once

#include <ATen/MemoryOverlap.h>
#include <c10/core/InferenceMode.h>

#include "tensor_args.h"

namespace fastnorm::ops {

inline bool overlap(const Tensor& a, const Tensor& b) {
  const at::MemOverlapStatus status = at::get_overlap_status(a, b);
  return status == at::MemOverlapStatus::Full || status == at::MemOverlapStatus::Partial;
}

// t has been written to: autograd is to find that what it saved of it is gone.
inline void count_version(const OptTensor& t) {
  if (present(t)) t->unsafeGetTensorImpl()->bump_version();
}

struct Running {
  const OptTensor &mean, &var, &num_batches_tracked;
  std::optional<double> momentum;  // absent: 1 / num_batches_tracked

  bool present() const { return ops::present(mean) || ops::present(var); }
  bool moves() const { return present() || ops::present(num_batches_tracked); }

  // That update_running_stats_ can take them, on `device`.
  void check(at::Device device) const {
    for (const auto& [t, name] : {std::pair(&mean, "running_mean"), std::pair(&var, "running_var"),
                                  std::pair(&num_batches_tracked, "num_batches_tracked")}) {
      FASTNORM_SUPPORTED(!ops::present(*t) || !(*t)->is_inference() || c10::InferenceMode::is_enabled(), name,
                         " is an inference tensor, which moves in inference mode only");
    }
    for (const auto& [t, name] : {std::pair(&mean, "running_mean"), std::pair(&var, "running_var")}) {
      if (!ops::present(*t)) continue;
      check_place(**t, name, device);
      dtype_of(**t, name);
      FASTNORM_SUPPORTED((*t)->dim() == 1, name, " has shape ", (*t)->sizes(), ", expected one dim");
      FASTNORM_SUPPORTED(at::has_internal_overlap(**t) != at::MemOverlap::Yes, name,
                         " overlaps itself, expected an element of its own for every channel");
    }
    if (ops::present(mean) && ops::present(var)) {
      FASTNORM_SUPPORTED(mean->numel() == var->numel(), "running_mean and running_var have shapes ", mean->sizes(),
                         " and ", var->sizes(), ", expected one");
      FASTNORM_SUPPORTED(!overlap(*mean, *var), "running_mean and running_var overlap, expected memory of their own");
    }
    FASTNORM_SUPPORTED(!present() || momentum.has_value() || ops::present(num_batches_tracked),
                       "momentum is absent, expected num_batches_tracked to average by");
    if (!ops::present(num_batches_tracked)) return;
    check_place(*num_batches_tracked, "num_batches_tracked", device);
    FASTNORM_SUPPORTED(num_batches_tracked->scalar_type() == at::kLong && num_batches_tracked->numel() == 1,
                       "num_batches_tracked has dtype ", num_batches_tracked->scalar_type(), " and ",
                       num_batches_tracked->numel(), " elements, expected one int64");
  }
};

}  // namespace fastnorm::ops
