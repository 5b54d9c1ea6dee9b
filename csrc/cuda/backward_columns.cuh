// The two halves of backward over a piece of columns, as backward_rows.cuh.
#pragma once

#include "backward.cuh"
#include "columns.cuh"

namespace fastnorm::cuda {

template <int W, class T>
FASTNORM_DEVICE GradientPacks<T, W> load_gradient(const BackwardTensors<T>& t, const ColumnsPiece<W>& piece,
                                                  int position) {
  return load_gradient<W>(t, piece.element(position), [&] { return piece.mask_bits(t.mask, position); });
}

template <int W, class T, class A>
FASTNORM_DEVICE void load_lane_coefs(const BackwardTensors<T>& t, const ColumnsPiece<W>& piece,
                                     LaneCoefs<A, W>& coefs) {
  SetStats<A> stats[W] = {};
  if (piece.in) {
#pragma unroll
    for (int w = 0; w < W; ++w) stats[w] = load_stats(t.stats, t.sets, piece.set(w));
  }
  load_lane_coefs<T>(piece, stats, t.weight, t.bias, coefs);
}

// Adds this thread's part of a range to its channels' sums. keep(position, d) sees every pack.
template <bool kSmooth, int U, int W, class T, class Read, class Keep, class A = Accum<T>>
FASTNORM_DEVICE void accumulate_lane_sums(const BackwardTensors<T>& t, const ColumnsPiece<W>& piece, const Range& range,
                                          const LaneCoefs<A, W>& coefs, Read read, Keep keep, GradSums<A> (&sums)[W]) {
  dispatch_activation<kSmooth>(t.epilogue.activation, [&](auto act) {
    piece.template walk_read<U>(range, read, [&](int position, const GradientPacks<T, W>& packs) {
      A x[W], d[W];
      gradient<act.value>(t, packs, coefs, x, d);
      keep(position, d);
#pragma unroll
      for (int w = 0; w < W; ++w) sums[w].merge({d[w], d[w] * (x[w] - coefs.lane[w].mean)});
    });
  });
}

template <bool kSmooth, bool kFromEnd, int U, int W, class T, class Read, class A = Accum<T>>
FASTNORM_DEVICE void apply_gradient_columns(const BackwardTensors<T>& t, const ColumnsPiece<W>& piece,
                                            const LaneCoefs<A, W>& coefs, const LaneTerms<A, W>& terms, Read read) {
  dispatch_activation<kSmooth>(t.epilogue.activation, [&](auto act) {
    piece.template walk_read<U, kFromEnd>(piece.whole(), read, [&](int position, const GradientPacks<T, W>& packs) {
      A x[W], d[W];
      gradient<act.value>(t, packs, coefs, x, d);
      store_gradients(t, x, d, coefs, terms, piece.element(position));
    });
  });
}

}  // namespace fastnorm::cuda
