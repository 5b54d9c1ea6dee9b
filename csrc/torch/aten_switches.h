// Which of aten's own norms our kernels answer, and how often they have: `fastnorm.enable`. Without torch's headers,
// for module.cpp.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <map>
#include <mutex>
#include <string>

namespace fastnorm::ops {

enum class AtenNorm : int { kBatch, kGroup, kLayer };
enum class AtenDevice : int { kCpu, kCuda };
constexpr std::array kAtenNorms{AtenNorm::kBatch, AtenNorm::kGroup, AtenNorm::kLayer};
constexpr std::array kAtenDevices{AtenDevice::kCpu, AtenDevice::kCuda};
constexpr const char* name_of(AtenNorm norm) {
  constexpr const char* names[] = {"batch_norm", "group_norm", "layer_norm"};
  return names[static_cast<int>(norm)];
}
constexpr const char* name_of(AtenDevice device) { return device == AtenDevice::kCpu ? "cpu" : "cuda"; }

// The calls of one norm on one device. Forward and backward are calls of their own.
class AtenSwitch {
 public:
  bool is_on() const { return on_.load(std::memory_order_relaxed); }
  void set(bool on) { on_.store(on, std::memory_order_relaxed); }

  void count_served() { served_.fetch_add(1, std::memory_order_relaxed); }
  int64_t served() const { return served_.load(std::memory_order_relaxed); }

  // A call that torch's kernel answered although the switch is on.
  void count_left(std::string why) {
    const std::lock_guard lock(mutex_);
    if (left_.size() < kReasons || left_.contains(why)) {
      ++left_[std::move(why)];
    } else {
      ++left_["(other reasons)"];
    }
  }
  std::map<std::string, int64_t> left() const {
    const std::lock_guard lock(mutex_);
    return left_;
  }

 private:
  static constexpr size_t kReasons = 64;  // texts hold sizes: a program of many shapes must not fill the memory
  std::atomic<bool> on_{false};
  std::atomic<int64_t> served_{0};
  mutable std::mutex mutex_;
  std::map<std::string, int64_t> left_;
};

inline AtenSwitch& aten_switch(AtenNorm norm, AtenDevice device) {
  static AtenSwitch switches[kAtenNorms.size()][kAtenDevices.size()];
  return switches[static_cast<int>(norm)][static_cast<int>(device)];
}

// Registers the kernels of aten_norms.cpp and aten_sync.cpp, once. They stay, and ask the switches at every call: the
// dispatcher's table may be added to while other threads call, and not taken from.
void register_aten_kernels();

}  // namespace fastnorm::ops
