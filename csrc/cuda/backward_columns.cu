// The backward kernels of the columns traversal. The build compiles this file once for each storage type, as
// FASTNORM_DTYPE.
#include "backward_launch.cuh"

namespace fastnorm::cuda {

template <>
int backward_of<FASTNORM_DTYPE, Traversal::kColumns>(const BackwardArgs& args, const BackwardPlan& plan,
                                                     void* workspace, void* stream) {
  return run_backward<FASTNORM_DTYPE, Traversal::kColumns>(args, plan, workspace, stream);
}

}  // namespace fastnorm::cuda
