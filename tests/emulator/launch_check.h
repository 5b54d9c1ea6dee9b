// Launches that CUDA would refuse: errors of a plan.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/platform.cuh"

namespace fastnorm::emulator {

inline void check_launch(const cuda::LaunchConfig& config, const DeviceInfo& device) {
  const auto refuse = [](const std::string& text) { throw std::runtime_error("emulator: launch refused: " + text); };
  const auto number = [](int64_t v) { return std::to_string(v); };
  if (config.threads < 1 || config.threads > 1024) refuse(number(config.threads) + " threads a block");
  if (config.blocks < 1 || config.blocks > INT32_MAX) refuse(number(config.blocks) + " blocks");
  if (config.shared_bytes < 0 || config.shared_bytes > device.shared_per_block) {
    refuse(number(config.shared_bytes) + " bytes of shared memory; a block has " + number(device.shared_per_block));
  }
  if (config.cluster < 1 || config.cluster > device.largest_cluster || config.blocks % config.cluster != 0) {
    refuse(number(config.blocks) + " blocks in clusters of " + number(config.cluster) + "; a cluster has at most " +
           number(device.largest_cluster));
  }
  if (!config.cooperative) return;
  if (!device.cooperative) refuse("cooperative, on a device without cooperative launches");
  if (config.cluster > 1 && !device.cooperative_clusters) refuse("cooperative with clusters, which the device has not");
  const int64_t resident = co_resident_blocks(device, config.threads, config.shared_bytes, config.cluster);
  if (config.blocks > resident) {
    refuse("cooperative, with " + number(config.blocks) + " blocks where " + number(resident) + " are resident");
  }
}

// The device's answer to a launch that is no defect: 0, or the error that cuda::launch returns.
inline int answer_of(Refusals& refusals, const cuda::LaunchConfig& config) {
  const bool cluster = config.cluster > 1, gang = config.cooperative || cluster;
  if (refusals.capture_ended) return kCaptureEnded;
  switch (refusals.kind) {
    case Refuses::kNothing: return 0;
    case Refuses::kCooperativeClusters: return config.cooperative && cluster ? cuda::kGangRefused + kInvalidValue : 0;
    case Refuses::kGangsInCapture: refusals.capture_ended = gang; [[fallthrough]];
    default: return gang ? cuda::kGangRefused + kCooperativeTooLarge : 0;
  }
}

}  // namespace fastnorm::emulator
