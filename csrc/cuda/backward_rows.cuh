// The two halves of backward over a piece of rows: the sums over d and d (x - mean), and the gradients. Shared by the
// split kernels, which read global memory twice, and the fused ones, which stage it.
// `first` are the parameters of the piece's first channel.
#pragma once

#include "backward.cuh"
#include "rows.cuh"

namespace fastnorm::cuda {

// Packs that a thread has under way where tensors are read from global memory: two or three of them at every step.
template <bool kSmooth, int W>
constexpr int kBackwardUnroll = kSmooth  ? 1
                                : W >= 4 ? 2
                                         : 4;

template <int W, class T>
FASTNORM_DEVICE GradientPacks<T, W> load_gradient(const BackwardTensors<T>& t, const RowsPiece<W>& piece,
                                                  const Step& step) {
  return load_gradient<W>(
      t, [&](const T* tensor) { return piece.at(tensor, step); }, [&] { return piece.mask_bits(t.mask, step); });
}

// x - mean and d = dy * act'(z) of a pack: from the mask's bits where forward saved them, else from z, computed again
// from x and residual.
template <Activation kAct, int W, class Tensors, class T, class Coefs, class A>
FASTNORM_DEVICE void centered_gradient(const Tensors& t, const GradientPacks<T, W>& packs, A mean, const Coefs& coefs,
                                       A (&centered)[W], A (&d)[W]) {
  widen<A>(packs.x, centered);
#pragma unroll
  for (int w = 0; w < W; ++w) {
    centered[w] -= mean;
    if (kAct != Activation::kNone) keep_in_register(centered[w]);
  }
  widen<A>(packs.dy, d);
  if constexpr (kAct != Activation::kNone) {
    if (is_two_sided(kAct) && t.mask != nullptr) return multiply_slope_bits<kAct>(t.epilogue.param, packs.bits, d);
    A z[W];
#pragma unroll
    for (int w = 0; w < W; ++w) z[w] = std::fma(centered[w], coefs[w].scale, coefs[w].bias);
    if (t.residual != nullptr) add_residual(packs.residual, z);
    multiply_slope<kAct, T>(t.epilogue.param, z, d);
  }
}

// Adds the sums of d and of d (x - mean) over a pack to `total`.
template <int W, class A>
FASTNORM_DEVICE void add_sums(const A (&centered)[W], const A (&d)[W], GradSums<A>& total) {
  constexpr int kSums = W < 2 ? 1 : 2;  // independent sums of products
  A products[kSums];
#pragma unroll
  for (int w = 0; w < W; ++w) {
    products[w % kSums] = w < kSums ? d[w] * centered[w] : std::fma(d[w], centered[w], products[w % kSums]);
  }
  total.d += tree_sum(d);
  total.d_centered += kSums == 1 ? products[0] : products[0] + products[kSums - 1];
}

// Stores dx and dresidual of a pack.
template <int W, class Tensors, class A, class Coefs>
FASTNORM_DEVICE void store_row_gradients(const Tensors& t, const RowsPiece<W>& piece, const Step& step,
                                         const A (&centered)[W], const A (&d)[W], const Coefs& coefs,
                                         const InputTerms<A>& terms) {
  using T = std::remove_pointer_t<decltype(t.dx)>;
  if (t.dresidual != nullptr) store(piece.at(t.dresidual, step), narrow<T>(d));
  if (t.dx == nullptr) return;
  A dx[W];
  if (t.frozen) {  // dx does not depend on x, not even on an infinite one
#pragma unroll
    for (int w = 0; w < W; ++w) dx[w] = coefs[w].scale * d[w];
  } else {
#pragma unroll
    for (int w = 0; w < W; ++w) {
      dx[w] = std::fma(coefs[w].scale, d[w], -std::fma(centered[w], terms.slope, terms.offset));
    }
  }
  store(piece.at(t.dx, step), narrow<T>(dx));
}

// Adds the sums over one pack after the other to `total`.
template <Activation kActivation, int W, class T, class Tensors, class Coefs, class A = Accum<T>>
struct StepSums {
  static constexpr Activation kAct = kActivation;
  // Whether a thread's coefficients may be those of one element. Such cells have no sums of their own.
  static constexpr bool kByElement = W == 1 || std::is_same_v<Coefs, ElementCoefsReader<T, W>>;

