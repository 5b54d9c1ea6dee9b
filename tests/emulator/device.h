// The devices that a launch can pretend to run on. On the small ones a plan splits work that a large one would take in
// one piece. On `few` gangs share the whole device; on `alone` blocks cannot wait for each other; on `wide` two SMs
// have room for long pieces, in several waves.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "plan/types.h"

namespace fastnorm::emulator {

inline DeviceInfo device_named(const std::string& name) {
  constexpr int64_t kKiB = 1 << 10, kMiB = 1 << 20;
  // capability, SMs, their clock, threads and shared memory per SM, shared memory per block, L2, bandwidth, clusters,
  // cooperative, with clusters
  if (name == "tiny") return {90, 4, 1000, 1024, 16 * kKiB, 16 * kKiB, 64 * kKiB, 100'000, 4, 4, true, true};
  if (name == "few") return {90, 4, 1000, 1024, 40 * kKiB, 39 * kKiB, 64 * kKiB, 100'000, 4, 4, true, true};
  if (name == "alone") return {80, 4, 1000, 1024, 40 * kKiB, 39 * kKiB, 64 * kKiB, 100'000, 1, 0, false, false};
  if (name == "small") return {75, 8, 1500, 1024, 64 * kKiB, 48 * kKiB, kMiB, 320'000, 1, 0, true, false};
  if (name == "wide") return {90, 2, 1000, 256, 456 * kKiB, 227 * kKiB, 64 * kKiB, 100'000, 2, 2, true, true};
  if (name == "h200") return {90, 132, 1980, 2048, 228 * kKiB, 227 * kKiB, 60 * kMiB, 4'800'000, 16, 128, true, true};
  throw std::runtime_error("emulator: no device named " + name + "; there are tiny, few, alone, small, wide, h200");
}

// The blocks, in clusters of so many, that are resident at the same time. Registers, which the emulator does not know,
// may allow fewer.
inline int64_t co_resident_blocks(const DeviceInfo& device, int threads, int64_t shared_bytes, int cluster) {
  const int64_t reserved = device.capability >= 80 ? 1 << 10 : 0;  // CUDA keeps so much of every block's shared memory
  const int64_t by_threads = device.threads_per_sm / threads;
  const int64_t unit = device.capability >= 80 ? 128 : 256;  // an SM gives shared memory out in units
  const int64_t taken = (shared_bytes + reserved + unit - 1) / unit * unit;
  const int64_t by_shared = device.shared_per_sm / std::max<int64_t>(taken, 1);
  const int64_t per_sm = std::min(by_threads, by_shared);
  if (cluster == 1) return device.num_sms * per_sm;
  const int64_t places = device.cluster_sms / device.largest_cluster;  // of the largest cluster
  return places * (device.largest_cluster * per_sm / cluster) * cluster;
}

}  // namespace fastnorm::emulator
