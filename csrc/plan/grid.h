// The grids of launches: how work is cut for a device, within the limits of kernels and device. Nothing is chosen here
// between one way and another; plan/cuda.cpp does that, by the estimates of cost.h.
#pragma once

#include "core/formulas.h"
#include "types.h"

namespace fastnorm {

// A fused launch as asked for; the grid made of it may have fewer pieces.
struct FusedChoice {
  Gang gang;
  int64_t pieces;      // blocks of a gang, at most
  int stages;          // waves in shared memory
  int blocks_per_sm;   // blocks to a multiprocessor that its shared memory is shared out to
  int64_t tile_bytes;  // columns: of neighbouring channels, at least
  bool persistent;     // blocks take items in strides: all are on the device at a time
};

// What a fused launch keeps in shared memory.
struct Staging {
  int streams;  // tensors
  bool backward;
  bool gathers;  // rows: the gradients of their weights

  int partial_numbers() const { return backward ? 2 : 3; }  // of an accumulator
};

Grid empty_grid(Traversal traversal, int pack);

// Cut into pieces until every multiprocessor has work. full_blocks: of kBlockThreads threads, whatever the work.
Grid split_grid(const Geometry& g, DType dtype, int pack, const DeviceInfo& device, bool full_blocks = false);
// The same of columns alone: outer stacks of so many rows of C channels.
Grid split_columns(int64_t outer, int64_t positions, int64_t C, DType dtype, int pack, const DeviceInfo& device);

// False where there is none: too little shared memory, more blocks to a gang than the device holds.
bool fused_grid(const Geometry& g, DType dtype, int pack, const Staging& staging, const FusedChoice& choice,
                const DeviceInfo& device, Grid& grid);

// Fused backward rows: whether a piece has several cells, and then how they are added up.
bool has_units(const Geometry& g, const Grid& grid);
Units choose_units(const Grid& grid);

// Bytes of one staged tensor of a set (rows) or of a tile of at least tile_bytes (columns), and how many there are.
struct StagedSets {
  int64_t bytes, count;
};
StagedSets staged_sets(const Geometry& g, DType dtype, int64_t tile_bytes);

// Blocks of a launch that are on the device at a time: as its gangs allow, at least.
int64_t co_resident_blocks(const Grid& grid, bool backward, const DeviceInfo& device);

int64_t accum_size(DType dtype);

// Shared memory of a block when so many share a multiprocessor.
int64_t shared_limit(int blocks_per_sm, const DeviceInfo& device);

}  // namespace fastnorm
