// Reduce, forward.
//
// What: moments (count, mean, m2) of every piece of every set, relative to the set's first element.
// Who: rows: a team takes a piece; columns: a block takes a tile of channels of a piece of the positions, and each
//   channel's moments are a partial of their own.
// Traffic: reads x once, writes 12 bytes a piece.
// Needs: a piece of at most 2^20 packs (rows) or positions (columns): counts are exact, offsets fit 32 bits.
// Numerics: Accum<T>. kUnroll packs are taken over their own mean, batches merge after Chan, Golub and LeVeque; the
//   order follows from the plan alone, so the same device gives the same bits.
// Why not one pass of sums and sums of squares: where the mean is large they cancel (mean 1e6, std 1: no digit left).
#pragma once

#include "columns.cuh"

namespace fastnorm::cuda {

template <class T, int W>
FASTNORM_KERNEL(kBlockThreads, 2)
reduce_rows(const T* x, Welford<Accum<T>>* partials, RowsShape shape) {
  using A = Accum<T>;
  const Team team(shape.team);
  const int teams = block_threads() / team.width;
  for (int64_t first = block_index() * teams; first < shape.items; first += grid_blocks() * teams) {
    const bool valid = first + team.index < shape.items;
    const RowsPiece<W> piece(shape, valid ? first + team.index : first);
    const Span& span = piece.span;
    const A origin = origin_of<A>(x + span.set * shape.set_stride);
    const Welford<A> mine =
        accumulate_moments<kUnroll>(piece, piece.whole(team, valid), x, origin, [](const Place&, const Pack<T, W>&) {});
    const Welford<A> total = reduce_team(team, mine, shared_memory());
    if (valid && team.lane == 0) store_one(partials + partial_of(shape, span), total);
  }
}

template <class T, int W>
FASTNORM_KERNEL(kBlockThreads, 2)
reduce_columns(const T* x, Welford<Accum<T>>* partials, ColumnsShape shape) {
  using A = Accum<T>;
  auto* merged = reinterpret_cast<Moments<A>*>(shared_memory());
  for (int64_t item = block_index(); item < shape.items; item += grid_blocks()) {
    const ColumnsPiece<W> piece(shape, item);
    A origin[W];
    load_origins(piece, x, origin);
    Moments<A> moments[W];
    accumulate_lanes(piece, x, origin, moments, [](int, const Pack<T, W>&) {});
    merge_moments_down(piece, moments, merged, [&](int c, const Moments<A>& total) {
      store_one(partials + piece.partial(c), Welford<A>{static_cast<A>(piece.positions), total});
    });
    sync_block();  // before the next item's moments are written
  }
}

}  // namespace fastnorm::cuda
