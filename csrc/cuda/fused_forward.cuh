// Fused forward: reduce and apply in one launch. Between the two, x stays in the shared memory of a gang.
//
// What: as apply.cuh, with the statistics of x itself.
// Who: rows: a gang takes a set (a team of a block takes a small one). Columns: a gang takes a tile of whole sets.
//
//   block of a gang [ wave 0 ][ wave 1 ] ...   one piece per wave; with 2 stages wave 1 is loaded during wave 0
//   in a wave       moments of each copy group as it lands | exchange partials in the gang | normalize, activate, store
//
//   A thread reads back what it copied itself, so that staging needs no barrier; except where runs are not whole packs.
// Traffic: reads x (and residual) once, writes y (and a bit per element) once: the least there is. The gangs of a grid
//   write 12 bytes per piece and channel, and each block reads all partials of its gang.
// Needs: the pieces of a wave fit shared memory; the blocks of a gang are co-resident; float32 accumulation.
// Numerics: moments as reduce.cuh takes them. Every block merges the partials of its gang in the same order.
// Why not registers: their number would be a template parameter, and every size of a set a kernel of its own.
// Why not loads through registers: they bound the bytes under way to 32 KB per SM, and asynchronous copies do not.
#pragma once

#include "forward.cuh"
#include "gang.cuh"

namespace fastnorm::cuda {

template <class T, int W, bool kSmooth>
FASTNORM_KERNEL(kBlockThreads, 2)
fused_forward_rows(ForwardTensors<T> t, RowsShape shape, FusedShape f) {
  using A = Accum<T>;
  const Team team(shape.team);
  const int teams = block_threads() / team.width;
  unsigned char* const mine = shared_memory() + team.index * f.team_bytes;
  unsigned char* const scratch = shared_memory() + teams * f.team_bytes;
  const GangPartials<Welford<A>> gang(f, scratch + ladder_bytes(block_threads(), sizeof(A)), 1);
  const auto memory_of = [&](int stage) { return reinterpret_cast<Pack<T, W>*>(mine + stage * f.stream_bytes); };
  const auto load_group = [&](int64_t item, int stage, int copy_group) {
    const RowsPiece<W> piece(shape, item);
    stage_rows(piece, team, copy_group, t.x, memory_of(stage));
    if (t.residual != nullptr && copy_group == kCopyGroups - 1) prefetch_rows(piece, team, t.residual);
  };
  for_waves(f, shape.items, grid_blocks() * teams, block_index() * teams + team.index, load_group,
            [&](int64_t item, int stage, int parity, auto ready) {
              const bool valid = item < shape.items;
              const RowsPiece<W> piece(shape, valid ? item : 0);
              const int64_t set = piece.span.set;
              const Pack<T, W>* const staged = memory_of(stage);
              const auto read = [&](const Step& step) { return staged[piece.slot(step, t.x)]; };
              const A origin = origin_of<A>(t.x + set * shape.set_stride);
              Welford<A> own{};
              for_landed(piece, team, valid, ready, [&](const ThreadSteps& range) {
                accumulate_moments<kLaneUnroll<W>, T>(piece, range, origin, read, own);
              });
              const Moments<A> moments = gang.exchange(parity, reduce_team(team, own, scratch)).moments;
              const A var = moments.m2 / static_cast<A>(shape.set_size);
              const SetStats<A> stats = finish_stats(moments.mean, var, origin, t.eps);
              if (valid && team.lane == 0 && piece.span.piece == 0) store_stats(t.stats, t.sets, set, stats, var);
              if (t.y != nullptr) forward_rows<kSmooth, false>(t, piece, piece.whole(team, valid), stats, read);
              release_staged<W>(team);
            });
  gang.exit();
}

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
    if (piece.piece == 0) store_stats(t.stats, t.sets, piece.first_set() + s, set_stats[s], var);
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
