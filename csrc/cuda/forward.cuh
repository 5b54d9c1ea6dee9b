// The arguments of every forward kernel, typed; statistics that are given; the forward pass over one pack.
#pragma once

#include "element.cuh"

namespace fastnorm::cuda {

template <class T>
struct ForwardTensors {
  using A = Accum<T>;
  const T* x;
  const T* residual;  // or null
  T* y;               // or null: only the statistics are wanted
  uint8_t* mask;      // or null
  Params weight, bias;
  Params running_mean, running_var;  // frozen statistics, or null
  A* stats;                          // [kStatsRows, sets]
  RunningArgs running;               // those that the stats move; null pointers where they move none, or not set by set
  int64_t sets;
  A eps;
  Epilogue<A> epilogue;

  ForwardTensors() = default;
  explicit ForwardTensors(const ForwardArgs& a)
      : x(static_cast<const T*>(a.x)),
        residual(static_cast<const T*>(a.residual)),
        y(static_cast<T*>(a.y)),
        mask(a.mask),
        weight(a.weight),
        bias(a.bias),
        running_mean(a.running_mean),
        running_var(a.running_var),
        stats(static_cast<A*>(a.stats)),
        running(a.running.moves_set_by_set() ? a.running : RunningArgs{}),
        sets(a.geometry.sets()),
        eps(static_cast<A>(a.eps)),
        epilogue{a.activation, static_cast<A>(a.activation_param)} {}

  FASTNORM_DEVICE bool frozen() const { return running_mean.data != nullptr; }
  FASTNORM_DEVICE bool is_plain() const { return residual == nullptr && mask == nullptr; }
};

// The tensors of a call without residual and mask. forward_pack takes either, and the compiler drops the branches.
template <class T>
struct PlainForward {
  T* y;
  Epilogue<Accum<T>> epilogue;
  static constexpr const T* residual = nullptr;
  static constexpr uint8_t* mask = nullptr;

  FASTNORM_DEVICE explicit PlainForward(const ForwardTensors<T>& t) : y(t.y), epilogue(t.epilogue) {}
};
template <class Tensors>
constexpr bool is_plain_forward = false;
template <class T>
constexpr bool is_plain_forward<PlainForward<T>> = true;

// Calls f(tensors, tag of the activation), with plain tensors where the call is and packs are wide. Call it around a
// loop over packs.
template <bool kSmooth, int W, class T, class F>
FASTNORM_DEVICE void dispatch_forward(const ForwardTensors<T>& t, F f) {
  dispatch_activation<kSmooth>(t.epilogue.activation, [&](auto act) {
    if constexpr (W > 1) {
      if (t.is_plain()) return f(PlainForward<T>(t), act);
    }
    f(t, act);
  });
}

// Packs of a residual that a thread has under way. One at a time takes two to three times the time of its bytes, even
// if L2 has it: 3045 of 7302 samples of a fused forward on an H200 waited for it.
constexpr int kResidualPacks = 4;
// Packs that a thread takes at a time down the columns: U, or more with a residual.
template <bool kSmooth, int U, class Tensors>
constexpr int kForwardPacks = is_plain_forward<Tensors> ? U : std::max(U, kSmooth ? 2 : kResidualPacks);

// Statistics that are given. The thread for which `writes` holds copies them to `stats`.
template <class T, class A = Accum<T>>
FASTNORM_DEVICE SetStats<A> given_stats(const ForwardTensors<T>& t, int64_t set, A mean, A var, bool writes) {
  const SetStats<A> s{mean, rstd_of(var, t.eps), A(0)};
  if (writes) store_stats(t.stats, t.sets, set, s, var);
  return s;
}

// One pack: from x (and residual) to y (and mask, at mask_byte()). All lanes of the warp take part, `in` or not.
template <Activation kAct, int W, class Tensors, class T, class Coefs, class MaskByte, class A = Accum<T>>
FASTNORM_DEVICE void forward_pack(const Tensors& t, const Pack<T, W>& x, const Pack<T, W>& residual, bool in,
                                  const Coefs& coefs, int64_t element, MaskByte mask_byte) {
  A values[W], z[W];
  widen<A>(x, values);
  normalize(values, coefs, z);
  if (t.residual != nullptr) add_residual(residual, z);
  if constexpr (is_two_sided(kAct)) {
    if (t.mask != nullptr) store_mask<W>(mask_byte(), upper_side<kAct>(z), in);
  }
  activate_pack<kAct, T>(t.epilogue.param, z);
  if (in) store(t.y + element, narrow<T>(z));
}

}  // namespace fastnorm::cuda
