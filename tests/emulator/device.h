// The devices a launch can pretend to run on. The small ones make a plan split what a large one would take in one
// piece.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "plan_cuda.h"

namespace fastnorm::emulator {

inline DeviceInfo device_named(const std::string& name) {
  constexpr int64_t kKiB = 1 << 10, kMiB = 1 << 20;
  //                             capability, multiprocessors, threads, shared per multiprocessor, per block, L2
  if (name == "tiny") return {90, 4, 1024, 16 * kKiB, 16 * kKiB, 64 * kKiB};
  if (name == "small") return {75, 8, 1024, 64 * kKiB, 48 * kKiB, kMiB};
  if (name == "h200") return {90, 132, 2048, 228 * kKiB, 227 * kKiB, 60 * kMiB};
  throw std::runtime_error("emulator: no device named " + name + "; there are tiny, small, h200");
}

// Portable cluster size; more needs leave that launch() of platform.cuh does not ask for.
inline int largest_cluster(const DeviceInfo& device) { return device.capability >= 90 ? 8 : 1; }

// Blocks that are resident at the same time; registers, which the emulator does not know, may allow fewer.
inline int64_t resident_blocks(const DeviceInfo& device, int threads, int64_t shared_bytes) {
  const int64_t reserved = device.capability >= 80 ? 1 << 10 : 0;  // shared memory of every block that CUDA keeps
  const int64_t by_threads = device.threads_per_multiprocessor / threads;
  const int64_t by_shared = device.shared_per_multiprocessor / std::max<int64_t>(shared_bytes + reserved, 1);
  return device.multiprocessors * std::min(by_threads, by_shared);
}

}  // namespace fastnorm::emulator
