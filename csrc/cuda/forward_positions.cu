// The forward kernels of layer norm over the channels of planar maps. The build compiles this file once for each
// storage type, as FASTNORM_DTYPE.
#include "forward_positions.cuh"

#include "launch.cuh"
#include "launches.h"

namespace fastnorm::cuda {

template <>
int forward_positions_of<FASTNORM_DTYPE>(const ForwardArgs& args, const ForwardPlan& plan, void* stream) {
  using T = FASTNORM_DTYPE;
  const ColumnsShape shape = positions_shape(args.geometry, plan.grid, args.dtype);
  const FusedShape fused = fused_shape(plan.grid, args.dtype, nullptr);
  return dispatch_kernel<T, Traversal::kRows>(plan.grid.pack, args.activation, [&](auto pack, auto smooth) {
    return launch(forward_positions<T, decltype(pack)::value, decltype(smooth)::value>,
                  fused_config(plan.grid, false, stream), ForwardTensors<T>(args), shape, fused);
  });
}

}  // namespace fastnorm::cuda
