// The CUDA runtime that the kernels' host code links with: it registers kernels under their names, answers queries for
// the device that a test has configured, and hands launches to the interpreter. nvcc compiles the production .cu files
// as they are, so that platform.cuh's host half runs here too.
#include <cuda_runtime_api.h>

#include <map>
#include <mutex>
#include <string>

#include "door.h"
#include "runtime.h"

namespace {

namespace ptx = fastnorm::ptx;

constexpr int kSharedWithoutAsking = 48 << 10, kClusterWithoutAsking = 8;

const fastnorm::DeviceInfo& device() { return fastnorm::emulator::settings().device; }

// A kernel's name on the device, and what it was allowed. Host code asks once for all that a device has, and a test may
// pretend to have another device since.
struct Function {
  std::string name;
  int asked_shared = kSharedWithoutAsking;
  bool all_shared = false;
  bool any_cluster = false;

  int64_t most_shared() const { return all_shared ? device().shared_per_block : asked_shared; }
};

struct Runtime {
  std::mutex mutex;
  std::map<const void*, Function> functions;  // by the host's stub

  Function* find(const void* stub) {
    const auto found = functions.find(stub);
    return found == functions.end() ? nullptr : &found->second;
  }
};
Runtime& runtime() {
  static Runtime& runtime = *new Runtime;
  return runtime;
}

thread_local cudaError_t last_error = cudaSuccess;
cudaError_t returned(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

ptx::LaunchShape shape_of(const cudaLaunchConfig_t& config) {
  ptx::LaunchShape shape{int64_t{config.gridDim.x} * config.gridDim.y * config.gridDim.z,
                         static_cast<int>(config.blockDim.x * config.blockDim.y * config.blockDim.z),
                         static_cast<int64_t>(config.dynamicSmemBytes)};
  for (unsigned a = 0; a < config.numAttrs; ++a) {
    const cudaLaunchAttribute& attribute = config.attrs[a];
    if (attribute.id == cudaLaunchAttributeCooperative) shape.cooperative = attribute.val.cooperative != 0;
    if (attribute.id == cudaLaunchAttributeClusterDimension) {
      shape.cluster = static_cast<int>(attribute.val.clusterDim.x);
    }
  }
  return shape;
}

}  // namespace

extern "C" {

// ---- what nvcc's host code calls when the library is loaded ----

void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 0; }
void __cudaRegisterFunction(void**, const char* stub, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  const std::lock_guard<std::mutex> lock(runtime().mutex);
  runtime().functions[stub].name = name;
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

// ---- launches by <<<>>>: platform.cuh has none ----

cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return returned(cudaErrorNotSupported); }
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { return returned(cudaErrorNotSupported); }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) {
  return returned(cudaErrorNotSupported);
}

// ---- launches ----

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* stub, void** arguments) {
  const ptx::LaunchShape shape = shape_of(*config);
  std::string name;
  {
    const std::lock_guard<std::mutex> lock(runtime().mutex);
    const Function* const function = runtime().find(stub);
    if (function == nullptr) return returned(cudaErrorInvalidDeviceFunction);
    name = function->name;
    if (shape.shared_bytes > function->most_shared()) {
      return returned(
          static_cast<cudaError_t>(ptx::refuse(std::to_string(shape.shared_bytes) + " bytes of shared memory, " +
                                               std::to_string(function->most_shared()) + " allowed, " + name)));
    }
    if (shape.cluster > kClusterWithoutAsking && !function->any_cluster) {
      return returned(static_cast<cudaError_t>(ptx::refuse("a cluster that the kernel was not allowed, " + name)));
    }
  }
  return returned(static_cast<cudaError_t>(ptx::launch(name, shape, arguments)));
}

cudaError_t cudaFuncSetAttribute(const void* stub, cudaFuncAttribute attribute, int value) {
  const std::lock_guard<std::mutex> lock(runtime().mutex);
  Function* const function = runtime().find(stub);
  if (function == nullptr) return returned(cudaErrorInvalidDeviceFunction);
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    if (value > device().shared_per_block) return returned(cudaErrorInvalidValue);
    function->asked_shared = value;
    function->all_shared = value == device().shared_per_block;
  } else if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed) {
    function->any_cluster = value != 0;
  } else {
    return returned(cudaErrorNotSupported);
  }
  return cudaSuccess;
}

// ---- the device ----

cudaError_t cudaGetDevice(int* number) {
  *number = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const fastnorm::DeviceInfo& d = device();
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = d.capability / 10; break;
    case cudaDevAttrComputeCapabilityMinor: *value = d.capability % 10; break;
    case cudaDevAttrMultiProcessorCount: *value = d.num_sms; break;
    case cudaDevAttrClockRate: *value = d.clock_mhz * 1000; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = d.threads_per_sm; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = static_cast<int>(d.shared_per_sm); break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = static_cast<int>(d.shared_per_block); break;
    case cudaDevAttrL2CacheSize: *value = static_cast<int>(d.l2_bytes); break;
    case cudaDevAttrCooperativeLaunch: *value = d.cooperative; break;
    // Two transfers per clock of 8000 bits are so many bytes in a microsecond.
    case cudaDevAttrMemoryClockRate: *value = static_cast<int>(d.bytes_per_us / 2); break;
    case cudaDevAttrGlobalMemoryBusWidth: *value = 8000; break;
    default: return returned(cudaErrorInvalidValue);
  }
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void*, const cudaLaunchConfig_t* config) {
  const fastnorm::DeviceInfo& d = device();
  const ptx::LaunchShape shape = shape_of(*config);
  const bool has = shape.cluster <= d.largest_cluster && (!shape.cooperative || d.cooperative_clusters);
  *clusters = has ? d.cluster_sms / shape.cluster : 0;
  return cudaSuccess;
}

// ---- errors ----

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
cudaError_t cudaPeekAtLastError() { return last_error; }

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorLaunchFailure: return ptx::last_defect();
    case cudaErrorCooperativeLaunchTooLarge: return "too many blocks in cooperative launch";
    default: return "an error of the CUDA runtime";
  }
}

}  // extern "C"
