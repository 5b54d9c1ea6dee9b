// Plans of earlier calls, and the options that calls are planned with. A plan is a pure function of its key; making one
// compares some hundred ways to launch.
#pragma once

#include <cstdint>
#include <mutex>
#include <type_traits>
#include <unordered_map>

#include "plan/types.h"

namespace fastnorm::ops {

// The options of this process's CUDA calls. A call reads them once, so that its key and its plan agree.
class SharedOptions {
 public:
  PlanOptions get() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return options_;
  }
  void set(const PlanOptions& options) {
    const std::lock_guard<std::mutex> lock(mutex_);
    options_ = options;
  }

 private:
  mutable std::mutex mutex_;
  PlanOptions options_;
};
inline SharedOptions& shared_options() {
  static SharedOptions options;
  return options;
}

// All that a plan is made from. Needs: ForwardNeeds or BackwardNeeds.
template <class Needs>
struct PlanKey {
  Geometry geometry;
  DType dtype;
  Needs needs;
  int device_index;  // one that is shared goes by plans without gangs, and its twin does not
  DeviceInfo device;
  PlanOptions options;

  bool operator==(const PlanKey&) const = default;
};
template <class Needs>
auto fields(const PlanKey<Needs>& key) {
  const auto& [geometry, dtype, needs, device_index, device, options] = key;
  return std::tie(geometry, dtype, needs, device_index, device, options);
}

// Over every field, and the fields of fields.
struct FieldsHash {
  template <class T>
  size_t operator()(const T& value) const {
    uint64_t hash = 0;
    mix(hash, value);
    return static_cast<size_t>(hash);
  }

 private:
  template <class T>
  static void mix(uint64_t& hash, const T& value) {
    if constexpr (std::is_class_v<T>) {
      std::apply([&](const auto&... field) { (mix(hash, field), ...); }, fields(value));
    } else {
      static_assert(std::is_integral_v<T> || std::is_enum_v<T>);
      hash = (hash ^ static_cast<uint64_t>(value)) * 0x9e3779b97f4a7c15u;
      hash ^= hash >> 29;
    }
  }
};

template <class Plan, class Needs>
class PlanCache {
 public:
  using Key = PlanKey<Needs>;

  // The plan of `key`, made by make(key) where no call had it before.
  template <class Make>
  Plan get(const Key& key, Make make) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto found = plans_.find(key);
      if (found != plans_.end()) return found->second;
    }
    const Plan plan = make(key);
    put(key, plan);
    return plan;
  }

  void put(const Key& key, const Plan& plan) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (plans_.size() >= kMost) plans_.clear();
    plans_.insert_or_assign(key, plan);
  }

 private:
  static constexpr size_t kMost = 4096;  // shapes that never come again do not fill the memory

  std::mutex mutex_;
  std::unordered_map<Key, Plan, FieldsHash> plans_;
};

}  // namespace fastnorm::ops
