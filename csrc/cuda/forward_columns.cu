// The forward kernels of the columns traversal. The build compiles this file once for each storage type, as
// FASTNORM_DTYPE.
#include "forward_launch.cuh"

namespace fastnorm::cuda {

template <>
int forward_of<FASTNORM_DTYPE, Traversal::kColumns>(const ForwardArgs& args, const ForwardPlan& plan, void* workspace,
                                                    void* stream) {
  return run_forward<FASTNORM_DTYPE, Traversal::kColumns>(args, plan, workspace, stream);
}

}  // namespace fastnorm::cuda
