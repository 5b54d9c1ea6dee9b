// Fused forward over columns; see fused_forward_rows.cuh.
#pragma once

#include "forward_columns.cuh"
#include "gang.cuh"

namespace fastnorm::cuda {

// The statistics of a tile's sets, from the moments of its channels over all positions.
template <int W, class T, class A>
FASTNORM_DEVICE void merge_channels(const ForwardTensors<T>& t, const ColumnsPiece<W>& piece, const Moments<A>* merged,
                                    SetStats<A>* set_stats) {
  const ColumnsShape& shape = piece.shape;
  const int set_channels = static_cast<int>(shape.set_channels);
  const A positions = static_cast<A>(shape.positions), channels = static_cast<A>(set_channels);
  for_each_set(piece, [&](int s, int lane, int lanes) {
    const Moments<A>* of_set = merged + s * set_channels;
    Sum<A> sum{};
    for (int c = lane; s >= 0 && c < set_channels; c += lanes) sum.merge({of_set[c].mean});
    const A mean = reduce_lanes(sum, lanes).value / channels;
    sum = {};
    for (int c = lane; s >= 0 && c < set_channels; c += lanes) {
      sum.merge({of_set[c].m2 + positions * (of_set[c].mean - mean) * (of_set[c].mean - mean)});
    }
    const A m2 = reduce_lanes(sum, lanes).value;
    if (s < 0 || lane != 0) return;
    const int64_t base = piece.outer * shape.positions * shape.C + piece.first_channel + s * set_channels;
    const A var = m2 / (positions * channels);
    set_stats[s] = finish_stats(mean, var, origin_of<A>(t.x + base), t.eps);
    if (piece.piece == 0) {
      store_stats(t.stats, t.sets, piece.first_set() + s, set_stats[s], var);
      store_running(t.running, piece.first_set() + s, set_stats[s].mean, var);
    }
  });
}

template <class T, int W, bool kSmooth>
FASTNORM_KERNEL(kBlockThreads, 2)
fused_forward_columns(ForwardTensors<T> t, ColumnsShape shape, FusedShape f) {
  using A = Accum<T>;
  unsigned char* const extra = shared_memory() + f.stages * f.stream_bytes;
  auto* const merged = reinterpret_cast<Moments<A>*>(extra);
  auto* const set_stats = reinterpret_cast<SetStats<A>*>(merged + block_threads() * W);
  const GangPartials<Welford<A>> gang(f, reinterpret_cast<A*>(set_stats) + 4 * shape.tile, shape.tile);
  const auto memory_of = [&](int stage) {
    return reinterpret_cast<Pack<T, W>*>(shared_memory() + stage * f.stream_bytes);
  };
  const auto load_group = [&](int64_t item, int stage, int copy_group) {
    const ColumnsPiece<W> piece(shape, item);
    stage_columns(piece, copy_group, t.x, memory_of(stage));
    if (t.residual != nullptr && copy_group == kCopyGroups - 1) prefetch_columns(piece, t.residual);
  };
  const auto use_wave = [&](int64_t item, int stage, int parity, auto ready) {
    const bool valid = item < shape.items;
    const ColumnsPiece<W> piece(shape, valid ? item : 0, valid);
    const Pack<T, W>* const staged = memory_of(stage);
    const auto read = [&](int position) { return staged[piece.slot(position, t.x)]; };
    A origin[W];
    load_origins(piece, t.x, origin);
    LaneMoments<A, W> moments;
    for_landed(piece, ready, [&](const Range& range) { accumulate_lanes<T>(piece, range, origin, read, moments); });
    // Rows of `merged` below the first are read by no one else after their channel is done.
    merge_rows(piece, moments.lane, merged, [&](int c, const Welford<A>& total) {
      if (gang.is_block()) {
        merged[c] = total.moments;
      } else {
        gang.publish(parity, c, total);
      }
    });
    if (!gang.is_block()) {
      gang.exchange_channels(parity, piece.channels,
                             [&](int c, const Welford<A>& total) { merged[c] = total.moments; });
    }
    sync_block();
    merge_channels(t, piece, merged, set_stats);
    sync_block();
    if (t.y != nullptr) {
      SetStats<A> stats[W] = {};
#pragma unroll
      for (int w = 0; w < W; ++w) {
        if (piece.in) stats[w] = set_stats[(piece.x * W + w) / static_cast<int>(shape.set_channels)];
      }
      LaneCoefs<A, W> coefs;
      load_lane_coefs<T>(piece, stats, t.weight, t.bias, coefs);
      forward_columns<kSmooth, false>(t, piece, coefs, read);
    }
  };
  for_waves(f, shape.items, grid_blocks(), block_index(), load_group, use_wave);
  gang.exit();
}

}  // namespace fastnorm::cuda
