// Plans of calls that were made before: a plan is a pure function of its arguments, and compares some hundred ways.
#pragma once

#include <algorithm>
#include <array>
#include <mutex>
#include <unordered_map>

#include "plan/types.h"

namespace fastnorm::ops {

// All that plans are made of, as numbers.
using PlanKey = std::array<int64_t, 29>;

inline PlanKey plan_key(const Geometry& g, DType dtype, const std::array<int64_t, 5>& needs, const DeviceInfo& device,
                        const PlanOptions& options) {
  const Forced& f = options.forced;
  PlanKey key{static_cast<int64_t>(g.kind),
              g.N,
              g.C,
              g.S,
              g.G,
              g.channels_last,
              static_cast<int64_t>(dtype),
              options.free_sms,
              f.strategy,
              f.gang,
              f.pieces,
              f.stages,
              f.blocks_per_sm,
              f.tile_bytes};
  const auto facts = facts_of(device);
  std::copy(facts.begin(), facts.end(), std::copy(needs.begin(), needs.end(), key.begin() + 14));
  return key;
}

template <class Plan>
class PlanCache {
 public:
  template <class Make>
  Plan get(const PlanKey& key, Make make) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto found = plans_.find(key);
      if (found != plans_.end()) return found->second;
    }
    const Plan plan = make();
    put(key, plan);
    return plan;
  }

  void put(const PlanKey& key, const Plan& plan) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (plans_.size() >= kMost) plans_.clear();
    plans_.insert_or_assign(key, plan);
  }

 private:
  static constexpr size_t kMost = 4096;  // shapes that never come again do not fill the memory

  struct Hash {
    size_t operator()(const PlanKey& key) const {
      uint64_t hash = 0;
      for (const int64_t word : key) {
        hash = (hash ^ static_cast<uint64_t>(word)) * 0x9e3779b97f4a7c15u;
        hash ^= hash >> 29;
      }
      return static_cast<size_t>(hash);
    }
  };
  std::mutex mutex_;
  std::unordered_map<PlanKey, Plan, Hash> plans_;
};

}  // namespace fastnorm::ops
