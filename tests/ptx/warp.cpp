// How a warp runs: its groups of lanes, branches, and meetings of its lanes. Barriers are in barriers.cpp.
#include "warp.h"

#include <algorithm>
#include <bit>

#include "machine.h"
#include "names.h"

namespace fastnorm::ptx {

namespace {

constexpr uint32_t kUninitialized = 0xffffffffu;  // NaN

// The lowest lane of a mask, which must not be empty.
int first_lane(Mask lanes) { return std::countr_zero(lanes); }

}  // namespace

const Operand* Warp::elements(const Instruction& i) const { return &machine().kernel().elements[i.first_element]; }

void Warp::begin(Block& block, int index) {
  block_ = &block;
  index_ = index;
  const Machine& m = machine();
  const Kernel& kernel = m.kernel();
  const int threads = std::min(kLanes, block.threads - index * kLanes);
  present_ = threads == kLanes ? kAllLanes : (Mask{1} << threads) - 1;
  returned_ = 0;
  groups_.assign(1, {0, present_});
  meeting_ = at_barrier_ = {};
  at_cluster_.clear();
  registers_.assign(kernel.register_words, kUninitialized);
  predicates_.assign(std::max<size_t>(kernel.predicates, 1), 0);
  local_bytes_ = static_cast<size_t>(kernel.local_bytes);
  local_.assign(local_bytes_ * kLanes, 0xff);
  for (Copies& copies : copies_) copies = {};
  times_.fill({});
  seen_.fill({});
  fenced_.fill({});
  cluster_arrivals.fill(0);
  cluster_waits.fill(0);
  for (int lane = 0; lane < kLanes; ++lane) stamp_anew(lane);

  special_.resize(static_cast<size_t>(Special::kCount) * kLanes);
  const auto set = [&](Special s, uint32_t value, uint32_t step = 0) {
    for (uint32_t lane = 0; lane < kLanes; ++lane) {
      special_[static_cast<size_t>(s) * kLanes + lane] = value + step * lane;
    }
  };
  const auto each = [&](Special s, auto of_lane) {
    for (uint32_t lane = 0; lane < kLanes; ++lane) special_[static_cast<size_t>(s) * kLanes + lane] = of_lane(lane);
  };
  const LaunchShape& shape = m.shape();
  const auto u32 = [](int64_t v) { return static_cast<uint32_t>(v); };
  for (const Special s : {Special::kTidY, Special::kTidZ, Special::kCtaidY, Special::kCtaidZ}) set(s, 0);
  for (const Special s : {Special::kNtidY, Special::kNtidZ, Special::kNctaidY, Special::kNctaidZ}) set(s, 1);
  set(Special::kTidX, u32(index) * kLanes, 1);
  set(Special::kNtidX, u32(shape.threads));
  set(Special::kCtaidX, u32(block.index));
  set(Special::kNctaidX, u32(shape.blocks));
  set(Special::kClusterCtarank, block.rank);
  set(Special::kClusterCtaidX, block.rank);
  set(Special::kClusterNctarank, u32(shape.cluster));
  set(Special::kClusterNctaidX, u32(shape.cluster));
  set(Special::kClusteridX, u32(block.index / shape.cluster));
  set(Special::kNclusteridX, u32(shape.blocks / shape.cluster));
  set(Special::kLaneid, 0, 1);
  set(Special::kWarpid, u32(index));
  set(Special::kNwarpid, u32((shape.threads + kLanes - 1) / kLanes));
  set(Special::kSmid, 0);
  each(Special::kLanemaskEq, [](uint32_t lane) { return 1u << lane; });
  each(Special::kLanemaskLt, [](uint32_t lane) { return (1u << lane) - 1; });
  each(Special::kLanemaskLe, [](uint32_t lane) { return (2u << lane) - 1; });
  each(Special::kLanemaskGt, [](uint32_t lane) { return ~((2u << lane) - 1); });
  each(Special::kLanemaskGe, [](uint32_t lane) { return ~((1u << lane) - 1); });
  const uint64_t workspace = shape.cooperative ? reinterpret_cast<uint64_t>(m.grid_workspace_) : 0;
  set(Special::kEnvreg1, static_cast<uint32_t>(workspace >> 32));
  set(Special::kEnvreg2, static_cast<uint32_t>(workspace));
  set(Special::kDynamicSmemSize, u32(shape.shared_bytes));
  banks_ = {registers_.data(), const_cast<uint32_t*>(kernel.constants.data()), special_.data()};
}

// The group that is farthest behind, or any.
Group Warp::take_group() {
  size_t taken = 0;
  if (groups_.size() > 1) {
    const uint64_t drawn = machine().random();
    if (machine().options().order != emulator::Order::kFifo && drawn % 16 == 0) {
      taken = drawn / 16 % groups_.size();
    } else {
      for (size_t g = 1; g < groups_.size(); ++g) {
        if (groups_[g].behind(groups_[taken])) taken = g;
      }
    }
  }
  const Group group = groups_[taken];
  groups_[taken] = groups_.back();
  groups_.pop_back();
  return group;
}

// Joins the groups at the same instruction, and lets another run first that is farther behind.
void Warp::regroup(Group& group) {
  bool behind = false;
  for (size_t g = 0; g < groups_.size();) {
    if (groups_[g].at == group.at) {
      group.lanes |= groups_[g].lanes;
      group.polls = std::max(group.polls, groups_[g].polls);
      groups_[g] = groups_.back();
      groups_.pop_back();
    } else {
      behind |= groups_[g++].behind(group);
    }
  }
  if (!behind) return;
  park(group);
  group = take_group();
}

void Warp::run(int budget) {
  Group group = take_group();
  try {
    execute(group, budget);
  } catch (const Defect& defect) {
    const Kernel& kernel = machine().kernel();
    throw Defect(std::string(defect.what()) + ": " + kernel.texts[kernel.code[group.at].text] + ", in " + kernel.name);
  }
}

void Warp::execute(Group& group, int budget) {
  Machine& m = machine();
  const Instruction* const code = m.kernel().code.data();
  InstructionCount* const counts = m.counts_.data();
  while (group.lanes != 0 && budget-- > 0) {
    if (code[group.at].begins_block && !groups_.empty()) regroup(group);
    const Instruction& i = code[group.at];
    const Mask on = i.guard.is_nothing() ? group.lanes : group.lanes & truth(i.guard);
    InstructionCount& count = counts[group.at];
    count.issued += 1;
    count.threads += static_cast<uint64_t>(std::popcount(group.lanes));
    count.enabled += static_cast<uint64_t>(std::popcount(on));
    switch (i.flow) {
      case Flow::kNext:
        if (on != 0) i.run(*this, i, on);
        ++group.at;
        break;
      case Flow::kBranch:
        if (on == group.lanes) {
          group.at = i.target;
        } else {
          ++group.at;
          if (on != 0) {
            park({i.target, on, group.polls});
            group.lanes &= ~on;
          }
        }
        break;
      case Flow::kIndexed: {
        const std::vector<uint32_t>& targets = m.kernel().targets[i.target];
        for (Mask left = on; left != 0;) {
          const uint64_t index = value(i.in[0], first_lane(left));
          if (index >= targets.size()) fail(first_lane(left), "an index without a target");
          Mask same = 0;
          for (Mask rest = left; rest != 0; rest &= rest - 1) {
            if (value(i.in[0], first_lane(rest)) == index) same |= rest & -rest;
          }
          park({targets[index], same, group.polls});
          left &= ~same;
        }
        group = {group.at + 1, group.lanes & ~on, group.polls};
        break;
      }
      case Flow::kExit: leave(group, on); break;
      case Flow::kTrap:
        if (on != 0) fail(first_lane(on), "a trap");
        ++group.at;
        break;
      case Flow::kMeeting:
        if (!meet(i, group, on)) return;
        break;
      case Flow::kBlockBarrier:
        if (wait_for_block(group, on)) return;
        break;
      case Flow::kClusterArrive: arrive_at_cluster(i, group, on); break;
      case Flow::kClusterWait: wait_for_cluster(i, group, on); break;
      case Flow::kYield:
        if (on != 0) i.run(*this, i, on);
        ++group.at;
        ++group.polls;
        park(group);
        m.note_poll();
        return;
    }
  }
  park(group);
}

// Lanes wait at an instruction for those that still come; the last to come carries it out for all. Returns false where
// the group waits.
bool Warp::meet(const Instruction& i, Group& group, Mask on) {
  if (on == 0) {
    ++group.at;
    return true;
  }
  const bool barrier = i.mode == 1 && i.out[0].is_nothing() && i.out[1].is_nothing();
  for (Mask left = on; left != 0; left &= left - 1) {
    const auto named = static_cast<Mask>(value(i.in[4], first_lane(left)));
    if (barrier ? (named & present_) == present_ : named == kAllLanes && present_ == kAllLanes) continue;
    fail(first_lane(left), "not all lanes of the warp are to take part");
  }
  if (meeting_.lanes != 0 && meeting_.at != group.at) {
    fail(first_lane(on), "divergent: " + thread_name(block_->index, thread(first_lane(meeting_.lanes))) + " waits at " +
                             machine().kernel().texts[machine().kernel().code[meeting_.at].text]);
  }
  meeting_ = {group.at, meeting_.lanes | on};
  if (Mask others = group.lanes & ~on; others != 0) park({group.at + 1, others});
  if (!barrier && returned_ != 0) {
    fail(first_lane(on), thread_name(block_->index, thread(first_lane(returned_))) + " has returned and takes no part");
  }
  if ((meeting_.lanes | returned_) != present_) {
    group.lanes = 0;
    return !groups_.empty() ? (group = take_group(), true) : false;
  }
  group = {meeting_.at + 1, meeting_.lanes};
  meeting_ = {};
  if (barrier) {
    order_lanes(group.lanes);
  } else {
    i.run(*this, i, group.lanes);
  }
  return true;
}

void Warp::leave(Group& group, Mask on) {
  for (Mask left = on; left != 0; left &= left - 1) {
    const int lane = first_lane(left);
    if (const size_t count = copies(lane).under_way.size(); count > 0) {
      fail(lane, "returned with unfinished copies to shared memory, " + std::to_string(count) + " of them");
    }
  }
  if (on != 0 && meeting_.lanes != 0 && !machine().kernel().code[meeting_.at].out[0].is_nothing()) {
    fail(first_lane(on), "returned while " + thread_name(block_->index, thread(first_lane(meeting_.lanes))) +
                             " waits for it at " + machine().kernel().texts[machine().kernel().code[meeting_.at].text]);
  }
  if (on != 0 && block_->running == std::popcount(on)) check_remote_use(first_lane(on));
  returned_ |= on;
  group.lanes &= ~on;
  ++group.at;
  machine().note_progress();
  block_->running -= std::popcount(on);
  // A barrier of the warp needs only the lanes that are left.
  if (meeting_.lanes != 0 && (meeting_.lanes | returned_) == present_) {
    order_lanes(meeting_.lanes);
    park({meeting_.at + 1, meeting_.lanes});
    meeting_ = {};
  }
  if (group.lanes == 0 && !groups_.empty()) group = take_group();
}

std::vector<Warp::Waiting> Warp::waiting() const {
  std::vector<Waiting> all;
  for (const Group& group : groups_) all.push_back({group, "runs"});
  if (meeting_.lanes != 0) all.push_back({meeting_, "waits for its warp"});
  if (at_barrier_.lanes != 0) all.push_back({at_barrier_, "waits for its block"});
  for (const Group& group : at_cluster_) all.push_back({group, "waits for its cluster"});
  return all;
}

}  // namespace fastnorm::ptx
