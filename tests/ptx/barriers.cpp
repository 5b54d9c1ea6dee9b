// Barriers of warps, blocks and clusters: who waits for whom, and what happens before what.
#include <algorithm>
#include <bit>

#include "machine.h"

namespace fastnorm::ptx {

namespace {

template <class F>
void for_each_lane(Mask lanes, F f) {
  for (Mask left = lanes; left != 0; left &= left - 1) f(std::countr_zero(left));
}

}  // namespace

// ---- time ----

void Warp::stamp_anew(int lane) {
  const ThreadTime& t = time(lane);
  if (machine().options().races && (t.epoch >= Stamp::kMostEpochs || t.step >= Stamp::kMostEpochs)) {
    fail(lane, "more barriers than the search for races can count");
  }
  stamps_[static_cast<size_t>(lane)] =
      Stamp(static_cast<uint32_t>(block_->index), static_cast<uint32_t>(thread(lane)), t.epoch, t.step);
}

Clock Warp::release_clock(int lane) {
  ThreadTime& t = time(lane);
  Clock clock;
  if (t.clock != nullptr) clock = *t.clock;
  const Stamp now = stamp(lane);
  clock.learn(now.block(), t.known_epoch);
  clock.learn_part(Clock::warp_of(now), t.known_step);
  ++t.step;
  clock.learn_part(Clock::thread_of(now), t.step);
  stamp_anew(lane);
  return clock;
}

// ---- the warp's barrier ----

void Warp::order_lanes(Mask lanes) {
  machine().note_progress();
  if (!machine().options().races) return;
  uint32_t step = 0;
  const Clock* clock = nullptr;
  for_each_lane(lanes, [&](int lane) {
    step = std::max(step, time(lane).step);
    clock = machine().releases.joined(clock, time(lane).clock);
  });
  for_each_lane(lanes, [&](int lane) {
    ThreadTime& t = time(lane);
    t.step = t.known_step = step + 1;
    t.clock = clock;
    stamp_anew(lane);
  });
}

// ---- the block's ----

// Returns true where nothing of the warp can run.
bool Warp::wait_for_block(Group& group, Mask on) {
  const uint32_t at = group.at;
  group.at += 1;
  group.lanes &= ~on;
  if (on != 0) {
    if (block_->arrived > 0 && block_->barrier != at) {
      const auto waits = [](const Warp& w) { return w.at_barrier_.lanes != 0; };
      const Warp& other = *std::find_if(block_->warps.begin(), block_->warps.end(), waits);
      group.at = at;
      fail(std::countr_zero(on),
           "divergent barrier: " + thread_name(block_->index, other.thread(std::countr_zero(other.at_barrier_.lanes))) +
               " waits at another");
    }
    block_->barrier = at;
    block_->arrived += std::popcount(on);
    at_barrier_ = {at, at_barrier_.lanes | on};
    if (block_->arrived == block_->threads) pass_block_barrier();
  }
  if (group.lanes != 0) return false;
  if (groups_.empty()) return true;
  group = take_group();
  return false;
}

void Warp::pass_block_barrier() {
  Machine& m = machine();
  m.note_progress();
  block_->arrived = 0;
  uint32_t epoch = 0;
  const Clock* clock = nullptr;
  for (Warp& warp : block_->warps) {
    for_each_lane(warp.present_, [&](int lane) {
      epoch = std::max(epoch, warp.time(lane).epoch);
      clock = m.releases.joined(clock, warp.time(lane).clock);
    });
  }
  for (Warp& warp : block_->warps) {
    if (m.options().races) {
      for_each_lane(warp.present_, [&](int lane) {
        ThreadTime& t = warp.time(lane);
        t.epoch = t.known_epoch = epoch + 1;
        t.clock = clock;
        warp.stamp_anew(lane);
      });
    }
    warp.park({warp.at_barrier_.at + 1, warp.at_barrier_.lanes});
    warp.at_barrier_ = {};
    m.wake(warp);
  }
}

// ---- the cluster's ----

void Warp::arrive_at_cluster(const Instruction& i, Group& group, Mask on) {
  Machine& m = machine();
  Cluster& cluster = *block_->cluster;
  for_each_lane(on, [&](int lane) {
    const auto l = static_cast<size_t>(lane);
    if (cluster_arrivals[l] != cluster_waits[l]) fail(lane, "arrives at the cluster's barrier twice without a wait");
    ++cluster_arrivals[l];
    if (!i.order.release || !m.options().races) return;
    ThreadTime& t = time(lane);
    if (t.clock != nullptr) cluster.arrivals.join(*t.clock);
    const auto block = static_cast<uint32_t>(block_->index);
    t.epoch = std::max(t.epoch + 1, cluster.arrivals.of_block(block));
    cluster.arrivals.learn(block, t.epoch);
    stamp_anew(lane);
  });
  ++group.at;
  cluster.arrived += std::popcount(on);
  if (cluster.arrived < cluster.expected) return;
  m.note_progress();
  cluster.arrived = 0;
  ++cluster.phase;
  cluster.released = m.releases.keep(std::move(cluster.arrivals));
  cluster.arrivals = {};
  for (Block* block : cluster.blocks) {
    for (Warp& warp : block->warps) warp.pass_cluster_barrier();
  }
}

void Warp::wait_for_cluster(const Instruction&, Group& group, Mask on) {
  for_each_lane(on, [&](int lane) {
    const auto l = static_cast<size_t>(lane);
    if (cluster_arrivals[l] == cluster_waits[l]) fail(lane, "waits at the cluster's barrier and has not arrived");
  });
  const Group waiting{group.at, on};
  group = {group.at + 1, group.lanes & ~on};
  if (on != 0) at_cluster_.push_back(waiting);
  if (on != 0 && cluster_waits[static_cast<size_t>(std::countr_zero(on))] < block_->cluster->phase)
    pass_cluster_barrier();
  if (group.lanes == 0 && !groups_.empty()) group = take_group();
}

// Lets go on who waits for a phase that is over.
void Warp::pass_cluster_barrier() {
  Machine& m = machine();
  const Cluster& cluster = *block_->cluster;
  for (const Group& group : at_cluster_) {
    const bool acquires = m.kernel().code[group.at].order.acquire;
    for_each_lane(group.lanes, [&](int lane) {
      const auto l = static_cast<size_t>(lane);
      cluster_waits[l] = cluster_arrivals[l];
      block_->waited_phases = std::max(block_->waited_phases, cluster_waits[l]);
      if (!acquires || !m.options().races) return;
      ThreadTime& t = time(lane);
      t.clock = m.releases.joined(t.clock, cluster.released);
      t.known_epoch = std::max(t.known_epoch, cluster.released->of_block(static_cast<uint32_t>(block_->index)));
    });
    park({group.at + 1, group.lanes});
  }
  if (at_cluster_.empty()) return;
  at_cluster_.clear();
  m.wake(*this);
}

// The block has returned: whoever used its shared memory from outside must have met it since.
void Warp::check_remote_use(int lane) const {
  if (!block_->remote_used || block_->waited_phases > block_->remote_phase) return;
  fail(lane, "returned while another block of the cluster may still use its shared memory");
}

}  // namespace fastnorm::ptx
