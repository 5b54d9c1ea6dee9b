// Apply, backward.
//
// What: dx = scale * d - (offset + xhat * slope), dresidual = d; terms as folded, or none where statistics are given.
// Who: the pieces of the plan's `apply` grid.
// Traffic: reads dy, x (and residual or mask) once, writes dx (and dresidual) once.
#pragma once

#include "backward.cuh"

namespace fastnorm::cuda {

template <class A>
FASTNORM_DEVICE SetTerms<A> load_terms(const SetTerms<A>* terms, int64_t set) {
  return terms == nullptr ? SetTerms<A>{} : load_one(terms + set);
}

template <class T, int W, bool kSmooth>
FASTNORM_KERNEL(kBlockThreads, 2)
apply_backward_rows(BackwardTensors<T> t, const SetTerms<Accum<T>>* terms, RowsShape shape) {
  const Team team(shape.team);
  const int teams = block_threads() / team.width;
  for (int64_t first = block_index() * teams; first < shape.items; first += grid_blocks() * teams) {
    const bool valid = first + team.index < shape.items;
    const RowsPiece<W> piece(shape, valid ? first + team.index : first);
    const int64_t set = piece.span.set;
    apply_gradient_rows<kSmooth, kBackwardUnroll<kSmooth, W>>(
        t, piece, piece.whole(team, valid), load_stats(t.stats, t.sets, set), load_terms(terms, set),
        [&](const Place& place) { return load_gradient(t, piece, place); });
  }
}

template <class T, int W, bool kSmooth>
FASTNORM_KERNEL(kBlockThreads, 2)
apply_backward_columns(BackwardTensors<T> t, const SetTerms<Accum<T>>* terms, ColumnsShape shape) {
  using A = Accum<T>;
  for (int64_t item = block_index(); item < shape.items; item += grid_blocks()) {
    const ColumnsPiece<W> piece(shape, item);
    LaneCoefs<A, W> coefs;
    load_lane_coefs(t, piece, coefs);
    LaneTerms<A, W> lane_terms{};
#pragma unroll
    for (int w = 0; w < W; ++w) {
      if (piece.in) lane_terms.lane[w] = load_terms(terms, piece.set(w));
    }
    apply_gradient_columns<kSmooth, kBackwardUnroll<kSmooth, W>>(
        t, piece, coefs, lane_terms, [&](int position) { return load_gradient(t, piece, position); });
  }
}

}  // namespace fastnorm::cuda
