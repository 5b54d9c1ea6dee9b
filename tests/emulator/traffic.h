// Bytes that pass through pack.cuh, by direction and kind.
#pragma once

#include <cstdint>

namespace fastnorm::emulator {

struct Traffic {
  // [stream, parameter], in the order of cuda::Access.
  uint64_t read[2], written[2];

  Traffic operator-(const Traffic& earlier) const {
    Traffic difference = *this;
    for (int kind : {0, 1}) {
      difference.read[kind] -= earlier.read[kind];
      difference.written[kind] -= earlier.written[kind];
    }
    return difference;
  }
};

// One launch, for tests that count them.
struct LaunchRecord {
  int64_t blocks, threads, shared_bytes, cluster, cooperative;
  Traffic traffic;
  uint64_t missed;  // bytes read that L2 did not have, where it is modelled
};

}  // namespace fastnorm::emulator
