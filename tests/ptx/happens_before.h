// Which accesses happen before which: clocks of threads, joined by barriers and by release and acquire.
//
// A thread's time has two parts. `epoch` counts the barriers of its block and cluster that it has come to, and `step`
// those of its warp and its releases. All threads of a block leave a barrier with the same epoch. So what a thread
// knows of its own block is one number: every access of an earlier epoch happened before. What it knows of other blocks
// is a number each, in a Clock, which it gets by waiting for a cluster or by an acquire. A Clock also names single
// warps and threads, because a release without a barrier before it covers no more than the thread that does it.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <deque>
#include <unordered_map>
#include <vector>

#include "scope.h"

namespace fastnorm::ptx {

// When and by whom memory was accessed, in 64 bits; 0 is never.
class Stamp {
 public:
  enum Kind : uint64_t { kPlain, kCopying, kConstant, kElsewhere };
  static constexpr int64_t kMostBlocks = 1 << 18, kMostEpochs = 1 << 17;

  Stamp() = default;
  explicit Stamp(uint64_t bits) : bits_(bits) {}
  Stamp(uint32_t block, uint32_t thread, uint32_t epoch, uint32_t step)
      : bits_(uint64_t{block} << 46 | uint64_t{thread} << 36 | uint64_t{epoch} << 17 | step) {}

  uint64_t bits() const { return bits_; }
  bool is_never() const { return bits_ == 0; }
  uint32_t block() const { return static_cast<uint32_t>(bits_ >> 46); }
  uint32_t thread() const { return bits_ >> 36 & 0x3ff; }
  uint32_t warp() const { return thread() / 32; }
  Kind kind() const { return static_cast<Kind>(bits_ >> 34 & 3); }
  uint32_t epoch() const { return bits_ >> 17 & 0x1ffff; }
  uint32_t step() const { return bits_ & 0x1ffff; }
  uint32_t index() const { return static_cast<uint32_t>(bits_); }  // kElsewhere

  Stamp as(Kind kind) const { return Stamp((bits_ & ~(uint64_t{3} << 34)) | uint64_t{kind} << 34); }
  static Stamp elsewhere(uint32_t index) { return Stamp(uint64_t{kElsewhere} << 34 | index); }
  bool same_thread(Stamp other) const { return bits_ >> 36 == other.bits_ >> 36; }
  bool same_warp(Stamp other) const { return bits_ >> 41 == other.bits_ >> 41; }

 private:
  uint64_t bits_ = 0;
};

// What is known of other blocks. Of block b: all accesses of epochs below blocks[b].
struct Clock {
  // Of a thread, or of all threads of a warp: all accesses of steps below `step`.
  struct Part {
    uint64_t whose;
    uint32_t step;
  };
  std::vector<uint32_t> blocks;
  std::vector<Part> parts;  // ascending

  static uint64_t thread_of(Stamp s) { return s.bits() >> 36 << 1; }
  static uint64_t lane_of(Stamp s, uint32_t lane) { return (s.bits() >> 41 << 5 | lane) << 1; }  // of s's warp
  static uint64_t warp_of(Stamp s) { return s.bits() >> 41 << 6 | 1; }

  bool is_empty() const { return blocks.empty() && parts.empty(); }
  uint32_t of_block(uint32_t block) const { return block < blocks.size() ? blocks[block] : 0; }
  uint32_t of_part(uint64_t whose) const {
    const auto at = std::lower_bound(parts.begin(), parts.end(), whose, before);
    return at != parts.end() && at->whose == whose ? at->step : 0;
  }
  bool knows(Stamp s) const {
    return s.epoch() < of_block(s.block()) || s.step() < of_part(thread_of(s)) || s.step() < of_part(warp_of(s));
  }
  bool knows(const Clock& other) const {
    for (uint32_t b = 0; b < other.blocks.size(); ++b) {
      if (other.blocks[b] > of_block(b)) return false;
    }
    return std::all_of(other.parts.begin(), other.parts.end(),
                       [&](const Part& part) { return part.step <= of_part(part.whose); });
  }

