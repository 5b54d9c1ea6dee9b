// The options that plans of this process's CUDA calls are made with.
#pragma once

#include "plan/types.h"

namespace fastnorm {

// Set while no call is under way.
inline PlanOptions& plan_options() {
  static PlanOptions options;
  return options;
}

}  // namespace fastnorm
