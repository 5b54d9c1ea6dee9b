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

#include "columns_reduce.cuh"
#include "forward_columns.cuh"
#include "forward_rows.cuh"

namespace fastnorm::cuda {

template <class T, int W, bool kSmooth>
FASTNORM_KERNEL(kResidentThreads, 1)
apply_rows(ForwardTensors<T> t, RowsShape shape) {
  using A = Accum<T>;
  for_rows<W>(shape, all_blocks(), [&](const Team& team, const RowsPiece<W>& piece, bool valid) {
    const bool writes = valid && team.lane == 0 && piece.span.piece == 0;
    const int64_t set = piece.span.set;
    const auto stats = t.frozen() ? given_stats(t, set, load_param_of<T>(t.running_mean, set, A(0)),
                                                load_param_of<T>(t.running_var, set, A(1)), writes)
                                  : load_stats(t.stats, t.sets, set);
    forward_rows<kSmooth, true, kSmooth ? 1 : kRowsUnroll<W>>(
        t, piece, piece.whole(team, valid), stats, channel_params<T>(piece, t.weight, t.bias),
        [&](const Step& step) { return load<W>(piece.at(t.x, step)); });
  });
}

template <class T, int W, bool kSmooth>
FASTNORM_KERNEL(kResidentThreads, 1)
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
    } else {
      load_lane_stats(piece, t.stats, t.sets, stats);
    }
    const auto params = LaneParams<A, W>::template load<T>(piece, t.weight, t.bias);
    forward_columns<kSmooth, kSmooth ? 2 : 4, true>(
        t, piece, lane_coefs(stats, params), [&](const PackPlace& place) { return load<W>(t.x + place.element); });
  });
}

}  // namespace fastnorm::cuda
