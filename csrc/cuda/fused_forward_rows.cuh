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
//   write 8 bytes per piece and channel, and each block reads all partials of its gang, or its share of them and then
//   the sums that its peers made (Exchange in plan/types.h). Columns: what a piece has beyond Grid::staged_length is
//   read twice, the second time from L2 as far as that has kept it.
// Needs: what is read once fits shared memory; the blocks of a gang are co-resident; float32 accumulation.
// Numerics: moments as reduce.cuh takes them. Every block merges the partials of its gang in the same order.
// Why not registers: their number would be a template parameter, and every size of a set a kernel of its own.
// Why not loads through registers: they bound the bytes under way to 32 KB per SM, and asynchronous copies do not.
#pragma once

#include "forward_rows.cuh"
#include "gang.cuh"
#include "rows_moments.cuh"
#include "rows_staging.cuh"

namespace fastnorm::cuda {

template <class T, int W, bool kSmooth>
FASTNORM_KERNEL(kResidentThreads, 1)
fused_forward_rows(ForwardTensors<T> t, RowsShape shape, FusedShape f) {
  using A = Accum<T>;
  const Team team(shape.team_shift);
  const int teams = block_threads() >> shape.team_shift;
  unsigned char* const mine = shared_memory() + team.index * f.team_bytes;
  unsigned char* const scratch = shared_memory() + teams * f.team_bytes;
  GangPartials<Moments<A>, A> gang(f, scratch + ladder_bytes(block_threads(), sizeof(A)), 1);
  const auto memory_of = [&](int stage) { return reinterpret_cast<Pack<T, W>*>(mine + stage * f.stream_bytes); };
  // Converted when they are used: not before the copies are on their way.
  struct Prepared {
    T origin;
    ChannelParams<A> first;
  };
  const auto prepare = [&](int64_t item) {
    const RowsPiece<W> piece(shape, item < shape.items ? item : 0);
    return Prepared{load_one(t.x + piece.span.set * shape.set_stride), channel_params<T>(piece, t.weight, t.bias)};
  };
  const auto load_piece = [&](int64_t item, int stage) {
    const bool valid = item < shape.items;
    const RowsPiece<W> piece(shape, valid ? item : 0);
    stage_rows<T, W>(piece, team, valid, {{t.x, memory_of(stage)}});
    const bool in_batches = !kSmooth && !shape.per_element;  // forward_rows_with
    if (t.residual != nullptr && !in_batches && valid) prefetch_rows(piece, team, t.residual);
  };
  const auto use_wave = [&](int64_t item, const Prepared& prepared, int stage, int parity, auto ready) {
    const bool valid = item < shape.items;
    const RowsPiece<W> piece(shape, valid ? item : 0);
    const int64_t set = piece.span.set;
    const Pack<T, W>* const staged = memory_of(stage);
    const Slots<W> slots(piece, t.x);
    const auto read = [&](const Step& step) { return staged[slots(step)]; };
    const A origin = as_origin(widen<A>(prepared.origin));
    ThreadMoments<A> own;
    for_landed(piece, team, valid, ready,
               [&](const ThreadSteps& range) { accumulate_moments<T>(piece, range, origin, read, own); });
    const Moments<A> moments = gang.exchange(parity, merge_team(piece, team, own, scratch).moments, [&](int each) {
      return static_cast<A>(Span(shape, each).packs_of_runs() * W);
    });
    const A var = moments.m2 / static_cast<A>(shape.set_size);
    const SetStats<A> stats = finish_stats(moments.mean, var, origin, t.eps);
    if (valid && team.lane == 0 && piece.span.piece == 0) {
      store_stats(t.stats, t.sets, set, stats, var);
      store_running(t.running, set, stats.mean, var);
    }
    if (t.y != nullptr) {
      forward_rows<kSmooth, false, 1>(t, piece, piece.whole(team, valid), stats, prepared.first, read);
    }
    release_staged<W>(team);
  };
  for_waves(
      f, shape.items, grid_blocks() * teams, block_index() * teams + team.index, prepare, load_piece,
      [&] { gang.begin(); }, use_wave);
  gang.exit();
}

}  // namespace fastnorm::cuda
