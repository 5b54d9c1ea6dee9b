// Fused backward over columns.
#pragma once

#include "backward_columns.cuh"
#include "fused_backward.cuh"

namespace fastnorm::cuda {

// The terms of a tile's sets, from the sums of its channels over all positions.
template <int W, class T, class A>
FASTNORM_DEVICE void merge_channels(const BackwardTensors<T>& t, const ColumnsPiece<W>& piece,
                                    const GradSums<A>* merged, InputTerms<A>* terms_of) {
  const int set_channels = static_cast<int>(piece.shape.set_channels);
  for_each_set(piece, [&](int s, int lane, int lanes) {
    GradSums<A> total{};
    for (int c = s * set_channels + lane; s >= 0 && c < (s + 1) * set_channels; c += lanes) {
      const A weight = load_param_of<T>(t.weight, piece.first_channel + c, A(1));
      total.merge({weight * merged[c].d, weight * merged[c].d_centered});
    }
    total = reduce_lanes(total, lanes);
    if (s < 0 || lane != 0) return;
    const SetStats<A> stats = load_stats(t.stats, t.sets, piece.first_set() + s);
    const A scale = stats.rstd / static_cast<A>(piece.shape.positions * set_channels);
    terms_of[s] =
        t.frozen ? InputTerms<A>{} : InputTerms<A>(set_terms<A>(total, stats.rstd, stats.low, scale), stats.rstd);
  });
}

// With the widest packs a thread needs more registers than two blocks per SM leave it.
template <class T, int W, bool kSmooth>
FASTNORM_KERNEL(kBlockThreads, W == 8 ? 1 : 2)
fused_backward_columns(BackwardTensors<T> t, FusedBackward<Accum<T>> f, ColumnsShape shape) {
  using A = Accum<T>;
  const int stage_bytes = (t.residual != nullptr ? 3 : 2) * f.shape.stream_bytes;
  auto* const merged = reinterpret_cast<GradSums<A>*>(shared_memory() + f.shape.stages * stage_bytes);
  auto* const terms_of = reinterpret_cast<InputTerms<A>*>(merged + block_threads() * W);
  const GangPartials<GradSums<A>> gang(f.shape, reinterpret_cast<A*>(terms_of) + 4 * shape.tile, shape.tile);
  const auto memory_of = [&](int stage) {
    return Staged<T, W>(shared_memory() + stage * stage_bytes, f.shape.stream_bytes);
  };
  const auto load_group = [&](int64_t item, int stage, int copy_group) {
    const ColumnsPiece<W> piece(shape, item);
    const Staged<T, W> staged = memory_of(stage);
    stage_columns(piece, copy_group, t.x, staged.x);
    stage_columns(piece, copy_group, t.dy, staged.dy);
    if (t.residual != nullptr) stage_columns(piece, copy_group, t.residual, staged.residual);
  };
  const auto use_wave = [&](int64_t item, int stage, int parity, auto ready) {
    const bool valid = item < shape.items;
    const ColumnsPiece<W> piece(shape, valid ? item : 0, valid);
    const Staged<T, W> staged = memory_of(stage);
    LaneCoefs<A, W> coefs;
    load_lane_coefs(t, piece, coefs);
    const bool masks = masks_once<kSmooth>(t);
    GradSums<A> mine[W] = {};
    for_landed(piece, ready, [&](const Range& range) {
      accumulate_lane_sums<kSmooth, 1>(
          t, piece, range, coefs, [&](int position) { return staged_gradient<kSmooth>(t, piece, staged, position); },
          [&](int position, const A(&d)[W]) {
            if (masks) staged.dy[piece.slot(position, t.dy)] = narrow<T>(d);
          },
          mine);
    });
    const auto take = [&](int c, const GradSums<A>& total) {  // `total` is over all positions
      merged[c] = total;
      if (piece.piece != 0) return;
      const int64_t channel = piece.first_channel + c;
      if (f.sums != nullptr) store_one(f.sums + piece.outer * shape.C + channel, total);
      if (f.batch) store_param_gradients(f, channel, total, load_stats(t.stats, t.sets, channel));
    };
    merge_rows(piece, mine, merged, [&](int c, const GradSums<A>& total) {
      if (gang.is_block()) {
        take(c, total);
      } else {
        gang.publish(parity, c, total);
      }
    });
    if (!gang.is_block()) gang.exchange_channels(parity, piece.channels, take);
    sync_block();
    merge_channels(t, piece, merged, terms_of);
    sync_block();
    LaneTerms<A, W> terms{};
#pragma unroll
    for (int w = 0; w < W; ++w) {
      if (piece.in) terms.lane[w] = terms_of[(piece.x * W + w) / static_cast<int>(shape.set_channels)];
    }
    const BackwardTensors<T> rest = without_mask<kSmooth>(t);
    apply_gradient_columns<kSmooth, false, 1>(rest, piece, coefs, terms, [&](int position) {
      return staged_gradient<kSmooth>(rest, piece, staged, position);
    });
  };
  for_waves(f.shape, shape.items, grid_blocks(), block_index(), load_group, use_wave);
  finish_fused(f, gang);
}

}  // namespace fastnorm::cuda
