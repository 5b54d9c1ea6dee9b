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
    const uint32_t high = static_cast<uint32_t>(static_cast<uint64_t>(multiplier) * n >> 32);
    return (high + n) >> shift;
  }
};

// The same for any n, which a launch has few of: 64-bit division takes a hundred instructions.
struct WideDiv {
  FastDiv narrow;
  int64_t divisor;

  WideDiv() = default;
  explicit WideDiv(int64_t d) : narrow(d < kNarrow ? d : 1), divisor(d) {}
  FASTNORM_HOST_DEVICE int64_t divide(int64_t n) const {
    if (n >= kNarrow || divisor >= kNarrow) return n / divisor;
    return narrow.divide(static_cast<uint32_t>(n));
  }

 private:
  static constexpr int64_t kNarrow = int64_t(1) << 31;
};

}  // namespace fastnorm::cuda
