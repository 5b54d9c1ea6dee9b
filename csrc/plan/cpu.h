// How a call is cut into tasks: a pure function of geometry, type and the machine's facts, so that it can be printed,
// compared and tested. Blocks and chunks, and with them the order in which sums are folded, depend on the geometry
// alone; threads and cache only decide which task does what: the same bits for any number of threads.
#pragma once

#include <cstdint>
#include <string>

#include "core/dtype.h"
#include "core/geometry.h"

namespace fastnorm {

struct CpuInfo {
  int64_t l2_bytes, l3_bytes;
  int threads;
};

// Elements reduced in one go while they sit in the L1 cache (16 KB of float32): their own mean first, then the squares.
constexpr int64_t kBlock = 4096;
// Blocks folded into one partial; the smallest piece of a set that another thread may take.
constexpr int64_t kChunkBlocks = 16;

// Below this a parallel region costs more than it saves: waking torch's pool took 5 to 10 us on two cores, in which one
// core moves about this many elements.
constexpr int64_t kMinParallelElements = 32768;

struct CpuPlan {
  Traversal traversal;
  // A split call reduces, folds and applies in three parallel steps over chunks; otherwise one task does all three
  // for its sets while they are in its cache.
  bool split;
  bool stream;              // stores past the cache
  int64_t sets_per_task;    // rows, not split
  int64_t tile;             // columns: channels of a tile
  int64_t block_positions;  // columns: positions of a block
  int64_t chunk_positions;  // columns: positions of a chunk

  bool operator==(const CpuPlan&) const = default;
};

// `streams`: tensors that a set's second pass reads again (1 forward, 2 backward).
CpuPlan plan_cpu(const Geometry& geometry, DType dtype, int streams, const CpuInfo& cpu);

std::string to_string(const CpuPlan& plan);

}  // namespace fastnorm
