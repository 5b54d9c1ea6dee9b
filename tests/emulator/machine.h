// The parts of the emulated machine that run together: threads in warps in blocks in clusters.
#pragma once

#include <cstdint>

#include "runtime.h"

namespace fastnorm::emulator {

class Fiber;
class SharedArena;
struct Block;
struct Warp;

enum class Wait { kBlock, kWarp, kShuffle, kCluster, kBlocks, kGrid };

inline const char* name_of(Wait wait) {
  switch (wait) {
    case Wait::kBlock: return "sync_block";
    case Wait::kWarp: return "sync_warp";
    case Wait::kShuffle: return "shuffle";
    case Wait::kCluster: return "sync_cluster";
    case Wait::kBlocks: return "sync_blocks";
    default: return "sync_grid";
  }
}

struct Thread : ThreadView {
  Block* home;
  Warp* warp;
  int lane;
  int slot;      // among all threads that run together
  Fiber* fiber;  // null before the thread starts and after it returns
  bool done;
  Thread* next;  // in the list it waits in
  int rank;      // order priority: 0 runs first
  Wait wait;     // its last wait, and the line of it
  Site site;
};

// Threads in the order of arrival, linked through Thread::next.
struct ThreadList {
  Thread* first = nullptr;
  Thread* last = nullptr;

  bool empty() const { return first == nullptr; }
  void append(Thread* thread) {
    thread->next = nullptr;
    (first == nullptr ? first : last->next) = thread;
    last = thread;
  }
  // Moves all of `other` to the end, or before the beginning.
  void append(ThreadList& other) {
    if (other.empty()) return;
    (first == nullptr ? first : last->next) = other.first;
    last = other.last;
    other = {};
  }
  void prepend(ThreadList& other) {
    if (other.empty()) return;
    other.last->next = first;
    if (first == nullptr) last = other.last;
    first = other.first;
    other = {};
  }
  Thread* take_first() {
    Thread* thread = first;
    if (thread != nullptr) first = thread->next;
    return thread;
  }
};

struct Barrier {
  int expected = 0, arrived = 0;
  unsigned passed = 0;  // the number of times that all arrived
  ThreadList waiting;
  char* tokens = nullptr;  // two addresses as ThreadSanitizer's names of the barrier

  void reset(int threads);
};

struct Warp {
  Barrier barrier;
  int lanes;
  Parcel parcels[2][32];  // of this shuffle and of the one before, which slow lanes may still read
};

struct Cluster {
  Barrier barrier;
  Block* blocks;
};

struct Block : BlockView {
  Cluster* cluster;
  Barrier barrier;
  SharedArena* arena;
  Thread* threads;
  Warp* warps;
  int running;       // threads that have not returned
  int first_rank;    // order priority: the block's threads have the ranks from here on
  char* exit_token;  // ThreadSanitizer's
};

}  // namespace fastnorm::emulator
