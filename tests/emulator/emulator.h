// The emulator's door: the names that platform.cuh takes from the CUDA toolkit, for g++ (C++20). Every CUDA thread is a
// fiber on one CPU thread; see emulator.cpp. Only platform.cuh includes this file.
//
// It is a checker. A launch throws std::runtime_error, which names defect, line and threads, when threads part at a
// barrier, wait for ever, shuffle without all lanes, write past their shared memory, access a misaligned address or
// return with copies under way. Shared memory is NaN at first. Defects that only show in values (a missing barrier, a
// read of data that is still being copied) change the bits with the seed under the orders `random` and `priority`, and
// ThreadSanitizer reports their lines.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <tuple>
#include <utility>

#include "convert.h"
#include "runtime.h"

#define FASTNORM_DEVICE inline
#define FASTNORM_KERNEL(threads, blocks) void

// Functions that ThreadSanitizer does not see: they touch the emulator's own counters.
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
inline void sync_blocks(unsigned* arrivals, int blocks, int /*met*/, Site site = Site::current()) {
  emulator::sync_blocks(arrivals, blocks, site);
}
inline void meet_cluster(Site site = Site::current()) { emulator::sync_cluster(site); }
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
template <class T>
void to_floats(unsigned word, float& low, float& high) {
  low = to_float(T{static_cast<uint16_t>(word)});
  high = to_float(T{static_cast<uint16_t>(word >> 16)});
}
template <class T>
unsigned from_floats(float low, float high) {
  T first, second;
  from_float(low, first);
  from_float(high, second);
  return first.bits | static_cast<unsigned>(second.bits) << 16;
}

inline int bit_width(int v) { return std::bit_width(static_cast<unsigned>(v)); }

inline float without_denormals(float v) {
  return std::abs(v) < std::numeric_limits<float>::min() ? std::copysign(0.0f, v) : v;
}
template <class A>
void keep_in_register(A&) {}
template <class A>
A relu_of(A v) {
  return v <= A(0) ? A(0) : v;
}
inline float exp2_approx(float v) { return without_denormals(std::exp2(without_denormals(v))); }
inline float reciprocal_approx(float v) { return without_denormals(1 / without_denormals(v)); }

inline float rsqrt_approx(float v) { return 1 / std::sqrt(v); }
inline float rounded_product(float a, float b) { return a * b; }

// One access for all of V's bytes. note_read and note_write check it.
template <class V>
V read_whole(const V* p) {
  return *p;
}
template <class V>
void write_whole(V* p, const V& v) {
  *p = v;
}
template <class V>
void write_whole_shared(V* p, const V& v) {
  *p = v;
}

// An access of `bytes`, a power of two up to 16, needs an address that is a multiple of it. Larger data is read word by
// word, so the lowest set bit of its size counts.
FASTNORM_UNSEEN inline void check_aligned(const void* p, int bytes, const char* verb) {
  const int alignment = bytes & -bytes & 31 ? bytes & -bytes : 16;
  if (reinterpret_cast<uintptr_t>(p) % static_cast<unsigned>(alignment) == 0) return;
  emulator::fail("misaligned: " + std::to_string(bytes) + " bytes " + verb + " an address that is " +
                 std::to_string(reinterpret_cast<uintptr_t>(p) % 16) + " past a multiple of 16");
}
// An access of 0 bytes is neither counted nor checked.
enum class Access { kStream, kParameter };
FASTNORM_UNSEEN inline void note_read(const void* p, int bytes, Access kind) {
  if (bytes > 0) check_aligned(p, bytes, "read at");
  emulator::traffic.read[static_cast<int>(kind)] += static_cast<unsigned>(bytes);
  if (emulator::l2 && kind == Access::kStream) emulator::l2->read(p);
}
FASTNORM_UNSEEN inline void note_write(const void* p, int bytes, Access kind) {
  if (bytes > 0) check_aligned(p, bytes, "written at");
  emulator::traffic.written[static_cast<int>(kind)] += static_cast<unsigned>(bytes);
  if (emulator::l2 && kind == Access::kStream) emulator::l2->write(p);
}

// The schedule decides whether a copy lands at once or when its thread waits. Under a sanitizer it lands both times: an
// access to its memory in between then races with one of them.
template <int kBytes>
void land(void* place, const void* from) {
  std::memcpy(place, from, kBytes);
}
template <int kBytes>
void copy_async(void* place, const void* p) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "what the hardware copies");
  check_aligned(p, kBytes, "copied from");
  check_aligned(place, kBytes, "copied to");
  const bool now = emulator::begin_copy(land<kBytes>, place, p, kBytes);
  if (now || emulator::kSanitizer) land<kBytes>(place, p);
}
inline void commit_copies() { emulator::current->batches.push_back(emulator::current->copies.size()); }
inline void wait_copies(int pending, Site site = Site::current()) {
  if (!emulator::waits_here(site, pending)) return;
  std::vector<emulator::Copy>& copies = emulator::current->copies;
  std::vector<size_t>& batches = emulator::current->batches;
  const size_t ended = batches.size() - std::min(batches.size(), static_cast<size_t>(pending));
  const size_t count = ended == 0 ? 0 : batches[ended - 1];
  for (size_t i = 0; i < count; ++i) {
    if (!copies[i].landed || emulator::kSanitizer) copies[i].land(copies[i].place, copies[i].from);
  }
  copies.erase(copies.begin(), copies.begin() + static_cast<std::ptrdiff_t>(count));
  batches.erase(batches.begin(), batches.begin() + static_cast<std::ptrdiff_t>(ended));
  for (size_t& end : batches) end -= count;
}
inline void prefetch_l2(const void* p) {
  if (emulator::l2) emulator::l2->read(p);
}

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), const LaunchConfig& config, Arguments&&... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> parameters;
  } call{kernel, {static_cast<Parameters>(arguments)...}};
  return emulator::launch(
      config,
      [](void* context) { std::apply(static_cast<Call*>(context)->kernel, static_cast<Call*>(context)->parameters); },
      &call);
}

inline int query_device(int /*device*/, const void* /*kernel*/, DeviceInfo* info) {
  *info = emulator::settings().device;
  return 0;
}

inline const char* platform_error_string(int error) {
  switch (error) {
    case 0: return "no error";
    case emulator::kCooperativeTooLarge: return "too many blocks in cooperative launch";
    case emulator::kCaptureEnded: return "operation failed due to a previous error during capture";
    default: return "invalid argument";
  }
}

}  // namespace fastnorm::cuda
