// The launches of api.h: a storage type and a traversal, known at run time, pick the ones compiled for them.
#include "launches.h"

namespace fastnorm::cuda {

int launch_forward(const ForwardArgs& args, const ForwardPlan& plan, void* workspace, void* stream) {
  return dispatch(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (args.geometry.sets_are_positions()) return forward_positions_of<T>(args, plan, stream);
    const bool rows = plan.grid.traversal == Traversal::kRows;
    return rows ? forward_of<T, Traversal::kRows>(args, plan, workspace, stream)
                : forward_of<T, Traversal::kColumns>(args, plan, workspace, stream);
  });
}

int launch_backward(const BackwardArgs& args, const BackwardPlan& plan, void* workspace, void* stream) {
  return dispatch(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (args.geometry.sets_are_positions()) return backward_positions_of<T>(args, plan, workspace, stream);
    const bool rows = plan.reduce.traversal == Traversal::kRows;
    return rows ? backward_of<T, Traversal::kRows>(args, plan, workspace, stream)
                : backward_of<T, Traversal::kColumns>(args, plan, workspace, stream);
  });
}

}  // namespace fastnorm::cuda
