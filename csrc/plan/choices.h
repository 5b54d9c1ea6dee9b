// The fused launches that are tried for a call.
#pragma once

#include <vector>

#include "grid.h"
#include "types.h"

namespace fastnorm {

// Whether `forced` leaves this choice: -1 leaves all.
inline bool allows(int forced, int64_t value) { return forced < 0 || forced == value; }

// All choices for a fused launch, registers first.
std::vector<FusedChoice> fused_choices(const Geometry& g, DType dtype, const Staging& staging, bool persistent,
                                       const DeviceInfo& device, const Forced& forced);

}  // namespace fastnorm
