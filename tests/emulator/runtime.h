// What emulator.h needs of the emulator itself, emulator.cpp.
#pragma once

#include <cstdint>
#include <source_location>
#include <string>

#include "settings.h"
#include "traffic.h"

namespace fastnorm::cuda {
struct LaunchConfig;
}

namespace fastnorm::emulator {

using Site = std::source_location;  // where a kernel calls a barrier

// Where a thread finds itself.
struct GridView {
  int64_t blocks;
  int threads, cluster;
};
struct BlockView {
  int64_t index;
  int cluster_rank;
  unsigned char* shared;
};
struct ThreadView {
  int index;
  const BlockView* block;
};

extern GridView grid;
extern ThreadView* current;  // null outside of a launch
extern Traffic traffic;

void sync_block(Site site);
void sync_warp(Site site);
void sync_cluster(Site site);
void sync_grid(Site site);

// A shuffle of values of up to 32 bytes: the thread writes its own to outgoing(), and reads lane `from`'s where
// exchange() says, before its next shuffle.
struct alignas(16) Parcel {
  unsigned char bytes[32];
};
Parcel* outgoing();
const Parcel* exchange(int from, Site site);

// The same place in the shared memory of the cluster's block `rank`.
void* remote_shared(void* place, int rank);

// Throws through the kernel; then the launch throws this text and who it was.
[[noreturn]] void fail(const std::string& text);

// Runs body(context) as every thread of the launch; throws std::runtime_error with what went wrong.
void launch(const cuda::LaunchConfig& config, void (*body)(void* context), void* context);

// Starts the sequence of launches anew: the same settings and launches give the same schedule. Throws
// std::runtime_error where the device makes no sense.
void configure(const Settings& settings);
const Settings& settings();

// Since the last reset_counters().
int64_t launch_count();
const LaunchRecord& launch_record(int64_t number);
void reset_counters();

}  // namespace fastnorm::emulator
