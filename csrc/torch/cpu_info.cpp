// The sizes of the caches, for the planner.
#include <cstdio>
#include <cstdlib>
#include <string>

#include "tensor_args.h"

namespace fastnorm::ops {

namespace {

// The size of cache index of the first processor, as Linux tells it; `otherwise` where it does not. (sysconf gave 384
// MiB for an L3 of 32 on a virtual machine: it multiplies by the host's sockets.)
int64_t cache_bytes(int index, int64_t otherwise) {
  const std::string path = "/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index) + "/size";
  long size = 0;
  char unit = ' ';
  if (std::FILE* file = std::fopen(path.c_str(), "r")) {
    if (std::fscanf(file, "%ld%c", &size, &unit) < 1) size = 0;
    std::fclose(file);
  }
  if (size <= 0) return otherwise;
  return static_cast<int64_t>(size) << (unit == 'K' ? 10 : unit == 'M' ? 20 : 0);
}

}  // namespace

CpuInfo cpu_info(int threads) {
  // FASTNORM_CACHE_BYTES="l2,l3": for tests and tuning.
  static const CpuInfo caches = [] {
    CpuInfo info{cache_bytes(2, int64_t(512) << 10), cache_bytes(3, int64_t(16) << 20), 1};
    long l2 = 0, l3 = 0;
    const char* given = std::getenv("FASTNORM_CACHE_BYTES");
    if (given != nullptr && std::sscanf(given, "%ld,%ld", &l2, &l3) == 2 && l2 > 0 && l3 > 0) {
      info.l2_bytes = l2;
      info.l3_bytes = l3;
    }
    return info;
  }();
  return {caches.l2_bytes, caches.l3_bytes, threads};
}

}  // namespace fastnorm::ops
