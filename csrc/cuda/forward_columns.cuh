// The forward pass over a piece of columns whose statistics are known, as forward_rows.cuh.
#pragma once

#include "columns.cuh"
#include "forward.cuh"

namespace fastnorm::cuda {

// read(position) gives this thread's pack of x there.
template <bool kSmooth, bool kFromEnd, int W, class T, class Read, class A = Accum<T>>
FASTNORM_DEVICE void forward_columns(const ForwardTensors<T>& t, const ColumnsPiece<W>& piece,
                                     const LaneCoefs<A, W>& coefs, Read read) {
  constexpr int U = kApplyUnroll<kSmooth, W>;
  dispatch_activation<kSmooth>(t.epilogue.activation, [&](auto act) {
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
        forward_pack<act.value>(t, x[u], residual[u], in[u], coefs, piece.element(position[u]),
                                piece.mask_byte(t.mask, position[u]));
      }
    });
  });
}

}  // namespace fastnorm::cuda
