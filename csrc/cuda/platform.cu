// What the host asks of the CUDA runtime: launches and the facts of a device. Compiled once, and not with the kernels:
// its headers would take each of their files some seconds.
#include "once_per_kernel.h"
#include "platform.cuh"

namespace fastnorm::cuda {
namespace {

// Raises the kernel's limits on the current device where the launch needs it: see once_per_kernel.h.
cudaError_t allow(const void* kernel, int64_t shared_bytes, int cluster) {
  constexpr int64_t kSharedWithoutAsking = 48 << 10;
  constexpr int kClusterWithoutAsking = 8;
  static OncePerKernel shared_limits, cluster_limits;
  const bool large = shared_bytes > kSharedWithoutAsking, wide = cluster > kClusterWithoutAsking;
  if (!large && !wide) return cudaSuccess;
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (!error && large) {
    error = shared_limits.run(kernel, device, [&] {
      int most = 0;
      const cudaError_t unknown = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
      return unknown ? unknown : cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    });
  }
  if (!error && wide) {
    error = cluster_limits.run(kernel, device, [&] {
      return cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    });
  }
  return error;
}

// A cudaLaunchConfig_t together with the attributes that it points to.
struct LaunchWords {
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config{};

  explicit LaunchWords(const LaunchConfig& c) {
    config.gridDim = dim3(static_cast<unsigned>(c.blocks));
    config.blockDim = dim3(static_cast<unsigned>(c.threads));
    config.dynamicSmemBytes = static_cast<size_t>(c.shared_bytes);
    config.stream = static_cast<cudaStream_t>(c.stream);
    config.attrs = attributes;
    if (c.cooperative) {
      cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
      attribute.id = cudaLaunchAttributeCooperative;
      attribute.val.cooperative = 1;
    }
    if (c.cluster > 1) {
      cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim.x = static_cast<unsigned>(c.cluster);
      attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    }
  }
  LaunchWords(const LaunchWords&) = delete;
};

// Whether the error of a launch means that its blocks cannot be on the device together, because it is shared or
// partitioned. Of a cooperative launch with clusters also that the driver does not know the two together: no document
// says that it does.
bool refuses_gangs(cudaError_t error, const LaunchConfig& config) {
  const bool cluster = config.cluster > 1;
  if (!config.cooperative && !cluster) return false;
  return error == cudaErrorCooperativeLaunchTooLarge || error == cudaErrorLaunchOutOfResources ||
         error == cudaErrorInvalidClusterSize || error == cudaErrorNotSupported ||
         (config.cooperative && cluster && error == cudaErrorInvalidValue);
}

// The number of clusters of such a launch that the device holds at a time; 0 where it has no such launch.
int max_active_clusters(const void* kernel, const LaunchConfig& config) {
  int clusters = 0;
  if (allow(kernel, config.shared_bytes, config.cluster)) return 0;
  const LaunchWords words(config);
  if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &words.config)) clusters = 0;
  cudaGetLastError();  // a device without clusters reports an error
  return clusters;
}

// Finds the largest cluster size that covers, with one block per SM, at least nine tenths of the SMs that smaller
// clusters cover: a graphics processing cluster may lack a few SMs.
void query_clusters(const void* kernel, DeviceInfo* info) {
  info->largest_cluster = 1;
  info->cluster_sms = 0;
  if (info->capability < 90) return;
  for (int cluster = 2; cluster <= kMaxCluster; cluster *= 2) {
    const int covered =
        cluster * max_active_clusters(kernel, {cluster, kBlockThreads, info->shared_per_block, nullptr, cluster});
    if (covered == 0 || covered * 10 < info->cluster_sms * 9) return;
    info->largest_cluster = cluster;
    info->cluster_sms = covered;
  }
}

// The occupancy of a cooperative launch with clusters says whether there is one. tests/gpu/first.py makes such a
// launch.
bool has_cooperative_clusters(const void* kernel, const DeviceInfo& info) {
  if (!info.cooperative || info.largest_cluster == 1) return false;
  return max_active_clusters(kernel, {2, kBlockThreads, 0, nullptr, 2, true}) > 0;
}

}  // namespace

int launch_kernel(const void* kernel, const LaunchConfig& config, void** arguments) {
  cudaError_t error = allow(kernel, config.shared_bytes, config.cluster);
  if (!error) {
    const LaunchWords words(config);
    error = cudaLaunchKernelExC(&words.config, kernel, arguments);
  }
  if (!refuses_gangs(error, config)) return error;
  cudaGetLastError();  // clears the error, which is handled, so that the next query does not report it
  return kGangRefused + error;
}

int query_device(int device, const void* kernel, DeviceInfo* info) {
  const auto ask = [&](cudaDeviceAttr attribute, auto* value) {
    int answer = 0;
    const cudaError_t error = cudaDeviceGetAttribute(&answer, attribute, device);
    *value = answer;
    return error;
  };
  int major = 0, minor = 0, sm_kilohertz = 0, kilohertz = 0, bus_bits = 0;
  cudaError_t error = ask(cudaDevAttrComputeCapabilityMajor, &major);
  if (!error) error = ask(cudaDevAttrComputeCapabilityMinor, &minor);
  if (!error) error = ask(cudaDevAttrMultiProcessorCount, &info->num_sms);
  if (!error) error = ask(cudaDevAttrClockRate, &sm_kilohertz);
  if (!error) error = ask(cudaDevAttrMaxThreadsPerMultiProcessor, &info->threads_per_sm);
  if (!error) error = ask(cudaDevAttrMaxSharedMemoryPerMultiprocessor, &info->shared_per_sm);
  if (!error) error = ask(cudaDevAttrMaxSharedMemoryPerBlockOptin, &info->shared_per_block);
  if (!error) error = ask(cudaDevAttrL2CacheSize, &info->l2_bytes);
  if (!error) error = ask(cudaDevAttrCooperativeLaunch, &info->cooperative);
  if (!error) error = ask(cudaDevAttrMemoryClockRate, &kilohertz);
  if (!error) error = ask(cudaDevAttrGlobalMemoryBusWidth, &bus_bits);
  if (error) return error;
  info->capability = 10 * major + minor;
  // A virtual device may not tell its clocks; then assume an H200's, and its bandwidth per SM.
  info->clock_mhz = sm_kilohertz > 0 ? sm_kilohertz / 1000 : 1980;
  // Two transfers per clock.
  info->bytes_per_us = int64_t(2) * kilohertz * (bus_bits / 8) / 1000;
  if (info->bytes_per_us <= 0) info->bytes_per_us = int64_t(36000) * info->num_sms;
  query_clusters(kernel, info);
  info->cooperative_clusters = has_cooperative_clusters(kernel, *info);
  return 0;
}

const char* platform_error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace fastnorm::cuda
