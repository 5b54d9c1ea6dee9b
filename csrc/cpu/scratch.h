// Scratch memory of the kernels.
//
// A thread has a stack of it, which it keeps for as long as it lives. malloc would serve as well, but for what it does
// to the outputs: glibc gives aligned blocks anew each time, and the small ones that stay behind an output keep the
// next output of that size from taking its place. So the outputs of a loop wandered over memory that was in no cache
// (forward + backward of a group norm, 2x640x32x32 float32: 16 places, 4 with the stack).
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

#include "pack.h"

namespace fastnorm::FASTNORM_CPU_CAPABILITY {

class ScratchStack {
 public:
  static ScratchStack& of_thread() {
    thread_local ScratchStack stack;
    return stack;
  }
  ScratchStack(const ScratchStack&) = delete;
  ScratchStack& operator=(const ScratchStack&) = delete;
  ~ScratchStack() { std::free(memory_); }

  // `bytes` of memory, whole packs, until release(); of malloc what the stack has no room for.
  void* take(size_t bytes) {
    if (memory_ == nullptr && kCapacity > 0) memory_ = allocate(kCapacity);
    if (bytes > kCapacity - used_) return allocate(bytes);
    void* const taken = memory_ + used_;
    used_ += bytes;
    return taken;
  }
  // Memory goes back in the opposite order, by the thread that took it.
  void release(void* taken) {
    auto* const p = static_cast<std::byte*>(taken);
    if (p >= memory_ && p < memory_ + kCapacity) {
      used_ = p - memory_;
    } else {
      std::free(p);
    }
  }

 private:
  ScratchStack() = default;

  static std::byte* allocate(size_t bytes) {
    void* const p = std::aligned_alloc(kPackBytes, bytes);
    if (p == nullptr) throw std::bad_alloc();
    return static_cast<std::byte*>(p);
  }

#if defined(__SANITIZE_ADDRESS__)
  static constexpr size_t kCapacity = 0;  // of malloc alone AddressSanitizer knows the ends
#else
  static constexpr size_t kCapacity = size_t(2) << 20;  // of address space: what no call has used takes no memory
#endif
  std::byte* memory_ = nullptr;
  size_t used_ = 0;
};

// Uninitialised memory that is aligned to a pack and can be read one pack past its end.
template <class E>
class Buffer {
 public:
  explicit Buffer(int64_t n)
      : data_(static_cast<E*>(
            ScratchStack::of_thread().take((n * sizeof(E) + 2 * kPackBytes - 1) / kPackBytes * kPackBytes))) {}
  ~Buffer() { ScratchStack::of_thread().release(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator E*() const { return data_; }

 private:
  E* const data_;
};

// Several arrays of `length` elements in one buffer. Each can be read a pack past its end.
template <class E, int kArrays>
class Arrays {
 public:
  explicit Arrays(int64_t length)
      : pitch_((length + Pack<E>::kLanes - 1) / Pack<E>::kLanes * Pack<E>::kLanes + Pack<E>::kLanes),
        storage_(kArrays * pitch_) {}
  E* operator[](int k) const { return storage_ + k * pitch_; }

 private:
  int64_t pitch_;
  Buffer<E> storage_;
};

}  // namespace fastnorm::FASTNORM_CPU_CAPABILITY
