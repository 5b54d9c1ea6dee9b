// The emulator's door: what platform.cuh takes from the CUDA toolkit, under the same names, for g++ (C++20). Every CUDA
// thread is a fiber on one CPU thread; see emulator.cpp. Included by platform.cuh, never by itself.
//
// It is a checker. A launch throws std::runtime_error that says what, where and who when threads part at a barrier,
// wait for ever, shuffle without all lanes, write past their shared memory or touch memory at an unfit address. Shared
// memory is NaN at first. What only shows in values (a missing barrier) shows under the orders `random` and `priority`
// as bits that change with the seed, and under ThreadSanitizer by line.
#pragma once

#include <cstring>
#include <tuple>
#include <utility>

#include "convert.h"
#include "runtime.h"

#define FASTNORM_DEVICE inline
#define FASTNORM_KERNEL(threads, blocks) void

// What ThreadSanitizer does not see: the emulator's own counters.
#if defined(FASTNORM_SANITIZE_THREAD)
#define FASTNORM_UNSEEN __attribute__((no_sanitize("thread")))
#else
#define FASTNORM_UNSEEN
#endif

namespace fastnorm::cuda {

using Site = emulator::Site;

inline int thread_index() { return emulator::current->index; }
inline int block_threads() { return emulator::grid.threads; }
inline int64_t block_index() { return emulator::current->block->index; }
inline int64_t grid_blocks() { return emulator::grid.blocks; }
inline unsigned char* shared_memory() { return emulator::current->block->shared; }

inline void sync_block(Site site = Site::current()) { emulator::sync_block(site); }
inline void sync_warp(Site site = Site::current()) { emulator::sync_warp(site); }
inline void sync_grid(Site site = Site::current()) { emulator::sync_grid(site); }
inline void sync_cluster(Site site = Site::current()) { emulator::sync_cluster(site); }
inline int cluster_rank() { return emulator::current->block->cluster_rank; }
inline int cluster_size() { return emulator::grid.cluster; }
template <class T>
T* cluster_shared(T* place, int rank) {
  return static_cast<T*>(emulator::remote_shared(place, rank));
}

template <class T>
FASTNORM_UNSEEN void put_parcel(emulator::Parcel* parcel, const T& v) {
  std::memcpy(parcel, &v, sizeof v);
}
template <class T>
FASTNORM_UNSEEN void take_parcel(const emulator::Parcel* parcel, T& v) {
  std::memcpy(&v, parcel, sizeof v);
}
template <class T>
T shuffle(T v, int lane, Site site = Site::current()) {
  static_assert(std::is_trivially_copyable<T>::value && sizeof(T) % 4 == 0, "shuffled word by word");
  static_assert(sizeof(T) <= sizeof(emulator::Parcel), "too large to shuffle");
  put_parcel(emulator::outgoing(), v);
  take_parcel(emulator::exchange(lane, site), v);
  return v;
}
template <class T>
T shuffle_xor(T v, int lanes, Site site = Site::current()) {
  return shuffle(v, (thread_index() % kWarp) ^ lanes, site);
}

inline float to_float(BFloat16 v) { return emulator::widen(v); }
inline float to_float(Float16 v) { return emulator::widen(v); }
inline void from_float(float v, BFloat16& out) { out = emulator::narrow_bfloat16(v); }
inline void from_float(float v, Float16& out) { out = emulator::narrow_float16(v); }

// One access for all of V's bytes; checked by note_read and note_write.
template <class V>
V read_whole(const V* p) {
  return *p;
}
template <class V>
void write_whole(V* p, const V& v) {
  *p = v;
}

// An access of `bytes`, a power of two up to 16, needs an address that is a multiple of it; what is larger is read word
// by word, so its lowest bit counts. 0: neither counted nor checked.
enum class Access { kStream, kParameter };
FASTNORM_UNSEEN inline void note(const void* p, int bytes, uint64_t& counter, const char* verb) {
  const int alignment = bytes & -bytes & 31 ? bytes & -bytes : 16;
  if (bytes > 0 && reinterpret_cast<uintptr_t>(p) % static_cast<unsigned>(alignment) != 0) {
    emulator::fail("misaligned: " + std::to_string(bytes) + " bytes " + verb + " at an address that is " +
                   std::to_string(reinterpret_cast<uintptr_t>(p) % 16) + " past a multiple of 16");
  }
  counter += static_cast<unsigned>(bytes);
}
FASTNORM_UNSEEN inline void note_read(const void* p, int bytes, Access kind) {
  note(p, bytes, emulator::traffic.read[static_cast<int>(kind)], "read");
}
FASTNORM_UNSEEN inline void note_write(const void* p, int bytes, Access kind) {
  note(p, bytes, emulator::traffic.written[static_cast<int>(kind)], "written");
}

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), const LaunchConfig& config, Arguments&&... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> parameters;
  } call{kernel, {static_cast<Parameters>(arguments)...}};
  emulator::launch(
      config,
      [](void* context) { std::apply(static_cast<Call*>(context)->kernel, static_cast<Call*>(context)->parameters); },
      &call);
  return 0;
}

inline int query_device(int /*device*/, DeviceInfo* info) {
  *info = emulator::settings().device;
  return 0;
}

inline const char* platform_error_string(int error) { return error == 0 ? "no error" : "invalid argument"; }

}  // namespace fastnorm::cuda
