// Fused backward: both halves in one launch. Between the two, dy and x (and residual) stay in the shared memory of a
// gang.
//
// What: as reduce_backward.cuh and apply_backward.cuh, and the sums of dweight and dbias. With grid_sync the blocks
// wait
//   for each other after the last wave and then fold those, too.
// Who: as fused_forward.cuh. Rows: the units of a team (Units in plan/types.h) first reduce a segment of a cell each.
// Traffic: reads dy, x (and residual or mask) once, writes dx (and dresidual) once: the least there is. Only the mask
// of
//   a leaky relu is read twice. 8 bytes per cell for the parameters; partials of a grid's gangs as fused_forward.cuh.
// Needs: as fused_forward.cuh, with two or three tensors staged.
// Numerics: float32 sums: packs as trees, units as trees, cells of a set as a tree, a gang's blocks as a tree.
#pragma once

#include "backward.cuh"
#include "fold.cuh"
#include "gang.cuh"

namespace fastnorm::cuda {

template <class A>
struct FusedBackward {
  FusedShape shape;
  int unit_shift, segments, unit_length;  // units of 1 << unit_shift threads; no units: 0
  bool batch;                             // sets are cells, so the sums are final, and this kernel writes the gradients
  GradSums<A>* sums;                      // of cells, for fold: [outer, parts of a cell, C], or null
  GradSums<A>* gathered;                  // [gangs, C] of d xhat and d, or null
  ParamGrads dweight, dbias;              // batch
  bool grid_sync;
  FoldParamsArgs<A> fold;  // done after the grid sync
};

// The tensors of a wave in shared memory.
template <class T, int W>
struct Staged {
  Pack<T, W>*x, *dy, *residual;

  FASTNORM_DEVICE Staged(unsigned char* memory, int stream_bytes)
      : x(reinterpret_cast<Pack<T, W>*>(memory)),
        dy(reinterpret_cast<Pack<T, W>*>(memory + stream_bytes)),
        residual(reinterpret_cast<Pack<T, W>*>(memory + 2 * stream_bytes)) {}
};

// Reads a place of a staged piece; bits() gives the mask's bits.
template <int W, class Tensors, class T, class Piece, class At, class Bits>
FASTNORM_DEVICE GradientPacks<T, W> staged_gradient(const Tensors& t, const Piece& piece, const Staged<T, W>& staged,
                                                    const At& at, Bits bits) {
  GradientPacks<T, W> packs{};  // as in load_gradient
  packs.x = staged.x[piece.slot(at, t.x)];
  packs.dy = staged.dy[piece.slot(at, t.dy)];
  if (t.residual != nullptr) packs.residual = staged.residual[piece.slot(at, static_cast<const T*>(t.residual))];
  if (t.mask != nullptr) packs.bits = bits();
  return packs;
}

// The gradient through a relu is dy or 0: it replaces the staged dy exactly, and the second half takes it as it is.
template <bool kSmooth, class T>
FASTNORM_DEVICE bool replaces_dy(const BackwardTensors<T>& t) {
  return !kSmooth && t.epilogue.activation == Activation::kRelu;
}
template <bool kSmooth, class T>
FASTNORM_DEVICE BackwardTensors<T> second_half(BackwardTensors<T> t) {
  if (replaces_dy<kSmooth>(t)) {
    t.mask = nullptr;
    t.residual = nullptr;
    t.epilogue.activation = Activation::kNone;
  }
  return t;
}

template <class A>
FASTNORM_DEVICE void store_param_gradients(const FusedBackward<A>& f, int64_t channel, const GradSums<A>& sums,
                                           const SetStats<A>& s) {
  if (f.dweight.data != nullptr) {
    store_number(f.dweight.data, f.dweight.dtype, channel, (sums.d_centered - s.low * sums.d) * s.rstd);
  }
  if (f.dbias.data != nullptr) store_number(f.dbias.data, f.dbias.dtype, channel, sums.d);
}

template <class A>
FASTNORM_DEVICE void finish_fused(const FusedBackward<A>& f, const GangPartials<GradSums<A>, A>& gang) {
  gang.exit();
  if (!f.grid_sync) return;
  sync_grid();
  fold_params(f.fold, all_blocks());
}

}  // namespace fastnorm::cuda
