// The parts of the emulator (emulator.cpp) that emulator.h needs.
#pragma once

#include <cstdint>
#include <source_location>
#include <string>
#include <vector>

#include "l2.h"
#include "sanitizer.h"
#include "settings.h"
#include "traffic.h"

namespace fastnorm::cuda {
struct LaunchConfig;
}

namespace fastnorm::emulator {

// The most threads that run together: as many as an H200 has room for. ThreadSanitizer allows 8128 threads.
constexpr int64_t kMostThreads = kThreadSanitizer ? 4096 : 1 << 18;

using Site = std::source_location;  // the line at which a kernel calls a barrier

// The indices of the running thread.
struct GridView {
  int64_t blocks;
  int threads, cluster;
};
struct BlockView {
  int64_t index;
  int cluster_rank;
  unsigned char* shared;
};
// A copy to shared memory that its thread has not waited for yet.
struct Copy {
  void (*land)(void* place, const void* from);
  void* place;
  const void* from;
  bool landed;
};
struct ThreadView {
  int index;
  const BlockView* block;
  std::vector<Copy> copies;
  std::vector<size_t> batches;  // for each committed group, the end of its part of `copies`
};

extern GridView grid;
extern ThreadView* current;  // null outside of a launch
extern Traffic traffic;

void sync_block(Site site);
void sync_warp(Site site);
void sync_cluster(Site site);
// arrivals: tells the sets of blocks apart; 0.
void sync_blocks(const unsigned* arrivals, int blocks, Site site);
void sync_grid(Site site);

// A shuffle of values of up to 32 bytes: the thread writes its own to outgoing(), and reads lane `from`'s where
// exchange() says, before its next shuffle.
struct alignas(16) Parcel {
  unsigned char bytes[32];
};
Parcel* outgoing();
const Parcel* exchange(int from, Site site);

// Adds a copy of the running thread. Returns true where it lands at once.
bool begin_copy(void (*land)(void*, const void*), void* place, const void* from, int bytes);
// Returns false where this wait_copies is left out. Then copies stay under way, possibly to the end.
bool waits_here(Site site, int pending);

// The same address in the shared memory of the cluster's block `rank`.
void* remote_shared(void* place, int rank);

// Throws through the kernel. The launch then throws this text with the names of the threads.
[[noreturn]] void fail(const std::string& text);

// Runs body(context) as every thread of the launch; throws std::runtime_error with what went wrong. Returns 0, or
// cuda::kGangRefused, and then has not run it.
int launch(const cuda::LaunchConfig& config, void (*body)(void* context), void* context);

// Starts the sequence of launches anew: the same settings and launches give the same schedule. Throws
// std::runtime_error where the device makes no sense.
void configure(const Settings& settings);
const Settings& settings();

// Since the last reset_counters().
int64_t launch_count();
const LaunchRecord& launch_record(int64_t number);
void reset_counters();

}  // namespace fastnorm::emulator
