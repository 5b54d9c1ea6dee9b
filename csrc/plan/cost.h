// What a plan is expected to cost. An estimate decides between plans and promises nothing; csrc/plan/cost.cpp holds its
// constants.
#pragma once

#include "types.h"

namespace fastnorm {

// Tensors that a launch moves, of `numel` elements each, C channels side by side.
struct Streams {
  int read, written;
  DType dtype;
  int64_t numel, C;

  double bytes(int streams) const { return static_cast<double>(streams) * static_cast<double>(numel * size_of(dtype)); }
};

// A fused launch, of which `resident` blocks are on the device at a time.
Estimate estimate_fused(const Grid& grid, const Streams& streams, int64_t resident, const DeviceInfo& device);

// Launches that follow each other, `passes` of which read the same tensors; what one leaves in L2 the next finds there.
Estimate estimate_passes(const Grid& grid, const Streams& streams, int passes, const DeviceInfo& device);

Estimate estimate_launches(int launches, bool cooperative);

// Few bytes that are written once and read once, by way of L2.
Estimate estimate_partials(int64_t bytes, const DeviceInfo& device);
// All blocks of a launch meet.
Estimate estimate_grid_sync();

}  // namespace fastnorm
