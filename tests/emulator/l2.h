// The device's L2: lines of 128 bytes, the least recently used of which makes room. It shows how much a launch finds
// there of the data that another left. It is off unless a test asks for it.
#pragma once

#include <cstdint>
#include <list>
#include <memory>
#include <unordered_map>

namespace fastnorm::emulator {

class L2Model {
 public:
  static constexpr int64_t kLine = 128;

  explicit L2Model(int64_t bytes) : lines_(static_cast<size_t>(bytes / kLine)) {}

  // Bytes of the lines that reads missed.
  uint64_t missed() const { return missed_; }

  void read(const void* p) {
    if (!touch(p)) missed_ += kLine;
  }
  void write(const void* p) { touch(p); }

 private:
  // Whether the line was there.
  bool touch(const void* p) {
    const uintptr_t line = reinterpret_cast<uintptr_t>(p) / kLine;
    const auto found = places_.find(line);
    if (found != places_.end()) {
      order_.splice(order_.begin(), order_, found->second);
      return true;
    }
    order_.push_front(line);
    places_[line] = order_.begin();
    if (order_.size() > lines_) {
      places_.erase(order_.back());
      order_.pop_back();
    }
    return false;
  }

  size_t lines_;
  uint64_t missed_ = 0;
  std::list<uintptr_t> order_;  // the last used first
  std::unordered_map<uintptr_t, std::list<uintptr_t>::iterator> places_;
};

// Null while it is off.
extern std::unique_ptr<L2Model> l2;

}  // namespace fastnorm::emulator
