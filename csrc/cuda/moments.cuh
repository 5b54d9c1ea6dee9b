// How both traversals take moments: the number of packs that a thread has under way, and the origin of a set.
#pragma once

#include "element.cuh"

namespace fastnorm::cuda {

// Packs that a thread has under way. With two blocks per SM they are 32 KB, which keeps an H200's memory busy (4.8 TB/s
// for 0.7 us over 132 SMs is 25 KB). More of them where packs are single elements.
template <int W>
constexpr int kUnroll = W == 1 ? 8 : 4;
// Fewer where a thread also keeps several numbers per lane, so that nothing spills.
template <int W>
constexpr int kLaneUnroll = W == 8   ? 2
                            : W == 4 ? 4
                                     : 8;
// One where a smooth activation follows: with its polynomials for every element of several packs, compiling took
// minutes.
template <bool kSmooth, int W>
constexpr int kApplyUnroll = kSmooth ? 1 : kLaneUnroll<W>;
// Fewer in backward, which reads two or three tensors at every step.
template <bool kSmooth, int W>
constexpr int kBackwardUnroll = kSmooth || W == 8 ? 1
                                : W == 4          ? 2
                                                  : 4;

// The kernels take a set's numbers relative to its first element. The differences are of the size of the spread, so
// that where the mean is large the error of its last digit does not enter the variance.
template <class A>
FASTNORM_DEVICE A as_origin(A value) {
  return value - value == A(0) ? value : A(0);  // not finite: 0
}
template <class A, class T>
FASTNORM_DEVICE A origin_of(const T* first) {
  return as_origin(widen<A>(load_one(first)));
}

}  // namespace fastnorm::cuda
