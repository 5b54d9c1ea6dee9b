// The expected cost of a plan. An estimate decides between plans and promises nothing; csrc/plan/cost.cpp has its
// constants.
#pragma once

#include "instructions.h"
#include "types.h"

namespace fastnorm {

// The tensors that a launch moves: those that statistics and sums are taken of; and those that only the part which
// writes the outputs reads or writes. Each has `numel` elements, with C channels side by side.
struct Streams {
  int read, applied;
  DType dtype;
  int64_t numel, C;

  double bytes(int streams) const { return static_cast<double>(streams) * static_cast<double>(numel * size_of(dtype)); }
};

// The machine instructions that the kernels execute for an element.
// residual: forward adds one, or backward writes its gradient.
ElementWork element_work(bool backward, const Geometry& g, int pack, DType dtype, Activation activation, bool residual);

// A fused launch with `resident` blocks on the device at a time.
Estimate estimate_fused(const Grid& grid, const Streams& streams, const ElementWork& work, int64_t resident,
                        const DeviceInfo& device);

// A launch of blocks that do not wait for each other, and read or write so many tensors in all. again: it reads what
// the launch before it read, and finds in L2 what that left there.
Estimate estimate_pass(const Grid& grid, const Streams& streams, int moved, bool again, double instructions,
                       const DeviceInfo& device);

// The folds, beside their launches: of so many partials of each of these sets; of each of these channels, to the
// gradients of the parameters.
Estimate estimate_fold(int64_t sets, int64_t partials, const DeviceInfo& device);
Estimate estimate_fold_params(int64_t channels, int64_t partials, const DeviceInfo& device);

// The time in which the blocks of a gang exchange the partials of a wave.
double exchange_us(const Grid& grid, DType dtype, const DeviceInfo& device);

Estimate estimate_launches(int launches, bool cooperative);

// A few bytes that are written once and read once, through L2.
Estimate estimate_partials(int64_t bytes, const DeviceInfo& device);
// A barrier of all blocks of a launch.
Estimate estimate_grid_sync();

}  // namespace fastnorm
