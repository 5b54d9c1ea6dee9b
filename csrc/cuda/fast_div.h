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

}  // namespace fastnorm::cuda
