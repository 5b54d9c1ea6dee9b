// The global memory that a launch may access: the tensors of its call, and what its allocations are.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

namespace fastnorm::ptx {

class Allocations {
 public:
  void add(uint64_t begin, uint64_t bytes) {
    if (bytes > 0) all_.push_back({begin, begin + bytes});
  }
  void remove(uint64_t begin) {
    const auto last = std::find_if(all_.rbegin(), all_.rend(), [&](const Range& r) { return r.begin == begin; });
    if (last != all_.rend()) all_.erase(std::next(last).base());
    latest_ = 0;
  }

  bool hold(uint64_t address, uint64_t bytes) {
    if (latest_ < all_.size() && all_[latest_].hold(address, bytes)) return true;
    const auto found = std::find_if(all_.begin(), all_.end(), [&](const Range& r) { return r.hold(address, bytes); });
    if (found == all_.end()) return false;
    latest_ = static_cast<size_t>(found - all_.begin());
    return true;
  }

  // Where an address lies that they do not hold: "4 bytes past the end of one of 4096 bytes".
  std::string nearest(uint64_t address) const {
    std::string text = "there are none";
    uint64_t least = UINT64_MAX;
    for (const Range& r : all_) {
      const bool before = address < r.begin;
      const uint64_t distance = before ? r.begin - address : address - std::min(address, r.end);
      if (distance >= least) continue;
      least = distance;
      text = std::to_string(distance) + (before ? " bytes before the beginning" : " bytes past the end") +
             " of one of " + std::to_string(r.end - r.begin) + " bytes";
    }
    return text;
  }

 private:
  struct Range {
    uint64_t begin, end;
    bool hold(uint64_t address, uint64_t bytes) const { return address >= begin && address + bytes <= end; }
  };
  std::vector<Range> all_;
  size_t latest_ = 0;  // the one that held the last access
};

}  // namespace fastnorm::ptx
