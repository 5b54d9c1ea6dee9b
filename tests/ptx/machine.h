// The machine that executes a launch: blocks that run together, their warps, and who runs next.
#pragma once

#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "allocations.h"
#include "counters.h"
#include "happens_before.h"
#include "kernel.h"
#include "module.h"
#include "settings.h"
#include "shadow.h"
#include "warp.h"

namespace fastnorm::ptx {

struct LaunchShape {
  int64_t blocks;
  int threads;
  int64_t shared_bytes;  // dynamic
  int cluster = 1;
  bool cooperative = false;
};

struct Options {
  emulator::Order order = emulator::Order::kRandom;
  uint64_t seed = 0;
  bool races = true;          // looks for races
  bool transactions = false;  // counts transactions of memory
  Allocations memory;         // of the call, which is all that it may access beside the module's own
};

// The blocks of a cluster and where they meet.
struct Cluster {
  std::vector<Block*> blocks;
  int64_t expected = 0;  // threads
  int64_t arrived = 0;
  uint32_t phase = 0;               // how often all have arrived
  Clock arrivals;                   // released so far in this phase
  const Clock* released = nullptr;  // in the phase before, for those that acquire
};

class Machine {
 public:
  // parameters: as many bytes as the kernel has.
  void run(const Kernel& kernel, const LaunchShape& shape, const unsigned char* parameters, const Options& options);

  // Since the last reset.
  Counters& counters() { return counters_; }

  // Of the launch that runs, for its warps.
  const Kernel& kernel() const { return *kernel_; }
  const LaunchShape& shape() const { return shape_; }
  const Options& options() const { return options_; }
  const unsigned char* parameters() const { return parameters_; }
  uint64_t random() { return random_(); }
  Releases releases;
  GlobalShadow global_shadow;
  ShadowRoom global_room, shared_room;
  Allocations memory;
  void note_progress() { ++progress_; }
  void note_poll() { ++polls_; }
  void wake(Warp& warp);

 private:
  void begin_blocks(int64_t first, int64_t count);
  void run_together();
  size_t next_ready();
  [[noreturn]] void deadlock() const;
  void add_counts();

  const Kernel* kernel_ = nullptr;
  LaunchShape shape_{};
  Options options_;
  const unsigned char* parameters_ = nullptr;
  std::mt19937_64 random_;
  Counters counters_;
  std::vector<InstructionCount> counts_;  // of the kernel's instructions
  alignas(16) uint32_t grid_workspace_[8] = {};

  std::vector<std::unique_ptr<Block>> blocks_;
  std::vector<Cluster> clusters_;
  std::vector<Warp*> ready_;
  uint64_t progress_ = 0, polls_ = 0;

  friend class Warp;
};

}  // namespace fastnorm::ptx
