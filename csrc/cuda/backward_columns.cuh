// The two halves of backward over a piece of columns, as backward_rows.cuh.
#pragma once

#include "backward.cuh"
#include "columns_reduce.cuh"

namespace fastnorm::cuda {

template <int W, class Tensors>
FASTNORM_DEVICE auto load_gradient(const Tensors& t, const ColumnsPiece<W>& piece, const PackPlace& place) {
  return load_gradient<W>(
      t, [&](const auto* tensor) { return tensor + place.element; }, [&] { return piece.mask_bits(t.mask, place); });
}

// The mask's bits down this thread's column, from the first position of a range to its last.
template <int W>
FASTNORM_DEVICE auto mask_reader(const uint8_t* mask, const ColumnsPiece<W>& piece, const Range& range) {
  const auto bits_at = [=, &piece](int position) { return piece.mask_bits(mask, {position, 0}); };
  return MaskReader(range.begin + piece.y, piece.shape.log_threads_y, mask != nullptr && piece.in ? range.end : 0,
                    bits_at);
}

template <int W, class T, class A = Accum<T>>
FASTNORM_DEVICE LaneCoefs<A, W> load_lane_coefs(const BackwardTensors<T>& t, const ColumnsPiece<W>& piece) {
  SetStats<A> stats[W];
  load_lane_stats(piece, t.stats, t.sets, stats);
  return lane_coefs(stats, LaneParams<A, W>::template load<T>(piece, t.weight, t.bias));
}

// Packs that a thread has under way where tensors are read from global memory.
template <bool kSmooth, int W>
constexpr int kGlobalRows = kSmooth && W == 8 ? 1 : 2;

// Packs that a thread has under way for each tensor: U, and two of a plain call, which needs fewer registers.
template <bool kSmooth, int U, class Tensors>
constexpr int kPacks = is_plain_call<std::remove_cvref_t<Tensors>> && !kSmooth ? std::max(2, U) : U;

// Adds packs at places below one another to the channels' sums. read(tensors, place) gives the packs there; keep(place,
// d) sees every pack.
template <Activation kAct, int W, class Tensors, class Places, class Read, class Keep, class A>
FASTNORM_DEVICE void add_sums(const Tensors& t, const Places& places, const LaneCoefs<A, W>& coefs, Read read,
                              Keep keep, LaneSums<A, W>& sums) {
  constexpr int U = std::extent_v<Places>;
  decltype(read(t, places[0])) packs[U];
#pragma unroll
  for (int u = 0; u < U; ++u) packs[u] = read(t, places[u]);
#pragma unroll
  for (int u = 0; u < U; ++u) {
    A x[W], d[W];
    gradient<kAct>(t, packs[u], coefs, x, d);
    keep(places[u], d);
#pragma unroll
    for (int w = 0; w < W; ++w) {
      sums.d[w] += d[w];
      sums.d_centered[w] = std::fma(d[w], x[w] - coefs.lane[w].mean, sums.d_centered[w]);
    }
  }
}

// dx and dresidual of a part of a piece.
template <Activation kAct, int U, bool kFromEnd, int W, class Tensors, class Read, class A>
FASTNORM_DEVICE void apply_gradient_columns_of(const Tensors& t, const ColumnsPiece<W>& piece, const Range& range,
                                               const LaneCoefs<A, W>& coefs, const LaneTerms<A, W>& terms, Read read) {
  piece.template walk_read<U, kFromEnd>(
      range, [&](const PackPlace& place) { return read(t, place); },
      [&](const PackPlace& place, const auto& packs) {
        A x[W], d[W];
        gradient<kAct>(t, packs, coefs, x, d);
        store_gradients(t, x, d, coefs, terms, place.element);
      });
}
template <bool kSmooth, int U, bool kFromEnd, int W, class T, class Read, class A = Accum<T>>
FASTNORM_DEVICE void apply_gradient_columns(const BackwardTensors<T>& t, const ColumnsPiece<W>& piece,
                                            const Range& range, const LaneCoefs<A, W>& coefs,
                                            const LaneTerms<A, W>& terms, Read read) {
  dispatch_backward<kSmooth, W>(t, [&](const auto& tensors, auto act) {
    apply_gradient_columns_of<act.value, kPacks<kSmooth, U, decltype(tensors)>, kFromEnd>(tensors, piece, range, coefs,
                                                                                          terms, read);
  });
}

}  // namespace fastnorm::cuda
