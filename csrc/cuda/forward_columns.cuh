// The forward pass over a piece of columns whose statistics are known, as forward_rows.cuh.
#pragma once

#include "columns.cuh"
#include "forward.cuh"

namespace fastnorm::cuda {

template <class T, int W>
struct ForwardPacks {
  Pack<T, W> x, residual;
};

// One pack at a place. All lanes of the warp take part where the mask is written, `in` or not.
template <Activation kAct, int W, class Tensors, class T, class A>
FASTNORM_DEVICE void forward_place(const Tensors& t, const ColumnsPiece<W>& piece, const LaneCoefs<A, W>& coefs,
                                   const PackPlace& place, bool in, const ForwardPacks<T, W>& packs) {
  forward_pack<kAct>(t, packs.x, packs.residual, in, coefs, place.element,
                     [&] { return piece.mask_byte(t.mask, place.position); });
}

template <Activation kAct, int U, bool kFromEnd, int W, class Tensors, class Read, class A>
FASTNORM_DEVICE void forward_columns_of(const Tensors& t, const ColumnsPiece<W>& piece, const LaneCoefs<A, W>& coefs,
                                        Read read) {
  using Packs = ForwardPacks<std::remove_pointer_t<decltype(t.y)>, W>;
  const auto read_packs = [&](const PackPlace& place) {
    Packs packs{read(place), {}};  // zero, else a call without a residual would keep it from one place to the next
    if (t.residual != nullptr) packs.residual = load<W>(t.residual + place.element);
    return packs;
  };
  constexpr bool kSharesBytes = is_two_sided(kAct) && kLanesPerByte<W> > 1 && !is_plain_forward<Tensors>;
  if constexpr (kSharesBytes) {  // the lanes whose bits share a byte write it together
    piece.template walk_together<U, kFromEnd>(piece.whole(), [&](const PackPlace(&places)[U], const auto& taken) {
      Packs packs[U];
#pragma unroll
      for (int u = 0; u < U; ++u) {
        if (taken[u]) packs[u] = read_packs(places[u]);
      }
#pragma unroll
      for (int u = 0; u < U; ++u) forward_place<kAct>(t, piece, coefs, places[u], taken[u], packs[u]);
    });
  } else {
    piece.template walk_read<U, kFromEnd>(piece.whole(), read_packs, [&](const PackPlace& place, const Packs& packs) {
      forward_place<kAct>(t, piece, coefs, place, true, packs);
    });
  }
}

// read(place) gives this thread's pack of x there. A thread takes U packs at a time, or more.
template <bool kSmooth, int U, bool kFromEnd, int W, class T, class Read, class A = Accum<T>>
FASTNORM_DEVICE void forward_columns(const ForwardTensors<T>& t, const ColumnsPiece<W>& piece,
                                     const LaneCoefs<A, W>& coefs, Read read) {
  dispatch_forward<kSmooth, W>(t, [&](const auto& tensors, auto act) {
    constexpr int kPacks = kForwardPacks<kSmooth, U, std::remove_cvref_t<decltype(tensors)>>;
    forward_columns_of<act.value, kPacks, kFromEnd>(tensors, piece, coefs, read);
  });
}

}  // namespace fastnorm::cuda