  void learn(uint32_t block, uint32_t epoch) {
    if (block >= blocks.size()) blocks.resize(block + 1);
    blocks[block] = std::max(blocks[block], epoch);
  }
  void learn_part(uint64_t whose, uint32_t step) {
    const auto at = std::lower_bound(parts.begin(), parts.end(), whose, before);
    if (at != parts.end() && at->whose == whose) {
      at->step = std::max(at->step, step);
    } else {
      parts.insert(at, {whose, step});
    }
  }
  void join(const Clock& other) {
    if (other.blocks.size() > blocks.size()) blocks.resize(other.blocks.size());
    for (size_t b = 0; b < other.blocks.size(); ++b) blocks[b] = std::max(blocks[b], other.blocks[b]);
    for (const Part& part : other.parts) learn_part(part.whose, part.step);
  }

 private:
  static bool before(const Part& part, uint64_t whose) { return part.whose < whose; }
};

// A thread's own time and what it knows. The clock belongs to the launch; null knows nothing.
struct ThreadTime {
  uint32_t epoch = 1, step = 1;
  uint32_t known_epoch = 1, known_step = 1;  // of its own block and its own warp
  const Clock* clock = nullptr;

  // Whether the access happened before. me: this thread now.
  bool knows(Stamp s, Stamp me) const {
    if (s.block() == me.block()) {
      if (s.thread() == me.thread() || s.epoch() < known_epoch) return true;
      if (s.warp() == me.warp() && s.step() < known_step) return true;
    }
    return clock != nullptr && clock->knows(s);
  }
  // Whether accesses of several lanes of a warp did, s being the latest of them.
  bool knows_lanes(Stamp s, uint32_t lanes, Stamp me) const {
    if (s.block() == me.block() && s.epoch() < known_epoch) return true;
    if (s.same_warp(me) && s.step() < known_step) return true;
    if (clock != nullptr && (s.epoch() < clock->of_block(s.block()) || s.step() < clock->of_part(Clock::warp_of(s)))) {
      return true;
    }
    for (uint32_t left = lanes; left != 0; left &= left - 1) {
      const auto lane = static_cast<uint32_t>(std::countr_zero(left));
      const uint64_t whose = Clock::lane_of(s, lane);
      if (whose != Clock::thread_of(me) && (clock == nullptr || s.step() >= clock->of_part(whose))) return false;
    }
    return true;
  }
};

// What releases have left at memory, for those that acquire it; and all clocks of the threads that run.
class Releases {
 public:
  // What threads of a group may acquire there, the groups of each scope being numbered; null where there is nothing.
  const Clock* at(uint64_t address, Scope scope, uint32_t group) const {
    const auto found = left_.find(address);
    if (found == left_.end()) return nullptr;
    const auto left = std::find_if(found->second.begin(), found->second.end(),
                                   [&](const Left& l) { return l.scope == scope && l.group == group; });
    return left == found->second.end() ? nullptr : &left->clock;
  }
  // A write that leaves this for the threads of a group, besides what lies there.
  void add(uint64_t address, Scope scope, uint32_t group, const Clock& clock) {
    if (clock.is_empty()) return;
    std::vector<Left>& all = left_[address];
    const auto left =
        std::find_if(all.begin(), all.end(), [&](const Left& l) { return l.scope == scope && l.group == group; });
    if (left == all.end()) {
      all.push_back({scope, group, clock});
    } else {
      left->clock.join(clock);
    }
  }
  // A write that does not continue what was released before, as a read-modify-write does.
  void end(uint64_t address) { left_.erase(address); }

  // What a thread that knows `mine` knows after it has acquired `there`.
  const Clock* acquired(const Clock* mine, const Clock* there) {
    if (there == nullptr || (mine != nullptr && mine->knows(*there))) return mine;
    Clock both = *there;
    if (mine != nullptr) both.join(*mine);
    return keep(std::move(both));
  }
  // What two threads know together. Those that ask for the same two right after each other share the answer.
  const Clock* joined(const Clock* a, const Clock* b) {
    if (a == b || b == nullptr) return a;
    if (a == nullptr) return b;
    if (a == last_a_ && b == last_b_) return last_;
    last_a_ = a, last_b_ = b;
    return last_ = acquired(a, b);
  }
  const Clock* keep(Clock clock) {
    kept_.push_back(std::move(clock));
    return &kept_.back();
  }
  // Once no thread has a clock.
  void forget_clocks() {
    kept_.clear();
    last_a_ = last_b_ = last_ = nullptr;
  }

 private:
  struct Left {
    Scope scope;
    uint32_t group;
    Clock clock;
  };
  std::unordered_map<uint64_t, std::vector<Left>> left_;
  std::deque<Clock> kept_;
  const Clock *last_a_ = nullptr, *last_b_ = nullptr, *last_ = nullptr;
};

}  // namespace fastnorm::ptx
