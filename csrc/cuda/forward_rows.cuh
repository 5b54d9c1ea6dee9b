// The forward pass over a piece of rows whose statistics are known: it writes y and the mask. apply, which reads x from
// global memory, and fused, which has x in shared memory, use it.
#pragma once

#include "forward.cuh"
#include "rows.cuh"

namespace fastnorm::cuda {

// N packs, which are read before the first is used.
template <Activation kAct, int N, int W, class T, class Coefs, class Read>
FASTNORM_DEVICE void forward_steps(const ForwardTensors<T>& t, const RowsPiece<W>& piece, const Step (&steps)[N],
                                   Coefs& coefs, Read read) {
  Pack<T, W> x[N], residual[N];
#pragma unroll
  for (int u = 0; u < N; ++u) {
    if (steps[u].in) x[u] = read(steps[u]);
  }
  if (t.residual != nullptr) {
#pragma unroll
    for (int u = 0; u < N; ++u) {
      if (steps[u].in) residual[u] = load<W>(t.residual + piece.element(steps[u]));
    }
  }
#pragma unroll
  for (int u = 0; u < N; ++u) {
    coefs.move_to(steps[u]);
    forward_pack<kAct>(t, x[u], residual[u], steps[u].in, coefs.now(), piece.element(steps[u]),
                       [&] { return t.mask + piece.mask_byte(steps[u]); });
  }
}

// kUnroll: packs under way, 1 where `read` reads shared memory. Threads that write a byte of the mask together make the
// same rounds.
template <bool kSmooth, bool kFromEnd, int kUnroll, int W, class T, class Coefs, class Read>
FASTNORM_DEVICE void forward_rows_with(const ForwardTensors<T>& t, const RowsPiece<W>& piece, const ThreadSteps& range,
                                       Coefs& coefs, Read read) {
  dispatch_activation<kSmooth>(t.epilogue.activation, [&](auto act) {
    if constexpr (kUnroll == 1 && !kFromEnd && (W == 8 || kSmooth)) {
      piece.for_steps(range, [&](const Step& step) {
        const Step steps[1] = {step};
        forward_steps<act.value>(t, piece, steps, coefs, read);
      });
    } else {
      piece.template walk<kUnroll, kFromEnd>(
          range, [&](const auto& steps) { forward_steps<act.value>(t, piece, steps, coefs, read); });
    }
  });
}

// read(step) gives the pack of x there; `first` are the parameters of the piece's first channel.
template <bool kSmooth, bool kFromEnd, int kUnroll, int W, class T, class Read, class A = Accum<T>>
FASTNORM_DEVICE void forward_rows(const ForwardTensors<T>& t, const RowsPiece<W>& piece, const ThreadSteps& range,
                                  const SetStats<A>& stats, const ChannelParams<A>& first, Read read) {
  const ForwardTensors<T> here = t.moved(piece.base, piece.mask_base);
  with_coefs<T>(piece, stats, t.weight, t.bias, first,
                [&](auto&& coefs) { forward_rows_with<kSmooth, kFromEnd, kUnroll>(here, piece, range, coefs, read); });
}

}  // namespace fastnorm::cuda
