// The launches of api.h: a storage type known at run time picks the ones compiled for it.
#include "launches.h"

namespace fastnorm::cuda {

int launch_forward(const ForwardArgs& args, const ForwardPlan& plan, void* workspace, void* stream) {
  return dispatch(args.dtype,
                  [&](auto tag) { return forward_of<typename decltype(tag)::type>(args, plan, workspace, stream); });
}

int launch_backward(const BackwardArgs& args, const BackwardPlan& plan, void* workspace, void* stream) {
  return dispatch(args.dtype,
                  [&](auto tag) { return backward_of<typename decltype(tag)::type>(args, plan, workspace, stream); });
}

}  // namespace fastnorm::cuda
