#include "cpu.h"

#include <algorithm>
#include <numeric>

#include "core/formulas.h"

namespace fastnorm {

namespace {

// A task takes at least this many elements: to hand out a smaller one costs more than it does (about 1 us a task).
constexpr int64_t kTaskElements = 32768;

// The rows of a tile are at least this wide; else the walk down the positions waits for memory. 32x1024x14x14 float32
// forward took 11.8 ms in tiles of 64 bytes and 2.8 split; 32x2048x7x7 took 1.8 in tiles of 320 bytes and 1.2 split
// (one thread).
constexpr int64_t kMinTileBytes = 512;

CpuPlan plan_rows(const Geometry& g, CpuPlan plan, const CpuInfo& cpu) {
  plan.sets_per_task = std::max<int64_t>(1, kTaskElements / std::max<int64_t>(1, g.set_size()));
  const int64_t chunks = g.set_size() / (kBlock * kChunkBlocks);
  plan.split = cpu.threads > 1 && g.sets() < 4 * cpu.threads && chunks > 1;
  return plan;
}

CpuPlan plan_columns(const Geometry& g, DType dtype, int streams, CpuPlan plan, const CpuInfo& cpu) {
  // A tile holds whole groups and whole bytes of the mask.
  const int64_t unit = std::lcm(g.set_channels(), int64_t(16));
  const int64_t channel_bytes = std::max<int64_t>(1, g.positions() * size_of(dtype) * streams);
  const int64_t fitting = cpu.l2_bytes / 2 / channel_bytes / unit * unit;
  plan.tile = std::min(g.C, std::clamp<int64_t>(fitting, unit, div_up(512, unit) * unit));
  const int64_t tasks = g.outer() * div_up(g.C, plan.tile);
  const bool narrow = plan.tile * size_of(dtype) < kMinTileBytes && plan.tile < g.C;
  plan.split = fitting < unit || narrow || (cpu.threads > 1 && tasks < 2 * cpu.threads);
  if (plan.split) plan.tile = std::min(g.C, div_up(512, unit) * unit);
  // These depend on C and not on the tile, which a split changes: sums must not depend on the number of threads.
  plan.block_positions = std::clamp<int64_t>(2 * kBlock / std::max<int64_t>(1, g.C) / 4 * 4, 16, 64);
  plan.chunk_positions =
      div_up(std::max<int64_t>(1, kBlock * kChunkBlocks / g.C), plan.block_positions) * plan.block_positions;
  return plan;
}

}  // namespace

CpuPlan plan_cpu(const Geometry& g, DType dtype, int streams, const CpuInfo& cpu) {
  // An output larger than half the last cache has left it before anyone reads it. Only runs of whole packs are
  // streamed, because it is slow to stream half-written lines.
  const bool stream = g.numel() * size_of(dtype) > cpu.l3_bytes / 2 && g.mask_run() % 16 == 0;
  const CpuPlan plan{g.traversal(), false, stream, 1, g.C, 16, g.positions()};
  return g.traversal() == Traversal::kRows ? plan_rows(g, plan, cpu) : plan_columns(g, dtype, streams, plan, cpu);
}

std::string to_string(const CpuPlan& p) {
  const std::string split = std::string(p.split ? ", split" : "") + (p.stream ? ", streaming" : "");
  if (p.traversal == Traversal::kRows)
    return "rows" + split + ", " + std::to_string(p.sets_per_task) + " sets per task";
  return "columns" + split + ", tile " + std::to_string(p.tile) + ", blocks of " + std::to_string(p.block_positions) +
         " positions, chunks of " + std::to_string(p.chunk_positions);
}

}  // namespace fastnorm
