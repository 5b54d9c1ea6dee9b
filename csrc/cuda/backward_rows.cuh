// The two halves of backward over a piece of rows: the sums over d and d (x - mean), and the gradients. Shared by the
// split kernels, which read global memory twice, and the fused ones, which stage it.
#pragma once

#include "backward.cuh"
#include "rows.cuh"

namespace fastnorm::cuda {

template <int W, class T>
FASTNORM_DEVICE GradientPacks<T, W> load_gradient(const BackwardTensors<T>& t, const RowsPiece<W>& piece,
                                                  const Step& step) {
  return load_gradient<W>(t, piece.element(step), [&] { return piece.mask_bits(t.mask, step); });
}

// Adds this thread's part of the sums over a range to `total`, U packs at a time. keep(step, x, d) sees every pack.
template <bool kSmooth, int U, int W, class T, class Read, class Keep, class A = Accum<T>>
FASTNORM_DEVICE void accumulate_sums(const BackwardTensors<T>& t, const RowsPiece<W>& piece, const ThreadSteps& range,
                                     const SetStats<A>& stats, Read read, Keep keep, GradSums<A>& total) {
  RowCoefsReader<T, W> coefs(stats, t.weight, t.bias);
  dispatch_activation<kSmooth>(t.epilogue.activation, [&](auto act) {
    piece.template walk_read<U>(range, read, [&](const Step& step, const GradientPacks<T, W>& packs) {
      const RowCoefs<A, W>& c = coefs.at(piece, step);
      A x[W], d[W];
      gradient<act.value>(t, packs, c, x, d);
      keep(step, x, d);
      if (piece.shape.per_element) {  // cells of one element, so their weights go in here
#pragma unroll
        for (int w = 0; w < W; ++w) d[w] *= c.scale[w];
      }
      total.merge(pack_sums(x, d, c));
    });
  });
}

// dx and dresidual of a piece, U packs at a time.
template <bool kSmooth, bool kFromEnd, int U, int W, class T, class Read, class A = Accum<T>>
FASTNORM_DEVICE void apply_gradient_rows(const BackwardTensors<T>& t, const RowsPiece<W>& piece,
                                         const ThreadSteps& range, const SetStats<A>& stats, const InputTerms<A>& terms,
                                         Read read) {
  RowCoefsReader<T, W> coefs(stats, t.weight, t.bias);
  dispatch_activation<kSmooth>(t.epilogue.activation, [&](auto act) {
    piece.template walk_read<U, kFromEnd>(range, read, [&](const Step& step, const GradientPacks<T, W>& packs) {
      const RowCoefs<A, W>& c = coefs.at(piece, step);
      A x[W], d[W];
      gradient<act.value>(t, packs, c, x, d);
      store_gradients(t, x, d, c, SharedTerms<A>{terms}, piece.element(step));
    });
  });
}

}  // namespace fastnorm::cuda
