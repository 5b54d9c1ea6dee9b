// How often a device refused launches whose blocks wait for each other. Such a call is served by a slower plan, so the
// refusal has to be visible: see run_planned in backend_cuda.cpp. Without torch's headers, for module.cpp.
#pragma once

#include <atomic>
#include <cstdint>

namespace fastnorm::ops {

// The count of this process. Each library that includes this file has its own.
inline std::atomic<int64_t>& refused_gangs() {
  static std::atomic<int64_t> count{0};
  return count;
}

}  // namespace fastnorm::ops
