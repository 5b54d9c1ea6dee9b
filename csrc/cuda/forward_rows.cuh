// The forward pass over a piece of rows whose statistics are known: it writes y and the mask. apply, which reads x from
// global memory, and fused, which has x in shared memory, use it.
#pragma once

#include "forward.cuh"
#include "rows.cuh"

namespace fastnorm::cuda {

// From x (and residual) to y (and mask) for N packs, which are read before the first is used. Lanes that share a byte
// of the mask all take part, `in` or not. kClears: packs that are not read are zero; else registers would keep them
// from an earlier call, for which apply, with several under way, has none left.
template <Activation kAct, bool kClears, int N, int W, class Tensors, class Coefs, class Read>
FASTNORM_DEVICE void forward_steps(const Tensors& t, const RowsPiece<W>& piece, const Step (&steps)[N], Coefs& coefs,
                                   Read read) {
  using T = std::remove_pointer_t<decltype(t.y)>;
  using A = Accum<T>;
  Pack<T, W> x[N], residual[N];
  if constexpr (kClears) {
#pragma unroll
    for (int u = 0; u < N; ++u) x[u] = residual[u] = {};
  }
  const auto load_residual = [&](int u) {
    if (steps[u].in) residual[u] = load<W>(piece.at(t.residual, steps[u]));
  };
#pragma unroll
  for (int u = 0; u < N; ++u) {
    if (steps[u].in) x[u] = read(steps[u]);
  }
  if (N > 1 && t.residual != nullptr) {
#pragma unroll
    for (int u = 0; u < N; ++u) load_residual(u);
  }
#pragma unroll
  for (int u = 0; u < N; ++u) {
    coefs.move_to(steps[u]);
    A values[W], z[W];
    widen<A>(x[u], values);
    normalize(values, coefs.now(), z);
    if (t.residual != nullptr) {
      if (N == 1) load_residual(u);  // in one branch with its use
      add_residual(residual[u], z);
    }
    if constexpr (is_two_sided(kAct)) {
      if (t.mask != nullptr) store_mask<W>(t.mask + piece.mask_byte(steps[u]), upper_side<kAct>(z), steps[u].in);
    }
    activate_pack<kAct, T>(t.epilogue.param, z);
    if (steps[u].in) store(piece.at(t.y, steps[u]), narrow<T>(z));
  }
}

// kUnroll: packs under way, 1 where `read` reads shared memory. Threads that write a byte of the mask together make the
// same rounds.
template <bool kSmooth, bool kFromEnd, int kUnroll, int W, class T, class Coefs, class Read>
FASTNORM_DEVICE void forward_rows_with(const ForwardTensors<T>& t, const RowsPiece<W>& piece, const ThreadSteps& range,
                                       Coefs& coefs, Read read) {
  constexpr bool kStaged = kUnroll == 1 && !kFromEnd, kByRun = std::is_same_v<Coefs, RunCoefsReader<T, W>>;
  const auto call = [&](const auto& tensors, auto act) {
    constexpr bool kShares = is_two_sided(act.value) && kLanesPerByte<W> > 1;
    constexpr bool kPlain = is_plain_forward<std::remove_cvref_t<decltype(tensors)>>;
    constexpr bool kBatches = kStaged && !kSmooth && kByRun && !kPlain;  // others have no registers for it
    if constexpr (kStaged && !kBatches && (!kShares || kPlain)) {
      piece.for_steps(range, [&](const Step& step) {
        const Step steps[1] = {step};
        forward_steps<act.value, kFromEnd>(tensors, piece, steps, coefs, read);
      });
    } else {
      piece.template walk<kBatches ? kResidualPacks : kUnroll, kFromEnd>(
          range, [&](const auto& steps) { forward_steps<act.value, kFromEnd>(tensors, piece, steps, coefs, read); });
    }
  };
  // Only fused kernels have a loop for plain calls, and only of runs of one channel: of the others most are in
  // registers.
  if constexpr (kStaged && kByRun) {
    dispatch_forward<kSmooth, W>(t, call);
  } else {
    dispatch_activation<kSmooth>(t.epilogue.activation, [&](auto act) { call(t, act); });
  }
}

// read(step) gives the pack of x there; `first` are the parameters of the piece's first channel.
template <bool kSmooth, bool kFromEnd, int kUnroll, int W, class T, class Read, class A = Accum<T>>
FASTNORM_DEVICE void forward_rows(const ForwardTensors<T>& t, const RowsPiece<W>& piece, const ThreadSteps& range,
                                  const SetStats<A>& stats, const ChannelParams<A>& first, Read read) {
  with_coefs<T>(piece, stats, t.weight, t.bias, first,
                [&](auto&& coefs) { forward_rows_with<kSmooth, kFromEnd, kUnroll>(t, piece, range, coefs, read); });
}

}  // namespace fastnorm::cuda
