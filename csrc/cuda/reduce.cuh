// Reduce, forward.
//
// What: moments (count, mean, m2) of every piece of every set, relative to the set's first element.
// Who: rows: a team takes a piece.
//   Columns: a block takes a tile of channels of a piece of the positions, and the moments of each channel are one
//   partial.
// Traffic: reads x once, writes 16 bytes per piece.
// Needs: a piece has at most 2^20 packs (rows) or positions (columns), so that counts are exact and offsets fit 32
//   bits.
// Numerics: Accum<T>. A few packs are taken over their own mean; batches merge after Chan, Golub and LeVeque. The
//   order follows from the plan alone, so the same device gives the same bits.
// Why not one pass of sums and sums of squares: they cancel where the mean is large (mean 1e6, std 1: no digit left).
#pragma once

#include "columns_reduce.cuh"
#include "rows_moments.cuh"

namespace fastnorm::cuda {

template <class T, int W>
FASTNORM_KERNEL(kResidentThreads, 1)
reduce_rows(const T* x, Welford<Accum<T>>* partials, RowsShape shape) {
  using A = Accum<T>;
  for_rows<W>(shape, all_blocks(), [&](const Team& team, const RowsPiece<W>& piece, bool valid) {
    const A origin = origin_of<A>(x + piece.span.set * shape.set_stride);
    ThreadMoments<A> mine;
    accumulate_moments<T>(
        piece, piece.whole(team, valid), origin, [&](const Step& step) { return load<W>(piece.at(x, step)); }, mine);
    const Welford<A> total = merge_team(piece, team, mine, shared_memory());
    if (valid && team.lane == 0) store_one(partials + partial_of(shape, piece.span), total);
  });
}

template <class T, int W>
FASTNORM_KERNEL(kResidentThreads, 1)
reduce_columns(const T* x, Welford<Accum<T>>* partials, ColumnsShape shape) {
  using A = Accum<T>;
  for_columns<W>(shape, all_blocks(), [&](const ColumnsPiece<W>& piece) {
    A origin[W];
    load_origins(piece, x, origin);
    LaneMoments<A, W> moments;
    const auto read = [&](const PackPlace& place) { return load<W>(x + place.element); };
    piece.template walk<kMomentsRows>(piece.whole(),
                                      [&](const auto& places) { read_moments<T>(places, origin, read, moments); });
    merge_rows(piece, moments, reinterpret_cast<Moments<A>*>(shared_memory()),
               [&](int c, const Welford<A>& total) { store_one(partials + piece.partial(c), total); });
    sync_block();  // before the next item's moments overwrite these
  });
}

}  // namespace fastnorm::cuda
