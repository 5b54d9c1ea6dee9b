// The forward pass over a piece of rows whose statistics are known: it writes y and the mask. apply, which reads x from
// global memory, and fused, which has x in shared memory, use it.
#pragma once

#include "forward.cuh"
#include "rows.cuh"

namespace fastnorm::cuda {

// read(step) gives the pack of x there.
template <bool kSmooth, bool kFromEnd, int W, class T, class Read, class A = Accum<T>>
FASTNORM_DEVICE void forward_rows(const ForwardTensors<T>& t, const RowsPiece<W>& piece, const ThreadSteps& range,
                                  const SetStats<A>& stats, Read read) {
  constexpr int U = kApplyUnroll<kSmooth, W>;
  RowCoefsReader<T, W> coefs(stats, t.weight, t.bias);
  dispatch_activation<kSmooth>(t.epilogue.activation, [&](auto act) {
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
        forward_pack<act.value>(t, x[u], residual[u], step.in, c, piece.element(step), t.mask + piece.mask_byte(step));
      }
    });
  });
}

}  // namespace fastnorm::cuda
