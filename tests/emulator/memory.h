// The shared memory of a block. It is filled with NaN when a block begins; a margin behind it shows writes past the
// end. Once a block of a cluster has left, its memory is NaN again and out of bounds for the sanitizers.
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#include "sanitizer.h"

namespace fastnorm::emulator {

class SharedArena {
 public:
  static constexpr int64_t kLargest = 256 << 10;

  SharedArena() { map(nullptr, kLargest + kMargin); }
  ~SharedArena() {
    unpoison(base_, kLargest + kMargin);
    munmap(base_, kLargest + kMargin);
  }
  SharedArena(const SharedArena&) = delete;
  SharedArena& operator=(const SharedArena&) = delete;

  unsigned char* base() const { return base_; }
  int64_t bytes() const { return bytes_; }

  void begin_block(int64_t bytes) {
    // To ThreadSanitizer the block before wrote here: fresh pages have no past.
    if (kThreadSanitizer) map(base_, bytes_ + kMargin);
    bytes_ = bytes;
    const Unseen unseen;
    unpoison(base_, kLargest + kMargin);
    std::memset(base_, kNan, static_cast<size_t>(bytes_ + kMargin));
    poison(base_ + bytes_, kMargin);
  }

  // The offset at which the block wrote past its end; -1 where it did not.
  int64_t overrun() const {
    const Unseen unseen;
    unpoison(base_ + bytes_, kMargin);
    static const MarginBytes untouched;
    if (std::memcmp(base_ + bytes_, untouched.bytes, kMargin) == 0) return -1;
    int64_t at = bytes_;
    while (base_[at] == kNan) ++at;
    return at;
  }

  // No block may read this memory any more.
  void block_left() {
    note_overwritten(base_, static_cast<size_t>(bytes_));
    const Unseen unseen;
    std::memset(base_, kNan, static_cast<size_t>(bytes_));
    poison(base_, static_cast<size_t>(bytes_ + kMargin));
  }

 private:
  static constexpr int kNan = 0xff;
  static constexpr int64_t kMargin = 4096;
  struct MarginBytes {
    MarginBytes() { std::memset(bytes, kNan, sizeof bytes); }
    unsigned char bytes[kMargin];
  };

  void map(void* where, int64_t bytes) {
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | (where == nullptr ? 0 : MAP_FIXED);
    void* mapped = mmap(where, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE, flags, -1, 0);
    if (mapped == MAP_FAILED) throw std::runtime_error("emulator: no memory for the shared memory of a block");
    base_ = static_cast<unsigned char*>(mapped);
  }

  unsigned char* base_ = nullptr;
  int64_t bytes_ = 0;
};

}  // namespace fastnorm::emulator
