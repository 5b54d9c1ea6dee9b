// How a call is divided into tasks. The plan is a pure function of geometry, type and the machine's facts, so that it
// can be printed, compared and tested. Blocks and chunks, and with them the order in which sums are folded, depend on
// the geometry alone. Threads and cache only decide which task does what, so any number of threads gives the same bits.
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

// So many elements are summed in float before the sums go on in double.
constexpr int64_t kBlock = 4096;
// So many blocks are folded into one partial. A chunk is the smallest part of a set that another thread may take.
constexpr int64_t kChunkBlocks = 8;

// For fewer elements a parallel region costs more than it saves. Torch's pool took 1.3 us to start and join while it
// spins (mean 1.6 to 3; 20 us after 5 ms of sleep), and one core moves this many elements in 5 to 10 us.
constexpr int64_t kMinParallelElements = 49152;

// A run of batch norm of so many bytes ends before the processor has found its stream: several sets, or columns, are
// walked side by side instead.
constexpr int64_t kShortRunBytes = 2048;

struct CpuPlan {
  Traversal traversal;
  // A split call reduces, folds and applies in three parallel steps over chunks. Otherwise a task does all three for
  // its sets while they are in its cache.
  bool split;
  bool exceeds_cache;       // the tensors of the call together
  bool stream;              // stores of whole runs go past the cache
  int64_t sets_per_task;    // rows, unless split
  int64_t chunk_positions;  // columns: positions of a chunk
  bool rows_together;       // several positions (columns) or sets (layer norm) are worked on at a time
  bool fetches_next_run;    // rows: while a run is reduced, the next one of its set is fetched

  bool operator==(const CpuPlan&) const = default;
};

// `streams` is the number of tensors that the second pass over a set reads again: 1 forward, 2 backward. `outputs` is
// the number of tensors of x's size that it writes.
CpuPlan plan_cpu(const Geometry& geometry, DType dtype, int streams, int outputs, const CpuInfo& cpu);

std::string to_string(const CpuPlan& plan);

}  // namespace fastnorm
