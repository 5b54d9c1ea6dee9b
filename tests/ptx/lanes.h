// Arithmetic for all lanes of a warp: a function of one lane's values becomes an Execute.
#pragma once

#include <bit>
#include <utility>

#include "warp.h"

namespace fastnorm::ptx {

template <class F>
[[gnu::always_inline]] inline void for_lanes(Mask lanes, F f) {
  if (lanes == kAllLanes) {
#pragma GCC ivdep
    for (int lane = 0; lane < kLanes; ++lane) f(lane);
  } else {
    for (Mask left = lanes; left != 0; left &= left - 1) f(std::countr_zero(left));
  }
}

// out = F::of(in...), D and S being the types of out and in.
template <class F, class D, class... S>
void lanewise(Warp& warp, const Instruction& i, Mask lanes) {
  [&]<size_t... k>(std::index_sequence<k...>) {
    Kept<D>* const out = warp.lanes<Kept<D>>(i.out[0]);
    const auto in = std::make_tuple(static_cast<const Kept<S>*>(warp.lanes<Kept<S>>(i.in[k]))...);
    for_lanes(lanes, [&](int lane) { out[lane] = kept_of<D>(F::of(value_of<S>(std::get<k>(in)[lane])...)); });
  }(std::index_sequence_for<S...>{});
}

// The lanes in which F::of(a, b).
template <class F, class T>
Mask lanes_where(Warp& warp, const Instruction& i, Mask lanes) {
  const Kept<T>* const a = warp.lanes<Kept<T>>(i.in[0]);
  const Kept<T>* const b = warp.lanes<Kept<T>>(i.in[1]);
  Mask found = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    found |= static_cast<Mask>(F::of(value_of<T>(a[lane]), value_of<T>(b[lane]))) << lane;
  }
  return found & lanes;
}

}  // namespace fastnorm::ptx