  const Tensors& t;
  const RowsPiece<W>& piece;
  Coefs& coefs;
  A mean;

  // keep(step, x - mean, d) sees them.
  template <class Keep>
  FASTNORM_DEVICE void add(const Step& step, const GradientPacks<T, W>& packs, Keep keep, GradSums<A>& total) const {
    constexpr bool kRecomputes = kAct != Activation::kNone && !is_two_sided(kAct);
    if (kRecomputes || (kAct != Activation::kNone && t.mask == nullptr) || piece.shape.per_element) {
      coefs.move_to(step);
    }
    A centered[W], d[W];
    centered_gradient<kAct>(t, packs, mean, coefs.now(), centered, d);
    keep(step, centered, d);
    if (kByElement && piece.shape.per_element) {  // cells of one element, so their weights go in here
#pragma unroll
      for (int w = 0; w < W; ++w) d[w] *= coefs.now()[w].scale;
    }
    add_sums(centered, d, total);
  }
};

// Activations that are frequent enough for a loop of plain calls: it takes a tenth of the instructions away, and some
// seconds of compilation.
constexpr bool is_frequent(Activation a) { return !is_smooth(a) || a == Activation::kSilu || a == Activation::kGelu; }

// Calls f(tensors, tag of the activation), with plain tensors where kPlain is set and the call is plain. Only runs of
// one channel have them: of the others most are in registers (register_backward.cuh).
template <bool kPlain, bool kSmooth, int W, class T, class Coefs, class F>
FASTNORM_DEVICE void dispatch_rows(const BackwardTensors<T>& t, const Coefs& /*coefs*/, F f) {
  dispatch_activation<kSmooth>(t.epilogue.activation, [&](auto act) {
    if constexpr (kPlain && W > 1 && is_frequent(act.value) && std::is_same_v<Coefs, RunCoefsReader<T, W>>) {
      if (t.is_plain()) return f(PlainBackward<T>(t), act);
    }
    f(t, act);
  });
}

// Calls body(sums) with the StepSums of the call's activation, tensors and coefficients.
template <bool kPlain, bool kSmooth, int W, class T, class Body, class A = Accum<T>>
FASTNORM_DEVICE void with_sums(const BackwardTensors<T>& t, const RowsPiece<W>& piece, const SetStats<A>& stats,
                               const ChannelParams<A>& first, Body body) {
  with_coefs<T>(piece, stats, t.weight, t.bias, first, [&](auto&& coefs) {
    dispatch_rows<kPlain, kSmooth, W>(t, coefs, [&](const auto& tensors, auto act) {
      using Sums =
          StepSums<act.value, W, T, std::remove_cvref_t<decltype(tensors)>, std::remove_cvref_t<decltype(coefs)>>;
      body(Sums{tensors, piece, coefs, stats.mean});
    });
  });
}

// Calls body(tensors, use) for a piece whose set's terms are known: use(step, packs) stores dx and dresidual of a step.
template <bool kPlain, bool kSmooth, int W, class T, class Body, class A = Accum<T>>
FASTNORM_DEVICE void with_gradients(const BackwardTensors<T>& t, const RowsPiece<W>& piece, const SetStats<A>& stats,
                                    const ChannelParams<A>& first, const InputTerms<A>& terms, Body body) {
  with_coefs<T>(piece, stats, t.weight, t.bias, first, [&](auto&& coefs) {
    dispatch_rows<kPlain, kSmooth, W>(t, coefs, [&](const auto& tensors, auto act) {
      body(tensors, [&](const Step& step, const GradientPacks<T, W>& packs) {
        coefs.move_to(step);
        A centered[W], d[W];
        centered_gradient<act.value>(tensors, packs, stats.mean, coefs.now(), centered, d);
        store_row_gradients(tensors, piece, step, centered, d, coefs.now(), terms);
      });
    });
  });
}

}  // namespace fastnorm::cuda
