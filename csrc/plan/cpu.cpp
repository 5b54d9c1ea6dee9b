#include "cpu.h"

#include <algorithm>

#include "core/formulas.h"

namespace fastnorm {

namespace {

// A task takes at least this many elements: to hand out a smaller one costs more than it does (about 1 us a task).
constexpr int64_t kTaskElements = 16384;
// Layer norm works on so many sets at a time, where rows go together.
constexpr int64_t kSetsTogether = 4;

// Columns. The sums of a chunk take 16 bytes a channel, which so many positions make a small part of the traffic. Where
// positions are few, a chunk has fewer of them: a quarter of the tensor's, so that no thread of a small machine is
// idle.
constexpr int64_t kMinChunkPositions = 128, kLeastChunkPositions = 16;
// Rows share coefficients and sums in registers while the tensor stays in the cache. Memory itself wants one stream, so
// that beyond it float32 rows go one by one (four rows of 512 bytes at a time took 1.3 times as long), unless they are
// a line or two, or have so many channels that what they share leaves L1 (2048, backward: 0.75 times). Rows of half
// types wait for instructions (from memory, 512 bytes one by one: 1.15 times).
constexpr int64_t kTogetherBytes = 512, kManyChannels = 2048;
constexpr int64_t kChunkElements = 65536;

// Whether equal tasks, some of which each thread takes whole, would leave threads idle for more than a ninth of the
// call. Where they would not, a task keeps its data in one thread's cache, and no thread waits for the others' sums.
bool are_uneven(int64_t tasks, int threads) {
  return tasks < int64_t(4) * threads && 8 * div_up(tasks, threads) * threads > 9 * tasks;
}

// tensors: of x's size, that the call goes through.
int64_t bytes_of(int tensors, const Geometry& g, DType dtype) { return g.numel() * size_of(dtype) * tensors; }

bool stay_in_cache(int tensors, const Geometry& g, DType dtype, const CpuInfo& cpu) {
  return bytes_of(tensors, g, dtype) < cpu.l3_bytes / 2;
}

// Where the tensors of a call together exceed three quarters of the last cache, its outputs push out what it still
// needs, or leave before anyone reads them. Backward from 29 MB on took 0.66 to 0.84 times as long past a cache of 32
// MiB, with a sum of dx after it 0.5 to 1.07 times; forward from 26 MB on 0.72 to 1.0; forward of 21 MB 1.1 (1.2
// to 1.4).
bool exceed_cache(int tensors, const Geometry& g, DType dtype, const CpuInfo& cpu) {
  return bytes_of(tensors, g, dtype) > cpu.l3_bytes / 4 * 3;
}

// Layer norm: from memory, four float32 rows of 768 bytes at a time took 1.7 times as long as one by one forward, 1.3
// times backward (6272 rows). Rows of half types wait for arithmetic: one by one they took up to 1.75 times as long.
CpuPlan plan_rows(const Geometry& g, DType dtype, int tensors, CpuPlan plan, const CpuInfo& cpu) {
  const bool waits_for_memory = size_of(dtype) > 2 && g.set_size() * size_of(dtype) > kTogetherBytes;
  plan.rows_together = g.per_element() && (!waits_for_memory || stay_in_cache(tensors, g, dtype, cpu));
  // The processor finds the stream of a run only when it has begun. From memory batch norm forward of 32x256x56x56
  // bfloat16 took 1.65 times as long, 32x512x28x28 float32 1.25; from the cache the instructions alone cost 0.07.
  const bool long_runs = g.kind == Kind::kBatch && g.N > 1 && g.S * size_of(dtype) > kShortRunBytes;
  plan.fetches_next_run = long_runs && !stay_in_cache(tensors, g, dtype, cpu);
  const int64_t sets = kTaskElements / std::max<int64_t>(1, g.set_size());
  plan.sets_per_task = sets > 1 ? div_up(sets, kSetsTogether) * kSetsTogether : 1;
  const int64_t chunks = g.set_size() / (kBlock * kChunkBlocks);
  plan.split = are_uneven(g.sets(), cpu.threads) && chunks > 1;
  return plan;
}

// It is slow to stream half-written lines: runs are whole lines, or so long that an ordinary store before and behind
// the lines of each is little (AVX2, evaluation: runs of 169 bfloat16 took 1.7 times as long, of 729 as long; of 729
// float32 0.8 times, of 1445 0.75). Shorter ones batch norm stores side by side.
bool can_stream(const Geometry& g, DType dtype) {
  const int64_t run = g.mask_run() * size_of(dtype);
  if (run % 64 == 0) return true;
  return g.traversal() == Traversal::kRows && !g.per_element() && !g.sets_are_positions() && run > kShortRunBytes;
}

CpuPlan plan_columns(const Geometry& g, DType dtype, int streams, CpuPlan plan, const CpuInfo& cpu) {
  const int64_t C = std::max<int64_t>(1, g.C);
  const int64_t rows = std::max<int64_t>(1, g.positions() * g.outer());
  const int64_t quarter = div_up(rows, 4 * kLeastChunkPositions) * kLeastChunkPositions;
  plan.chunk_positions = std::max(std::min(quarter, kMinChunkPositions), kChunkElements / C);
  plan.split = are_uneven(g.outer(), cpu.threads) && g.positions() > plan.chunk_positions;
  plan.rows_together = size_of(dtype) == 2 || C >= kManyChannels || 4 * C * size_of(dtype) <= kTogetherBytes ||
                       stay_in_cache(streams, g, dtype, cpu);
  return plan;
}

// Layer norm over the channels of planar maps. A tile of positions, all channels of it, stays in L2 from the first pass
// to the second, forward one tensor of it and backward two. Its rows are whole packs, and not so short that to begin
// one costs more than its elements, nor so long that a sum over one, which is taken in A, loses digits.
constexpr int64_t kTileElements = 32768, kLeastTilePositions = 64, kMostTilePositions = 1024;

CpuPlan plan_positions(const Geometry& g, CpuPlan plan) {
  const int64_t positions = kTileElements / std::max<int64_t>(1, g.C) / kLeastTilePositions * kLeastTilePositions;
  plan.chunk_positions = std::clamp(positions, kLeastTilePositions, kMostTilePositions);
  plan.rows_together = true;
  return plan;
}

}  // namespace

CpuPlan plan_cpu(const Geometry& g, DType dtype, int streams, int outputs, const CpuInfo& cpu) {
  const bool exceeds = exceed_cache(streams + outputs, g, dtype, cpu);
  const CpuPlan plan{g.traversal(), false, exceeds, exceeds && can_stream(g, dtype), 1, g.positions(), false, false};
  if (g.sets_are_positions()) return plan_positions(g, plan);
  return g.traversal() == Traversal::kRows ? plan_rows(g, dtype, streams + outputs, plan, cpu)
                                           : plan_columns(g, dtype, streams, plan, cpu);
}

std::string to_string(const CpuPlan& p) {
  const std::string split = std::string(p.split ? ", split" : "") + (p.stream ? ", streaming" : "");
  const std::string together = p.rows_together ? ", rows together" : "";
  if (p.traversal == Traversal::kRows)
    return "rows" + split + ", " + std::to_string(p.sets_per_task) + " sets per task" + together +
           (p.fetches_next_run ? ", next run fetched" : "");
  return "columns" + split + ", chunks of " + std::to_string(p.chunk_positions) + " positions" + together;
}

}  // namespace fastnorm
