// Fused backward over columns.
#pragma once

#include "backward_columns.cuh"
#include "fused_backward.cuh"

namespace fastnorm::cuda {

// The terms of a tile's sets, from the sums of its channels over all positions. A set of a batch norm has one weight,
// whose gradient the first of its blocks writes.
template <int W, class T, class A>
FASTNORM_DEVICE void merge_channels(const BackwardTensors<T>& t, const FusedBackward<A>& f,
                                    const ColumnsPiece<W>& piece, const GradSums<A>* merged, InputTerms<A>* terms_of) {
  const int set_channels = static_cast<int>(piece.shape.set_channels);
  for_each_set(piece, [&](int s, int lane, int lanes) {
    GradSums<A> total{};
    for (int c = s * set_channels + lane; s >= 0 && c < (s + 1) * set_channels; c += lanes) {
      const A weight = f.batch ? A(1) : load_param_of<T>(t.weight, piece.first_channel + c, A(1));
      total.merge({weight * merged[c].d, weight * merged[c].d_centered});
    }
    total = reduce_lanes(total, lanes);
    if (s < 0 || lane != 0) return;
    const int64_t set = piece.first_set() + s;
    const SetStats<A> stats = load_stats(t.stats, t.sets, set);
    if (f.batch) {
      if (piece.piece == 0) store_param_gradients(f, set, total, stats);
      const A weight = load_param_of<T>(t.weight, set, A(1));
      total = {weight * total.d, weight * total.d_centered};
    }
    const A scale = stats.rstd / static_cast<A>(piece.shape.positions * set_channels);
    terms_of[s] =
        t.frozen ? InputTerms<A>{} : InputTerms<A>(set_terms<A>(total, stats.rstd, stats.low, scale), stats.rstd);
  });
}

// kRereads: as in fused_forward_columns. There is none for smooth activations: registers would spill.
template <class T, int W, bool kSmooth, bool kRereads>
FASTNORM_KERNEL(kResidentThreads, 1)
fused_backward_columns(BackwardTensors<T> t, FusedBackward<Accum<T>> f, ColumnsShape shape) {
  using A = Accum<T>;
  const int stage_bytes = (t.residual != nullptr ? 3 : 2) * f.shape.stream_bytes;
  auto* const merged = reinterpret_cast<GradSums<A>*>(shared_memory() + f.shape.stages * stage_bytes);
  auto* const terms_of = reinterpret_cast<InputTerms<A>*>(merged + merged_packs(block_threads(), shape.threads_x) * W);
  GangPartials<GradSums<A>, A> gang(f.shape, reinterpret_cast<A*>(terms_of) + 4 * shape.tile, shape.tile);
  const auto memory_of = [&](int stage) {
    return Staged<T, W>(shared_memory() + stage * stage_bytes, f.shape.stream_bytes);
  };
  const auto load_piece = [&](int64_t item, int stage) {
    const ColumnsPiece<W> piece(shape, item);
    const Staged<T, W> staged = memory_of(stage);
    const auto copy = [&](auto with_residual) {
      stage_columns(piece, piece.template staged<kRereads>(), [&](const PackPlace& place) {
        const int slot = piece.slot(place, t.x);
        fastnorm::cuda::stage<W>(staged.x + slot, t.x + place.element);
        fastnorm::cuda::stage<W>(staged.dy + slot, t.dy + place.element);
        if (with_residual) fastnorm::cuda::stage<W>(staged.residual + slot, t.residual + place.element);
      });
    };
    t.residual != nullptr ? copy(std::true_type{}) : copy(std::false_type{});
  };
  const auto use_wave = [&](int64_t item, Unprepared, int stage, int parity, auto ready) {
    const bool valid = item < shape.items;
    const ColumnsPiece<W> piece(shape, valid ? item : 0, valid);
    const Staged<T, W> staged = memory_of(stage);
    const LaneCoefs<A, W> coefs = load_lane_coefs(t, piece);
    const Range kept = piece.template staged<kRereads>();
    const auto beyond = [&] { return Range{piece.template staged<kRereads>().end, piece.positions}; };  // not kept
    const auto from_shared = [&](auto& mask) {
      return [&](const auto& tensors, const PackPlace& place) {
        return staged_gradient(tensors, piece, staged, place, [&] { return mask(place.position); });
      };
    };
    const auto from_memory = [&](const auto& tensors, const PackPlace& place) {
      return load_gradient(tensors, piece, place);
    };
    LaneSums<A, W> mine;
    dispatch_backward<kSmooth, W>(t, [&](const auto& tensors, auto act) {
      const auto keep = [&](const PackPlace& place, const A(&d)[W]) {
        if (!kRereads && act.value == Activation::kRelu) staged.dy[piece.slot(place, t.dy)] = narrow<T>(d);
      };
      constexpr int kTogether = kPacks<kSmooth, 1, decltype(tensors)>;
      auto mask = mask_reader(tensors.mask, piece, kept);
      walk_landed<kTogether>(piece, kept, ready, [&](const auto& places) {
        add_sums<act.value>(tensors, places, coefs, from_shared(mask), keep, mine);
      });
      if constexpr (kRereads) {
        piece.template walk<kTogether>(beyond(), [&](const auto& places) {
          add_sums<act.value>(tensors, places, coefs, from_memory, keep, mine);
        });
      }
    });
    const auto take = [&](int c, const GradSums<A>& total) {  // `total` is over all positions
      merged[c] = total;
      if (piece.piece != 0 || f.sums == nullptr) return;
      store_one(f.sums + piece.outer * shape.C + piece.first_channel + c, total);
    };
    merge_rows(piece, mine, merged, [&](int c, const GradSums<A>& total) {
      if (gang.is_block()) {
        take(c, total);
      } else {
        gang.publish(parity, c, total);
      }
    });
    if (!gang.is_block()) gang.exchange_channels(parity, piece.channels, NoCount{}, take);
    sync_block();
    merge_channels(t, f, piece, merged, terms_of);
    sync_block();
    LaneTerms<A, W> terms{};
    piece.values_of_sets(terms_of, terms.lane);
    const BackwardTensors<T> rest = kRereads ? t : second_half<kSmooth>(t);
    if constexpr (kRereads) {
      apply_gradient_columns<kSmooth, 1, true>(rest, piece, beyond(), coefs, terms, from_memory);
    }
    auto mask = mask_reader(rest.mask, piece, kept);
    apply_gradient_columns<kSmooth, 1, false>(rest, piece, kept, coefs, terms, from_shared(mask));
  };
  for_waves(
      f.shape, shape.items, grid_blocks(), block_index(), Unprepared{}, load_piece, [&] { gang.begin(); }, use_wave);
  finish_fused(f, gang);
}

}  // namespace fastnorm::cuda
