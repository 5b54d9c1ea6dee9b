// The two halves of backward over a piece: the sums over d and d (x - mean), and the gradients. Shared by the split
// kernels, which read global memory twice, and the fused ones, which stage it.
#pragma once

#include "backward_args.cuh"
#include "columns.cuh"
#include "rows.cuh"

namespace fastnorm::cuda {

// Reads all that backward needs of one pack from global memory; bits() gives the mask's bits.
template <int W, class T, class Bits>
FASTNORM_DEVICE GradientPacks<T, W> load_gradient(const BackwardTensors<T>& t, int64_t element, Bits bits) {
  GradientPacks<T, W> packs{};
  packs.x = load<W>(t.x + element);
  packs.dy = load<W>(t.dy + element);
  if (t.residual != nullptr) packs.residual = load<W>(t.residual + element);
  if (t.mask != nullptr) packs.bits = bits();
  return packs;
}
template <int W, class T>
FASTNORM_DEVICE GradientPacks<T, W> load_gradient(const BackwardTensors<T>& t, const RowsPiece<W>& piece,
                                                  const Step& step) {
  return load_gradient<W>(t, piece.element(step), [&] { return piece.mask_bits(t.mask, step); });
}
template <int W, class T>
FASTNORM_DEVICE GradientPacks<T, W> load_gradient(const BackwardTensors<T>& t, const ColumnsPiece<W>& piece,
                                                  int position) {
  return load_gradient<W>(t, piece.element(position), [&] { return piece.mask_bits(t.mask, position); });
}

// ---- rows ----

// Adds this thread's part of the sums over a range to `total`, U packs at a time. keep(step, x, d) sees every pack.
template <bool kSmooth, int U, int W, class T, class Read, class Keep, class A = Accum<T>>
FASTNORM_DEVICE void accumulate_sums(const BackwardTensors<T>& t, const RowsPiece<W>& piece, const ThreadSteps& range,
                                     const SetStats<A>& stats, Read read, Keep keep, GradSums<A>& total) {
  RowCoefsReader<T, W> coefs(stats, t.weight, t.bias);
  piece.template walk_read<U>(range, read, [&](const Step& step, const GradientPacks<T, W>& packs) {
    const RowCoefs<A, W>& c = coefs.at(piece, step);
    A x[W], d[W];
    gradient<kSmooth>(t, packs, c, x, d);
    keep(step, x, d);
    if (piece.shape.per_element) {  // cells of one element, so their weights go in here
#pragma unroll
      for (int w = 0; w < W; ++w) d[w] *= c.scale[w];
    }
    total.merge(pack_sums(x, d, c));
  });
}

// dx and dresidual of a piece, U packs at a time.
template <bool kSmooth, bool kFromEnd, int U, int W, class T, class Read, class A = Accum<T>>
FASTNORM_DEVICE void apply_gradient_rows(const BackwardTensors<T>& t, const RowsPiece<W>& piece,
                                         const ThreadSteps& range, const SetStats<A>& stats, const SetTerms<A>& terms,
                                         Read read) {
  RowCoefsReader<T, W> coefs(stats, t.weight, t.bias);
  piece.template walk_read<U, kFromEnd>(range, read, [&](const Step& step, const GradientPacks<T, W>& packs) {
    const RowCoefs<A, W>& c = coefs.at(piece, step);
    A x[W], d[W];
    gradient<kSmooth>(t, packs, c, x, d);
    store_gradients(t, x, d, c, SharedTerms<A>{terms}, piece.element(step));
  });
}

// ---- columns ----

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
  piece.template walk_read<U>(range, read, [&](int position, const GradientPacks<T, W>& packs) {
    A x[W], d[W];
    gradient<kSmooth>(t, packs, coefs, x, d);
    keep(position, d);
#pragma unroll
    for (int w = 0; w < W; ++w) sums[w].merge({d[w], d[w] * (x[w] - coefs.lane[w].mean)});
  });
}

template <bool kSmooth, bool kFromEnd, int U, int W, class T, class Read, class A = Accum<T>>
FASTNORM_DEVICE void apply_gradient_columns(const BackwardTensors<T>& t, const ColumnsPiece<W>& piece,
                                            const LaneCoefs<A, W>& coefs, const LaneTerms<A, W>& terms, Read read) {
  piece.template walk_read<U, kFromEnd>(piece.whole(), read, [&](int position, const GradientPacks<T, W>& packs) {
    A x[W], d[W];
    gradient<kSmooth>(t, packs, coefs, x, d);
    store_gradients(t, x, d, coefs, terms, piece.element(position));
  });
}

}  // namespace fastnorm::cuda
