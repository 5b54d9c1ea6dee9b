// The backward kernels of layer norm over the channels of planar maps. The build compiles this file once for each
// storage type, as FASTNORM_DTYPE.
#include "backward_positions.cuh"

#include "launch.cuh"
#include "launches.h"

namespace fastnorm::cuda {

template <>
int backward_positions_of<FASTNORM_DTYPE>(const BackwardArgs& args, const BackwardPlan& plan, void* workspace,
                                          void* stream) {
  using T = FASTNORM_DTYPE;
  using A = Accum<T>;
  const Grid& grid = plan.reduce;
  FoldParamsArgs<A> fold{};
  if (plan.param_sums != ParamSums::kNone) fold.sums = static_cast<const GradSums<A>*>(workspace);
  fold.channels = args.geometry.C;
  fold.outer = 1;
  fold.pieces = grid.blocks;
  fold.scaled = true;
  fold.dweight = args.dweight;
  fold.dbias = args.dbias;
  FusedBackward<A> f{};
  f.shape = fused_shape(grid, args.dtype, nullptr);
  f.gathered = const_cast<GradSums<A>*>(fold.sums);
  f.grid_sync = plan.grid_sync;
  f.fold = fold;
  const ColumnsShape shape = positions_shape(args.geometry, grid, args.dtype);
  const int error = dispatch_kernel<T, Traversal::kRows>(grid.pack, args.activation, [&](auto pack, auto smooth) {
    return launch(backward_positions<T, decltype(pack)::value, decltype(smooth)::value>,
                  fused_config(grid, plan.grid_sync, stream), BackwardTensors<T>(args), f, shape);
  });
  return error || fold.sums == nullptr || plan.grid_sync ? error : launch_fold_params(fold, stream);
}

}  // namespace fastnorm::cuda
