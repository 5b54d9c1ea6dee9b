// The arguments of every backward kernel, typed; the gradient of one pack through the activation, its sums, and dx.
#pragma once

#include <type_traits>

#include "element.cuh"

namespace fastnorm::cuda {

template <class T>
struct BackwardTensors {
  using A = Accum<T>;
  const T* dy;
  const T* x;
  const T* residual;    // or null
  const uint8_t* mask;  // or null
  Params weight, bias;
  const A* stats;  // [kStatsRows, sets]
  int64_t sets;
  bool frozen;
  Epilogue<A> epilogue;
  T* dx;         // or null
  T* dresidual;  // or null

  BackwardTensors() = default;
  explicit BackwardTensors(const BackwardArgs& a)
      : dy(static_cast<const T*>(a.dy)),
        x(static_cast<const T*>(a.x)),
        residual(static_cast<const T*>(a.residual)),
        mask(a.mask),
        weight(a.weight),
        bias(a.bias),
        stats(static_cast<const A*>(a.stats)),
        sets(a.geometry.sets()),
        frozen(a.frozen),
        epilogue{a.activation, static_cast<A>(a.activation_param)},
        dx(static_cast<T*>(a.dx)),
        dresidual(static_cast<T*>(a.dresidual)) {}

  FASTNORM_DEVICE bool is_plain() const {
    return residual == nullptr && mask == nullptr && dresidual == nullptr && dx != nullptr && !frozen;
  }
};

// The tensors of a call that only wants dx, without residual, mask and given statistics: most calls. The functions
// below take either, and the compiler drops the branches.
template <class T>
struct PlainBackward {
  const T *dy, *x;
  Epilogue<Accum<T>> epilogue;
  T* dx;
  static constexpr const T* residual = nullptr;
  static constexpr const uint8_t* mask = nullptr;
  static constexpr T* dresidual = nullptr;
  static constexpr bool frozen = false;

  FASTNORM_DEVICE explicit PlainBackward(const BackwardTensors<T>& t)
      : dy(t.dy), x(t.x), epilogue(t.epilogue), dx(t.dx) {}
};

template <class Tensors>
constexpr bool is_plain_call = false;
template <class T>
constexpr bool is_plain_call<PlainBackward<T>> = true;

// Calls f(tensors, tag of the activation), with plain tensors where the call is and packs are wide. Call it around a
// loop over packs.
template <bool kSmooth, int W, class T, class F>
FASTNORM_DEVICE void dispatch_backward(const BackwardTensors<T>& t, F f) {
  dispatch_activation<kSmooth>(t.epilogue.activation, [&](auto act) {
    if constexpr (W > 1) {
      if (t.is_plain()) return f(PlainBackward<T>(t), act);
    }
    f(t, act);
  });
}

// The packs that backward reads for one step or position.
template <class T, int W>
struct GradientPacks {
  Pack<T, W> x, dy, residual;
  unsigned bits;
};

// x and d = dy * act'(z) of a pack, widened: from the mask's bits where forward saved them, else from z, computed again
// from x and residual.
template <Activation kAct, int W, class Tensors, class T, class Coefs, class A>
FASTNORM_DEVICE void gradient(const Tensors& t, const GradientPacks<T, W>& packs, const Coefs& coefs, A (&x)[W],
                              A (&d)[W]) {
  widen<A>(packs.x, x);
  widen<A>(packs.dy, d);
  if constexpr (kAct != Activation::kNone) {
    if (is_two_sided(kAct) && t.mask != nullptr) return multiply_slope_bits<kAct>(t.epilogue.param, packs.bits, d);
    A z[W];
    normalize(x, coefs, z);
    if (t.residual != nullptr) add_residual(packs.residual, z);
    multiply_slope<kAct, T>(t.epilogue.param, z, d);
  }
}

// dx and dresidual of a pack.
template <int W, class Tensors, class A, class Coefs, class Terms>
FASTNORM_DEVICE void store_gradients(const Tensors& t, const A (&x)[W], const A (&d)[W], const Coefs& coefs,
                                     const Terms& terms, int64_t element) {
  using T = std::remove_pointer_t<decltype(t.dx)>;
  if (t.dresidual != nullptr) store(t.dresidual + element, narrow<T>(d));
  if (t.dx == nullptr) return;
  A dx[W];
  if (t.frozen) {  // dx does not depend on x, not even on an infinite one
#pragma unroll
    for (int w = 0; w < W; ++w) dx[w] = coefs[w].scale * d[w];
  } else {
    input_gradient(x, d, coefs, terms, dx);
  }
  store(t.dx + element, narrow<T>(dx));
}

// The mask's bits of a thread's packs, whose indices are first, first + width, ... < end. While some are used, those of
// the next packs are on their way: a byte at a time took a thread longer than a staged pack (H200: 2103 of 10492
// samples of a fused backward waited for one). bits_at(index) loads the bits of a pack.
template <class BitsAt>
class MaskReader {
 public:
  FASTNORM_DEVICE MaskReader(int first, int log_width, int end, BitsAt bits_at)
      : log_width_(log_width), begin_(first - (kAhead << log_width)), end_(end), bits_at_(bits_at) {
    load(first);
  }
  // Indices do not fall from one call to the next.
  FASTNORM_DEVICE unsigned operator()(int index) {
    const int batch = kAhead << log_width_;
    while (index - begin_ >= batch) {
      bits_ = 0;
#pragma unroll
      for (int i = 0; i < kAhead; ++i) bits_ |= ahead_[i] << (8 * i);
      begin_ += batch;
      load(begin_ + batch);
    }
    return bits_ >> (8 * ((index - begin_) >> log_width_));
  }

 private:
  static constexpr int kAhead = 4;

  FASTNORM_DEVICE void load(int first) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int index = first + (i << log_width_);
      ahead_[i] = index < end_ ? bits_at_(index) : 0;
    }
  }

  const int log_width_;
  int begin_;  // of the packs in bits_
  const int end_;
  BitsAt bits_at_;
  unsigned bits_ = 0, ahead_[kAhead];
};

// Reads all that backward needs of one pack from global memory; at(tensor) is its address, and bits() gives the mask's
// bits.
template <int W, class Tensors, class At, class Bits>
FASTNORM_DEVICE auto load_gradient(const Tensors& t, At at, Bits bits) {
  // Zero, else what the call lacks would be kept from one pack to the next.
  GradientPacks<std::remove_pointer_t<decltype(t.dx)>, W> packs{};
  packs.x = load<W>(at(t.x));
  packs.dy = load<W>(at(t.dy));
  if (t.residual != nullptr) packs.residual = load<W>(at(t.residual));
  if (t.mask != nullptr) packs.bits = bits();
  return packs;
}

}  // namespace fastnorm::cuda
