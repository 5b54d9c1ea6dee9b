// Apply, forward.
//
// What: y = act((x - mean) * rstd * weight + bias + residual), and the mask's bits of a two-sided activation. The
//   statistics come from fold, or are given (evaluation) and then copied to `stats`.
// Who: the same threads as in reduce take the same pieces, from the last to the first: L2 still has what reduce read
//   last.
// Traffic: reads x (and residual) once, writes y (and a bit per element) once.
// Needs: pack divides every run and every address. Where packs are narrower than 8, the lanes that share a byte of the
//   mask are neighbours (RowsShape::length and ColumnsShape::tile see to it).
// Numerics: (x - mean) * scale + bias, not x * a + b: exact differences where the mean is large.
#pragma once

#include "forward_columns.cuh"
#include "forward_rows.cuh"

namespace fastnorm::cuda {

template <class T, int W, bool kSmooth>
FASTNORM_KERNEL(kBlockThreads, 2)
apply_rows(ForwardTensors<T> t, RowsShape shape) {
  using A = Accum<T>;
  for_rows<W>(shape, all_blocks(), [&](const Team& team, const RowsPiece<W>& piece, bool valid) {
    const bool writes = valid && team.lane == 0 && piece.span.piece == 0;
    const int64_t set = piece.span.set;
    const auto stats = t.frozen() ? given_stats(t, set, load_param_of<T>(t.running_mean, set, A(0)),
                                                load_param_of<T>(t.running_var, set, A(1)), writes)
                                  : load_stats(t.stats, t.sets, set);
    forward_rows<kSmooth, true>(t, piece, piece.whole(team, valid), stats,
                                [&](const Step& step) { return load<W>(t.x + piece.element(step)); });
  });
}

template <class T, int W, bool kSmooth>
FASTNORM_KERNEL(kBlockThreads, 2)
apply_columns(ForwardTensors<T> t, ColumnsShape shape) {
  using A = Accum<T>;
  for_columns<W>(shape, all_blocks(), [&](const ColumnsPiece<W>& piece) {
    const bool writes = piece.y == 0 && piece.piece == 0;
    SetStats<A> stats[W] = {};
    if (piece.in && t.frozen()) {
      A mean[W], var[W];
      load_params<T>(t.running_mean, piece.channel, A(0), mean);
      load_params<T>(t.running_var, piece.channel, A(1), var);
#pragma unroll
      for (int w = 0; w < W; ++w) stats[w] = given_stats(t, piece.channel + w, mean[w], var[w], writes);
    } else if (piece.in) {
#pragma unroll
      for (int w = 0; w < W; ++w) stats[w] = load_stats(t.stats, t.sets, piece.set(w));
    }
    LaneCoefs<A, W> coefs;
    load_lane_coefs<T>(piece, stats, t.weight, t.bias, coefs);
    forward_columns<kSmooth, true>(t, piece, coefs,
                                   [&](int position) { return load<W>(t.x + piece.element(position)); });
  });
}

}  // namespace fastnorm::cuda
