// The two halves of backward over a piece of rows: the sums over d and d (x - mean), and the gradients. Shared by the
// split kernels, which read global memory twice, and the fused ones, which stage it. `here` are the tensors as they are
// seen from the piece's first element; `first` are the parameters of its first channel.
#pragma once

#include "backward.cuh"
#include "rows.cuh"

namespace fastnorm::cuda {

template <int W, class T>
FASTNORM_DEVICE GradientPacks<T, W> load_gradient(const BackwardTensors<T>& here, const RowsPiece<W>& piece,
                                                  const Step& step) {
  return load_gradient<W>(here, piece.element(step), [&] { return piece.mask_bits(here.mask, step); });
}

// Adds the sums over a pack to `total`.
template <int W, class A>
FASTNORM_DEVICE void add_sums(const A (&x)[W], const A (&d)[W], A mean, GradSums<A>& total) {
  constexpr int kSums = W < 2 ? 1 : 2;  // independent sums of products
  A products[kSums] = {};
#pragma unroll
  for (int w = 0; w < W; ++w) products[w % kSums] = std::fma(d[w], x[w] - mean, products[w % kSums]);
  total.d += tree_sum(d);
  total.d_centered += kSums == 1 ? products[0] : products[0] + products[kSums - 1];
}

// Adds the sums over one pack after the other to `total`.
template <Activation kAct, int W, class T, class Coefs, class A = Accum<T>>
struct StepSums {
  const BackwardTensors<T>& here;
  const RowsPiece<W>& piece;
  Coefs& coefs;
  A mean;

  // keep(step, x, d) sees them.
  template <class Keep>
  FASTNORM_DEVICE void add(const Step& step, const GradientPacks<T, W>& packs, Keep keep, GradSums<A>& total) const {
    constexpr bool kRecomputes = kAct != Activation::kNone && !is_two_sided(kAct);
    if (kRecomputes || (kAct != Activation::kNone && here.mask == nullptr) || piece.shape.per_element) {
      coefs.move_to(step);
    }
    A x[W], d[W];
    gradient<kAct>(here, packs, coefs.now(), x, d);
    keep(step, x, d);
    if (piece.shape.per_element) {  // cells of one element, so their weights go in here
#pragma unroll
      for (int w = 0; w < W; ++w) d[w] *= coefs.now()[w].scale;
    }
    add_sums(x, d, mean, total);
  }
};

// Calls body(sums) with the StepSums of the call's activation and coefficients.
template <bool kSmooth, int W, class T, class Body, class A = Accum<T>>
FASTNORM_DEVICE void with_sums(const BackwardTensors<T>& here, const RowsPiece<W>& piece, const SetStats<A>& stats,
                               const ChannelParams<A>& first, Body body) {
  with_coefs<T>(piece, stats, here.weight, here.bias, first, [&](auto&& coefs) {
    dispatch_activation<kSmooth>(here.epilogue.activation, [&](auto act) {
      body(StepSums<act.value, W, T, std::remove_reference_t<decltype(coefs)>>{here, piece, coefs, stats.mean});
    });
  });
}

// Calls body(use) for a piece whose set's terms are known: use(step, packs) stores dx and dresidual of a step.
template <bool kSmooth, int W, class T, class Body, class A = Accum<T>>
FASTNORM_DEVICE void with_gradients(const BackwardTensors<T>& here, const RowsPiece<W>& piece, const SetStats<A>& stats,
                                    const ChannelParams<A>& first, const InputTerms<A>& terms, Body body) {
  with_coefs<T>(piece, stats, here.weight, here.bias, first, [&](auto&& coefs) {
    dispatch_activation<kSmooth>(here.epilogue.activation, [&](auto act) {
      body([&](const Step& step, const GradientPacks<T, W>& packs) {
        coefs.move_to(step);
        A x[W], d[W];
        gradient<act.value>(here, packs, coefs.now(), x, d);
        store_gradients(here, x, d, coefs.now(), SharedTerms<A>{terms}, piece.element(step));
      });
    });
  });
}

}  // namespace fastnorm::cuda
