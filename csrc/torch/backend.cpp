// The backend of a device: which ones there are depends on the build.
#include "backend.h"

#include "supported.h"

namespace fastnorm::ops {

const Backend& backend_of(const at::Tensor& t, const char* name) {
#if defined(FASTNORM_EMULATE)
  if (t.is_cpu()) return kCudaBackend;
  constexpr const char* kExpected = "cpu, where the CUDA kernels are emulated";
#else
  if (t.is_cpu()) return kCpuBackend;
#if defined(FASTNORM_CUDA_BUILD)
  if (t.is_cuda()) return kCudaBackend;
  constexpr const char* kExpected = "cpu or cuda";
#else
  constexpr const char* kExpected = "cpu: this build has no CUDA kernels";
#endif
#endif
  FASTNORM_SUPPORTED(false, name, " is on ", t.device(), ", expected ", kExpected);
}

}  // namespace fastnorm::ops
