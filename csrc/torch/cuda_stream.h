// torch's current stream, from the C shim in libtorch_cuda. The symbol is weak and null where torch has no CUDA, so
// that one binding compiles and loads with every torch. (c10/cuda's headers do not compile with a CPU-only torch.)
#pragma once

#include <cstdint>

#if defined(__linux__)
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace fastnorm {

inline bool has_cuda_stream() { return aoti_torch_get_current_cuda_stream != nullptr; }
inline bool get_cuda_stream(int device, void** stream) {
  return has_cuda_stream() && aoti_torch_get_current_cuda_stream(device, stream) == 0;
}

}  // namespace fastnorm
#else
namespace fastnorm {

inline bool has_cuda_stream() { return false; }
inline bool get_cuda_stream(int, void**) { return false; }

}  // namespace fastnorm
#endif
