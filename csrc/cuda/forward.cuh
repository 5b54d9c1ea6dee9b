// The forward pass over a piece whose statistics are known: it writes y and the mask. apply, which reads x from global
// memory, and fused, which has x in shared memory, use it.
#pragma once

#include "columns.cuh"
#include "forward_args.cuh"
#include "rows.cuh"

namespace fastnorm::cuda {

// One pack: from x (and residual) to y (and mask). All lanes of the warp take part, `in` or not.
template <bool kSmooth, int W, class T, class Coefs, class A = Accum<T>>
FASTNORM_DEVICE void forward_pack(const ForwardTensors<T>& t, const Pack<T, W>& x, const Pack<T, W>& residual, bool in,
                                  const Coefs& coefs, int64_t element, uint8_t* mask_byte) {
  A values[W], added[W], z[W];
  widen<A>(x, values);
  widen_residual(t.residual != nullptr, residual, added);
  normalize(values, coefs, added, z);
  if (!kSmooth && t.mask != nullptr) store_mask<W>(mask_byte, upper_side(t.epilogue.activation, z), in);
  activate_pack<kSmooth>(t.epilogue, z);
  if (in) store(t.y + element, narrow<T>(z));
}

// read(step) gives the pack of x there.
template <bool kSmooth, bool kFromEnd, int W, class T, class Read, class A = Accum<T>>
FASTNORM_DEVICE void forward_rows(const ForwardTensors<T>& t, const RowsPiece<W>& piece, const ThreadSteps& range,
                                  const SetStats<A>& stats, Read read) {
  constexpr int U = kApplyUnroll<kSmooth, W>;
  RowCoefsReader<T, W> coefs(stats, t.weight, t.bias);
  piece.template walk<U, kFromEnd>(range, [&](const Step(&steps)[U]) {
    Pack<T, W> x[U] = {}, residual[U] = {};
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (!steps[u].in) continue;
      x[u] = read(steps[u]);
      if (t.residual != nullptr) residual[u] = load<W>(t.residual + piece.element(steps[u]));
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const Step& step = steps[u];
      const RowCoefs<A, W>& c = step.in ? coefs.at(piece, step) : coefs.last();
      forward_pack<kSmooth>(t, x[u], residual[u], step.in, c, piece.element(step), t.mask + piece.mask_byte(step));
    }
  });
}

// read(position) gives this thread's pack of x there.
template <bool kSmooth, bool kFromEnd, int W, class T, class Read, class A = Accum<T>>
FASTNORM_DEVICE void forward_columns(const ForwardTensors<T>& t, const ColumnsPiece<W>& piece,
                                     const LaneCoefs<A, W>& coefs, Read read) {
  constexpr int U = kApplyUnroll<kSmooth, W>;
  piece.template walk<U, kFromEnd>(piece.whole(), [&](const int (&position)[U], const bool (&in)[U]) {
    Pack<T, W> x[U] = {}, residual[U] = {};
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (!in[u]) continue;
      x[u] = read(position[u]);
      if (t.residual != nullptr) residual[u] = load<W>(t.residual + piece.element(position[u]));
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      forward_pack<kSmooth>(t, x[u], residual[u], in[u], coefs, piece.element(position[u]),
                            piece.mask_byte(t.mask, position[u]));
    }
  });
}

}  // namespace fastnorm::cuda
