// Fused forward: reduce and apply in one launch, x in shared memory meanwhile.
//
// What: as apply.cuh, with the statistics of x itself.
// Who: rows: a team to a set; columns: a block to a tile of whole sets, all their positions. A thread reads back what
// it
//   staged itself, so that staging needs no barrier.
// Traffic: reads x (and residual) once, writes y (and a bit an element) once: the least there is.
// Needs: the set (rows) or the tile (columns) staged in shared memory, two blocks to a multiprocessor; float32
//   accumulation.
// Numerics: moments as reduce.cuh takes them; the merge of the block replaces fold.
// Why not registers: their number would be a template parameter, and every set size a kernel.
#pragma once

#include "forward.cuh"

namespace fastnorm::cuda {

template <class T, int W, bool kSmooth>
FASTNORM_KERNEL(kBlockThreads, 2)
fused_forward_rows(ForwardTensors<T> t, RowsShape shape, int team_bytes) {
  using A = Accum<T>;
  const Team team(shape.team);
  const int teams = block_threads() / team.width;
  auto* staged = reinterpret_cast<Pack<T, W>*>(shared_memory() + team.index * team_bytes);
  void* scratch = shared_memory() + teams * team_bytes;
  for (int64_t first = block_index() * teams; first < shape.items; first += grid_blocks() * teams) {
    const bool valid = first + team.index < shape.items;
    const RowsPiece<W> piece(shape, valid ? first + team.index : first);
    const int64_t set = piece.span.set;
    const A origin = origin_of<A>(t.x + set * shape.set_stride);
    const auto slot = [&](const Place& place) { return place.run * piece.span.packs + place.pack; };
    const Welford<A> mine = accumulate_moments<kLaneUnroll<W>>(
        piece, piece.whole(team, valid), t.x, origin,
        [&](const Place& place, const Pack<T, W>& pack) { staged[slot(place)] = pack; });
    const Moments<A> moments = reduce_team(team, mine, scratch).moments;
    const A var = moments.m2 / static_cast<A>(shape.set_size);
    const SetStats<A> stats = finish_stats(moments.mean, var, origin, t.eps);
    if (valid && team.lane == 0) store_stats(t.stats, t.sets, set, stats, var);
    if (t.y != nullptr) {
      forward_rows<kSmooth>(t, piece, piece.whole(team, valid), stats,
                            [&](const Place& place) { return staged[slot(place)]; });
    }
  }
}

template <class T, int W, bool kSmooth>
FASTNORM_KERNEL(kBlockThreads, 2)
fused_forward_columns(ForwardTensors<T> t, ColumnsShape shape, int tile_bytes) {
  using A = Accum<T>;
  auto* staged = reinterpret_cast<Pack<T, W>*>(shared_memory());
  auto* merged = reinterpret_cast<Moments<A>*>(shared_memory() + tile_bytes);
  auto* set_stats = reinterpret_cast<SetStats<A>*>(merged + block_threads() * W);
  const int tile_packs = shape.tile / W, set_channels = static_cast<int>(shape.set_channels);
  for (int64_t item = block_index(); item < shape.items; item += grid_blocks()) {
    const ColumnsPiece<W> piece(shape, item);
    A origin[W];
    load_origins(piece, t.x, origin);
    Moments<A> moments[W];
    accumulate_lanes(piece, t.x, origin, moments,
                     [&](int position, const Pack<T, W>& pack) { staged[position * tile_packs + piece.x] = pack; });
    // Rows of `merged` below the first are read by no one else after their channel is done.
    merge_moments_down(piece, moments, merged, [&](int c, const Moments<A>& total) { merged[c] = total; });
    sync_block();
    for_each_set(piece, [&](int s, int lane, int lanes) {
      const Moments<A>* channels = merged + s * set_channels;
      const A positions = static_cast<A>(piece.positions);
      Sum<A> sum{};
      for (int c = lane; s >= 0 && c < set_channels; c += lanes) sum.merge({channels[c].mean});
      const A mean = reduce_lanes(sum, lanes).value / static_cast<A>(set_channels);
      sum = {};
      for (int c = lane; s >= 0 && c < set_channels; c += lanes) {
        sum.merge({channels[c].m2 + positions * (channels[c].mean - mean) * (channels[c].mean - mean)});
      }
      const A m2 = reduce_lanes(sum, lanes).value;
      if (s < 0 || lane != 0) return;
      const int64_t base = piece.outer * shape.positions * shape.C + piece.first_channel + s * set_channels;
      const A var = m2 / (positions * static_cast<A>(set_channels));
      set_stats[s] = finish_stats(mean, var, origin_of<A>(t.x + base), t.eps);
      store_stats(t.stats, t.sets, piece.outer * shape.groups + piece.first_channel / set_channels + s, set_stats[s],
                  var);
    });
    sync_block();
    if (t.y != nullptr) {
      SetStats<A> stats[W] = {};
#pragma unroll
      for (int w = 0; w < W; ++w) {
        if (piece.in) stats[w] = set_stats[(piece.x * W + w) / set_channels];
      }
      LaneCoefs<A, W> coefs;
      load_lane_coefs<T>(piece, stats, t.weight, t.bias, coefs);
      forward_columns<kSmooth>(t, piece, coefs, [&](int position) { return staged[position * tile_packs + piece.x]; });
    }
  }
}

}  // namespace fastnorm::cuda
