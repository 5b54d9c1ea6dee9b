// Division by a number known at launch, as a multiplication (Granlund and Montgomery 1994, "round up").
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace fastnorm::cuda {

struct FastDiv {
  uint32_t divisor, multiplier, shift;

  FastDiv() = default;
  // 1 <= divisor < 2^31
  explicit FastDiv(int64_t d) : divisor(static_cast<uint32_t>(d)), shift(0) {
    while ((uint64_t(1) << shift) < divisor) ++shift;
    multiplier = static_cast<uint32_t>((uint64_t(1) << 32) * ((uint64_t(1) << shift) - divisor) / divisor + 1);
  }
  // n < 2^31
  FASTNORM_HOST_DEVICE uint32_t divide(uint32_t n) const {
#if defined(__CUDA_ARCH__)
    uint32_t sum;
    asm("mad.hi.u32 %0, %1, %2, %2;" : "=r"(sum) : "r"(multiplier), "r"(n));
#else
    const uint32_t sum = static_cast<uint32_t>(static_cast<uint64_t>(multiplier) * n >> 32) + n;
#endif
    return sum >> shift;
  }
};

// The same in 64 bits, for numbers of items: the hardware has no division, and its replacement takes 80 instructions.
struct WideDiv {
  int64_t divisor;
  uint64_t multiplier;
  uint32_t shift;

  WideDiv() = default;
  // 1 <= divisor < 2^62
  explicit WideDiv(int64_t d) : divisor(d), shift(0) {
    while ((int64_t(1) << shift) < d) ++shift;
    using Wide = unsigned __int128;
    const Wide excess = static_cast<Wide>((int64_t(1) << shift) - d) << 64;
    multiplier = static_cast<uint64_t>(excess / static_cast<Wide>(d)) + 1;
  }
  // 0 <= n < 2^62
  FASTNORM_HOST_DEVICE int64_t divide(int64_t n) const {
#if defined(__CUDA_ARCH__)
    const uint64_t high = __umul64hi(multiplier, static_cast<uint64_t>(n));
#else
    const uint64_t high =
        static_cast<uint64_t>(static_cast<unsigned __int128>(multiplier) * static_cast<uint64_t>(n) >> 64);
#endif
    return static_cast<int64_t>((high + static_cast<uint64_t>(n)) >> shift);
  }
};

}  // namespace fastnorm::cuda
