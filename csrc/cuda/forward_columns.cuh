// The forward pass over a piece of columns whose statistics are known, as forward_rows.cuh.
#pragma once

#include "columns.cuh"
#include "forward.cuh"

namespace fastnorm::cuda {

// One pack at a place. All lanes of the warp take part where the mask is written, `in` or not.
template <Activation kAct, int W, class Tensors, class T, class A>
FASTNORM_DEVICE void forward_place(const Tensors& t, const ColumnsPiece<W>& piece, const LaneCoefs<A, W>& coefs,
                                   const PackPlace& place, bool in, const Pack<T, W>& x) {
  Pack<T, W> residual{};  // else that of a call without one would be kept from one place to the next
  if (t.residual != nullptr && in) residual = load<W>(t.residual + place.element);
  forward_pack<kAct>(t, x, residual, in, coefs, place.element, [&] { return piece.mask_byte(t.mask, place.position); });
}

template <Activation kAct, int U, bool kFromEnd, int W, class Tensors, class Read, class A>
FASTNORM_DEVICE void forward_columns_of(const Tensors& t, const ColumnsPiece<W>& piece, const LaneCoefs<A, W>& coefs,
                                        Read read) {
  constexpr bool kSharesBytes = is_two_sided(kAct) && kLanesPerByte<W> > 1 && !is_plain_forward<Tensors>;
  if constexpr (kSharesBytes) {  // the lanes whose bits share a byte write it together
    piece.template walk_together<1, kFromEnd>(piece.whole(), [&](const PackPlace(&places)[1], const auto& taken) {
      decltype(read(places[0])) x;
      if (taken[0]) x = read(places[0]);
      forward_place<kAct>(t, piece, coefs, places[0], taken[0], x);
    });
  } else {
    piece.template walk_read<U, kFromEnd>(piece.whole(), read, [&](const PackPlace& place, const auto& x) {
      forward_place<kAct>(t, piece, coefs, place, true, x);
    });
  }
}

// read(place) gives this thread's pack of x there. A thread takes U packs at a time.
template <bool kSmooth, int U, bool kFromEnd, int W, class T, class Read, class A = Accum<T>>
FASTNORM_DEVICE void forward_columns(const ForwardTensors<T>& t, const ColumnsPiece<W>& piece,
                                     const LaneCoefs<A, W>& coefs, Read read) {
  dispatch_forward<kSmooth, W>(t, [&](const auto& tensors, auto act) {
    forward_columns_of<act.value, U, kFromEnd>(tensors, piece, coefs, read);
  });
}

}  // namespace fastnorm::cuda
