// From a plan to launches: the configurations, and the choice of a kernel's instantiation.
#pragma once

#include "gang.cuh"
#include "launches.h"
#include "plan/types.h"

namespace fastnorm::cuda {

// The error of a plan for which no kernel was compiled: cudaErrorInvalidValue.
constexpr int kNoSuchKernel = 1;

inline LaunchConfig config_of(const Grid& grid, int64_t shared_bytes, void* stream) {
  return {grid.blocks, grid.threads(), shared_bytes, stream};
}
// grid_sync: all blocks of the launch wait for each other, whatever its gangs are.
inline LaunchConfig fused_config(const Grid& grid, bool grid_sync, void* stream) {
  LaunchConfig config = config_of(grid, grid.shared_bytes, stream);
  if (grid.gang == Gang::kCluster) config.cluster = static_cast<int>(grid.pieces);
  config.cooperative = grid_sync || grid.gang == Gang::kGrid;
  return config;
}
// workspace: the partials of a grid's gangs, and then their counters.
inline FusedShape fused_shape(const Grid& grid, DType dtype, void* workspace) {
  unsigned* arrivals = nullptr;
  if (grid.syncs_by_gang()) {
    arrivals = reinterpret_cast<unsigned*>(static_cast<unsigned char*>(workspace) + grid.partials_bytes(dtype));
  }
  return {grid.gang,
          static_cast<int>(grid.pieces),
          grid.stages,
          static_cast<int>(grid.stream_bytes(dtype)),
          static_cast<int>(grid.team_bytes),
          workspace,
          grid.exchange,
          arrivals};
}

// float64 has packs of one element, and is not fused.
template <class T>
constexpr bool kFuses = !std::is_same_v<T, double>;

// Columns kernels are compiled for packs of 16 bytes and for single elements only (pack_width in plan/cuda.cpp).
template <class T, int W>
constexpr bool kColumnsPack = W == 1 || W * sizeof(T) == 16;

// Calls f(pack, smooth), both as types.
template <class T, Traversal kTraversal, class F>
int dispatch_kernel(int pack, Activation activation, F f) {
  const auto dispatch_smooth_of = [&](auto width) {
    return is_smooth(activation) ? f(width, std::true_type{}) : f(width, std::false_type{});
  };
  if constexpr (sizeof(T) == 2) {
    if (pack == 8) return dispatch_smooth_of(std::integral_constant<int, 8>{});
  }
  if constexpr (sizeof(T) == 4 || (sizeof(T) == 2 && kTraversal == Traversal::kRows)) {
    if (pack == 4) return dispatch_smooth_of(std::integral_constant<int, 4>{});
  }
  return pack == 1 ? dispatch_smooth_of(std::integral_constant<int, 1>{}) : kNoSuchKernel;
}

}  // namespace fastnorm::cuda
