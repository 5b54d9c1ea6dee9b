// Warps and blocks: the state of running threads.
//
// The lanes of a warp that are at the same instruction carry it out together, as a group. A branch parts a group; where
// groups come to the same instruction they become one again. The group that is farthest behind runs first, but for a
// random choice now and then; one that polls runs after the others.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "defect.h"
#include "happens_before.h"
#include "instruction.h"
#include "shadow.h"

namespace fastnorm::ptx {

class Machine;
class Warp;
struct Cluster;
struct Kernel;

struct Group {
  uint32_t at = 0;  // the next instruction
  Mask lanes = 0;
  uint32_t polls = 0;  // how often it has yielded; who has less goes first

  bool behind(const Group& other) const { return polls != other.polls ? polls < other.polls : at < other.at; }
};

// A copy to shared memory that its thread has not waited for yet.
struct Copy {
  uint32_t place;  // in the block's shared memory
  uint64_t from;
  uint8_t bytes, source_bytes;  // the rest is zeros
  bool landed;
  Stamp began;
};
struct Copies {
  std::vector<Copy> under_way;
  std::vector<size_t> ends;  // of committed groups, in under_way
};

struct Block {
  Machine* machine = nullptr;
  int64_t index = 0;
  Cluster* cluster = nullptr;
  uint32_t rank = 0;  // in the cluster
  int threads = 0;
  std::vector<Warp> warps;
  std::vector<unsigned char> shared;
  std::vector<ShadowWord> shadow;  // of `shared`

  int arrived = 0;  // at the barrier, and which one
  uint32_t barrier = 0;
  int running = 0;  // threads that have not returned
  bool left() const { return running == 0; }

  // Phases of the cluster's barrier: that some thread has waited for, and in which another block has read or written
  // this one's memory. The second has to end before this block does.
  uint32_t waited_phases = 0, remote_phase = 0;
  bool remote_used = false;
};

class Warp {
 public:
  void begin(Block& block, int index);

  // Runs a group until it waits, returns or has done so many instructions.
  void run(int budget);
  bool can_run() const { return !groups_.empty(); }

  Block& block() const { return *block_; }
  Machine& machine() const { return *block_->machine; }
  int thread(int lane) const { return index_ * kLanes + lane; }

  template <class K>
  K* lanes(const Operand& o) {
    return reinterpret_cast<K*>(banks_[o.bank] + o.at);
  }
  uint64_t value(const Operand& o, int lane) { return o.wide ? lanes<uint64_t>(o)[lane] : lanes<uint32_t>(o)[lane]; }
  void set(const Operand& o, int lane, uint64_t value) {
    if (o.is_nothing()) return;
    if (o.wide) {
      lanes<uint64_t>(o)[lane] = value;
    } else {
      lanes<uint32_t>(o)[lane] = static_cast<uint32_t>(value);
    }
  }
  const Operand* elements(const Instruction& i) const;
  Mask truth(const Operand& o) const {
    const Mask value = o.bank == Operand::kConstant ? (o.at ? kAllLanes : 0) : predicates_[o.at];
    return o.negated ? ~value : value;
  }
  void set_truth(const Operand& o, Mask lanes, Mask value) {
    if (o.is_nothing()) return;
    Mask& p = predicates_[o.at];
    p = (p & ~lanes) | (value & lanes);
  }

  unsigned char* local(int lane) { return local_.data() + local_bytes_ * static_cast<size_t>(lane); }
  Copies& copies(int lane) { return copies_[static_cast<size_t>(lane)]; }

  // ---- time (barriers.cpp) ----
  ThreadTime& time(int lane) { return times_[static_cast<size_t>(lane)]; }
  Stamp stamp(int lane) const { return stamps_[static_cast<size_t>(lane)]; }
  void stamp_anew(int lane);
  // What a lane has read of releases, for a fence of that scope to acquire; and what its fences of that scope or a
  // wider one have released.
  PerScope<const Clock*>& seen(int lane) { return seen_[static_cast<size_t>(lane)]; }
  PerScope<const Clock*>& fenced(int lane) { return fenced_[static_cast<size_t>(lane)]; }
  // What another thread knows once it acquires what this one releases now.
  Clock release_clock(int lane);

  [[noreturn]] void fail(int lane, const std::string& text) const {
    throw Defect(text + ", in " + thread_name(block_->index, thread(lane)));
  }
  // Where lanes wait, for the report of a deadlock.
  struct Waiting {
    Group group;
    const char* what;
  };
  std::vector<Waiting> waiting() const;

  // How often a lane has come to the cluster's barrier, and has waited for it.
  std::array<uint32_t, kLanes> cluster_arrivals{}, cluster_waits{};

  bool queued = false;  // in the machine's list of warps that can run
  uint32_t rank = 0;    // order priority: 0 runs first

 private:
  bool meet(const Instruction& i, Group& group, Mask on);
  void regroup(Group& group);
  bool wait_for_block(Group& group, Mask on);
  void pass_block_barrier();
  void arrive_at_cluster(const Instruction& i, Group& group, Mask on);
  void wait_for_cluster(const Instruction& i, Group& group, Mask on);
  void pass_cluster_barrier();
  void check_remote_use(int lane) const;
  void order_lanes(Mask lanes);
  void leave(Group& group, Mask on);
  void park(Group group) {
    if (group.lanes != 0) groups_.push_back(group);
  }
  Group take_group();
  void execute(Group& group, int budget);

  Block* block_ = nullptr;
  int index_ = 0;
  Mask present_ = 0, returned_ = 0;
  std::vector<Group> groups_;
  Group meeting_, at_barrier_;
  std::vector<Group> at_cluster_;

  std::array<uint32_t*, 3> banks_{};
  std::vector<uint32_t> registers_;
  std::vector<uint32_t> special_;
  std::vector<Mask> predicates_;
  std::vector<unsigned char> local_;
  size_t local_bytes_ = 0;
  std::array<Copies, kLanes> copies_;
  std::array<ThreadTime, kLanes> times_;
  std::array<Stamp, kLanes> stamps_;
  std::array<PerScope<const Clock*>, kLanes> seen_{}, fenced_{};
};

}  // namespace fastnorm::ptx
