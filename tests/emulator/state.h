// The emulator's state: its settings, the threads that run together and the fibers they run on. For emulator.cpp alone.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "cuda/platform.cuh"
#include "fiber.h"
#include "memory.h"
#include "scheduler.h"

namespace fastnorm::emulator {
namespace {

struct Machine {
  Settings settings;
  uint64_t launches = 0;  // since configure()
  std::vector<LaunchRecord> log;
  std::mutex one_launch;

  Random random;
  Scheduler scheduler{Order::kFifo, random};
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<Block> blocks;
  std::vector<Cluster> clusters;
  Barrier grid_barrier;
  std::map<const unsigned*, Barrier> blocks_barriers;  // by what counts the arrivals
  std::vector<std::unique_ptr<SharedArena>> arenas;

  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Fiber*> idle;
  Context launcher;

  void (*body)(void*);
  void* context;
  bool cooperative;
  bool wait_left_out;
  int running;  // threads that have not returned
  std::string failure;
  char *enter_token, *leave_token;  // by which ThreadSanitizer knows the launch

  void make_fibers(size_t count);
  Fiber* fiber_for(int slot);
  void resume(Thread* thread, Context& from);
  void leave(Context& from) {
    current = nullptr;
    switch_context(from, launcher);
  }
  void arrange(const cuda::LaunchConfig& config, int blocks_together);
  void begin_blocks(const cuda::LaunchConfig& config, int64_t first_block);
  void run_together(const cuda::LaunchConfig& config, int64_t first_block);
  void run(const cuda::LaunchConfig& config);
};

}  // namespace
}  // namespace fastnorm::emulator
