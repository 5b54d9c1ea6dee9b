// The grids of launches: how work is cut within the limits of kernels and device. plan/cuda.cpp chooses between grids
// by the estimates of cost.h; nothing is chosen here.
#pragma once

#include "core/formulas.h"
#include "types.h"

namespace fastnorm {

// A fused launch as asked for; the grid made of it may have fewer pieces.
struct FusedChoice {
  Gang gang;
  int64_t pieces;      // blocks of a gang, at most
  int stages;          // waves in shared memory
  int blocks_per_sm;   // the shared memory of an SM is divided among so many
  int64_t tile_bytes;  // columns: neighbouring channels of a tile have at least so many bytes
  Place place;
  // Columns: positions of a piece that stay in shared memory, at most; what is beyond is read twice. 0: all of them.
  int64_t staged_length;
  bool persistent;  // all blocks are on the device at a time and take items in strides

  int block_threads() const {  // a power of two, so that the blocks of an SM have kResidentThreads at most
    int threads = kResidentThreads;
    while (threads > kWarp && threads * blocks_per_sm > kResidentThreads) threads /= 2;
    return threads;
  }
};

// The contents of a fused launch's shared memory.
struct Staging {
  int streams;  // tensors
  bool backward;
  bool gathers;    // rows: blocks also gather the gradients of the weights
  bool registers;  // the kernels that keep rows in registers serve the call, too
  bool rereads;    // and those that read a part of a piece twice
};

Grid empty_grid(Traversal traversal, int pack);

// Cuts sets into pieces until every SM has work. full_blocks: blocks have kBlockThreads threads, however little work.
Grid split_grid(const Geometry& g, DType dtype, int pack, const DeviceInfo& device, bool full_blocks = false);
// The same for columns alone: `outer` stacks of `positions` rows of C channels.
Grid split_columns(int64_t outer, int64_t positions, int64_t C, DType dtype, int pack, const DeviceInfo& device);

// Returns false where no grid fits: too little shared memory, or gangs of more blocks than the device holds.
bool fused_grid(const Geometry& g, DType dtype, int pack, const Staging& staging, const FusedChoice& choice,
                const DeviceInfo& device, Grid& grid);

// Fused backward rows: whether a piece has several cells, and the units that add them up.
bool has_units(const Geometry& g, const Grid& grid);
Units choose_units(const Grid& grid);

// Sets (rows) or tiles of at least tile_bytes (columns): the bytes of one staged tensor of each, and their number.
struct StagedSets {
  int64_t bytes, count;
};
StagedSets staged_sets(const Geometry& g, DType dtype, int64_t tile_bytes);

// The least number of blocks of a launch that are on the device at a time: its occupancy times the SMs, as far as gangs
// fill them.
int64_t co_resident_blocks(const Grid& grid, const DeviceInfo& device);

// What reduce leaves of a piece in forward: a count, and mean and m2 side by side.
int64_t moments_size(DType dtype);

// The shared memory of each block where an SM has so many blocks.
int64_t shared_limit(int blocks_per_sm, const DeviceInfo& device);

}  // namespace fastnorm
