// Reduce, backward.
//
// What: sum of d and of d (x - mean) for every piece of every cell; of a set where weights change with every element,
//   then times rstd * weight (rows), or of d xhat down the rows for the weights themselves (columns, per_position).
// Who: as reduce.cuh; sets are the plan's `cells`.
// Traffic: reads dy, x (and residual or mask) once, writes 8 bytes a piece.
// Numerics: Accum<T>; a pack as a tree, a thread in its order, threads as a tree, pieces in double by fold. d (x -
// mean)
//   instead of d xhat: one rounding less an element.
#pragma once

#include "backward.cuh"

namespace fastnorm::cuda {

template <class T, int W, bool kSmooth>
FASTNORM_KERNEL(kBlockThreads, 2)
reduce_backward_rows(BackwardTensors<T> t, GradSums<Accum<T>>* sums, RowsShape shape) {
  const Team team(shape.team);
  const int teams = block_threads() / team.width;
  for (int64_t first = block_index() * teams; first < shape.items; first += grid_blocks() * teams) {
    const bool valid = first + team.index < shape.items;
    const RowsPiece<W> piece(shape, valid ? first + team.index : first);
    const auto stats = load_stats(t.stats, t.sets, piece.span.stats(shape));
    const auto mine = accumulate_sums<kSmooth>(
        t, piece, piece.whole(team, valid), stats, [&](const Place& place) { return load_gradient(t, piece, place); },
        [](const auto&...) {});
    const auto total = reduce_team(team, mine, shared_memory());
    if (valid && team.lane == 0) store_one(sums + partial_of(shape, piece.span), total);
  }
}

template <class T, int W, bool kSmooth>
FASTNORM_KERNEL(kBlockThreads, 2)
reduce_backward_columns(BackwardTensors<T> t, GradSums<Accum<T>>* sums, ColumnsShape shape) {
  using A = Accum<T>;
  auto* merged = reinterpret_cast<GradSums<A>*>(shared_memory());
  for (int64_t item = block_index(); item < shape.items; item += grid_blocks()) {
    const ColumnsPiece<W> piece(shape, item);
    LaneCoefs<A, W> coefs;
    load_lane_coefs(t, piece, coefs);
    GradSums<A> mine[W];
    accumulate_lane_sums<kSmooth>(t, piece, coefs, mine, [](int, const GradientPacks<T, W>&) {});
    merge_down(piece, mine, merged,
               [&](int c, const GradSums<A>& total) { store_one(sums + piece.partial(c), total); });
    sync_block();  // before the next item's sums are written
  }
}

// Statistics change with the position, weights with the channel: sums of d xhat for dweight, of d for dbias.
template <class T, int W, bool kSmooth>
FASTNORM_KERNEL(kBlockThreads, 2)
reduce_params(BackwardTensors<T> t, GradSums<Accum<T>>* sums, ColumnsShape shape) {
  using A = Accum<T>;
  auto* merged = reinterpret_cast<GradSums<A>*>(shared_memory());
  for (int64_t item = block_index(); item < shape.items; item += grid_blocks()) {
    const ColumnsPiece<W> piece(shape, item);
    A weight[W] = {}, bias[W] = {};
    if (piece.in) {
      load_params<T>(t.weight, piece.channel, A(1), weight);
      load_params<T>(t.bias, piece.channel, A(0), bias);
    }
    GradSums<A> mine[W] = {};
    piece.template walk<1>([&](const int (&position)[1], const bool (&in)[1]) {
      if (!in[0]) return;
      const GradientPacks<T, W> packs = load_gradient(t, piece, position[0]);
      // A pack lies in one group: its statistics are those of its first lane.
      const SetStats<A> s = load_stats(t.stats, t.sets, piece.set(0, position[0]));
      RowCoefs<A, W> coefs{s.mean, s.rstd, {}, {}};
#pragma unroll
      for (int w = 0; w < W; ++w) {
        const Affine<A> c = make_affine(s, weight[w], bias[w]);
        coefs.scale[w] = c.scale;
        coefs.bias[w] = c.bias;
      }
      A x[W], d[W];
      gradient<kSmooth>(t, packs, coefs, x, d);
#pragma unroll
      for (int w = 0; w < W; ++w) mine[w].merge({d[w], d[w] * ((x[w] - s.mean) * s.rstd - s.low * s.rstd)});
    });
    merge_down(piece, mine, merged,
               [&](int c, const GradSums<A>& total) { store_one(sums + piece.partial(c), total); });
    sync_block();  // before the next item's sums are written
  }
}

}  // namespace fastnorm::cuda
