// Backward of layer norm over the channels of planar maps.
//
// What: dx = rstd * (w d - mean(w d) - xhat * mean(w d xhat)), dresidual = d, and for each channel the sums of d and d
//   xhat over the positions. With grid_sync the blocks wait for each other at the end and fold those into dbias and
//   dweight.
// Who: as forward_positions.cuh. The lanes of a row add up its sums; the first of them adds them to those of the tiles
//   that its block has had before.
// Traffic: reads dy, x (and residual) once, writes dx (and dresidual) once: the least there is. A mask is read twice;
//   rows that do not fit in shared memory as in forward. 16 bytes per tile and channel go through L2.
// Needs: as forward_positions.cuh; a row of threads lies in one warp.
// Numerics: float32 sums (float64 of float64): a thread's rows one after the other, then the block's threads; of a
//   channel, a pack's lanes, the row's lanes as a tree, one tile after the other.
#pragma once

#include "backward.cuh"
#include "fused_backward.cuh"
#include "positions.cuh"

namespace fastnorm::cuda {

// A tile whose mask is read, which has a row of bits for each of its rows.
template <int W>
struct MaskedPiece : ColumnsPiece<W> {
  using ColumnsPiece<W>::ColumnsPiece;

  FASTNORM_DEVICE unsigned mask_bits(const uint8_t* mask, const PackPlace& place) const {
    return load_mask<W>(mask + this->row(place.position) * this->shape.mask_row_bytes, this->channel);
  }
};

// Calls body(place, taken) for the rows of a tile, those in shared memory when their copy group has landed. All threads
// of the block make the same number of calls; the place is this thread's where `taken` holds.
template <int W, class Ready, class Body>
FASTNORM_DEVICE void walk_tile_together(const ColumnsPiece<W>& piece, const Range& kept, Ready ready, Body body) {
  const int length = piece.group_length(kept);
  PackPlace place = piece.at(0);
  int landed = 0, copy_group = 0;
#pragma unroll 1
  for (int row = 0; row < piece.positions; row += piece.shape.threads_y) {
    if (row == landed && row < kept.end) {
      ready(copy_group++);
      landed += length;
    }
    body(place, piece.in && place.position < piece.positions);
    place = piece.next(place, 1);
  }
}

// The sums of rows over a block's tiles. The same thread adds to a row each time.
template <class A>
struct RowSums {
  GradSums<A>* gathered;  // [C], this block's; or null
  bool first;             // tile of this block: there is nothing to add to

  FASTNORM_DEVICE GradSums<A> before(int row) const { return first ? GradSums<A>{} : load_one(gathered + row); }
};

// Adds a pack of a row to the sums of its positions and of its channel. All lanes of the warp take part.
template <Activation kAct, int W, class T, class Tensors, class A, class Read>
FASTNORM_DEVICE void add_row(const Tensors& t, const BackwardTensors<T>& all, const ColumnsPiece<W>& piece,
                             const PackPlace& place, bool taken, const PositionStats<A, W>& stats,
                             const RowSums<A>& rows, Read read, LaneSums<A, W>& mine) {
  const bool adds = taken && rows.gathered != nullptr && piece.x == 0;
  GradSums<A> before{};
  A sums[2] = {};
  if (taken) {
    const GradientPacks<T, W> packs = read(t, place);
    const RowParams<A> params = load_row_params<T>(all.weight, all.bias, place.position);
    if (adds) before = rows.before(place.position);
    A x[W], d[W];
    gradient<kAct>(t, packs, RowOfPositions<A, W>{stats, params}, x, d);
#pragma unroll
    for (int w = 0; w < W; ++w) {
      const A centered = x[w] - stats.mean[w], weighted = params.weight * d[w];
      mine.d[w] += weighted;
      mine.d_centered[w] = std::fma(weighted, centered, mine.d_centered[w]);
      sums[0] += d[w];
      sums[1] = std::fma(d[w], std::fma(centered, stats.rstd[w], stats.shift[w]), sums[1]);
    }
  }
  if (rows.gathered == nullptr) return;
  sum_lanes(sums, piece.shape.threads_x);
  if (!adds) return;
  before.merge({sums[0], sums[1]});
  store_one(rows.gathered + place.position, before);
}

// dx and dresidual of a tile, from the last row to the first.
template <Activation kAct, int W, class T, class Tensors, class A, class Read>
FASTNORM_DEVICE void apply_tile(const Tensors& t, const BackwardTensors<T>& all, const ColumnsPiece<W>& piece,
                                const PositionStats<A, W>& stats, const LaneTerms<A, W>& terms, Read read) {
  struct Row {
    GradientPacks<T, W> packs;
    RowParams<A> params;
  };
  piece.template walk_read<1, true>(
      piece.whole(),
      [&](const PackPlace& place) {
        return Row{read(t, place), load_row_params<T>(all.weight, all.bias, place.position)};
      },
      [&](const PackPlace& place, const Row& row) {
        const RowOfPositions<A, W> coefs{stats, row.params};
        A x[W], d[W];
        gradient<kAct>(t, row.packs, coefs, x, d);
        store_gradients(t, x, d, coefs, terms, place.element);
      });
}

template <class T, int W, bool kSmooth>
FASTNORM_KERNEL(kResidentThreads, 1)
backward_positions(BackwardTensors<T> t, FusedBackward<Accum<T>> f, ColumnsShape shape) {
  using A = Accum<T>;
  const int stage_bytes = (t.residual != nullptr ? 3 : 2) * f.shape.stream_bytes;
  auto* const merged = reinterpret_cast<GradSums<A>*>(shared_memory() + f.shape.stages * stage_bytes);
  auto* const tile_terms =
      reinterpret_cast<InputTerms<A>*>(merged + merged_packs(block_threads(), shape.threads_x) * W);
  const auto memory_of = [&](int stage) {
    return Staged<T, W>(shared_memory() + stage * stage_bytes, f.shape.stream_bytes);
  };
  const auto load_piece = [&](int64_t item, int stage) {
    const ColumnsPiece<W> piece(shape, item);
    const Staged<T, W> staged = memory_of(stage);
    stage_columns(piece, piece.template staged<true>(), [&](const PackPlace& place) {
      const int slot = piece.slot(place, t.x);
      fastnorm::cuda::stage<W>(staged.x + slot, t.x + place.element);
      fastnorm::cuda::stage<W>(staged.dy + slot, t.dy + place.element);
      if (t.residual != nullptr) fastnorm::cuda::stage<W>(staged.residual + slot, t.residual + place.element);
    });
  };
  const auto use_wave = [&](int64_t item, Unprepared, int stage, int /*parity*/, auto ready) {
    const bool valid = item < shape.items;
    const MaskedPiece<W> piece(shape, valid ? item : 0, valid);
    const Staged<T, W> staged = memory_of(stage);
    const Range kept = piece.template staged<true>();
    const auto read = [&](const auto& tensors, const PackPlace& place) {
      const auto bits = [&] { return piece.mask_bits(t.mask, place); };
      if (place.position < kept.end) return staged_gradient(tensors, piece, staged, place, bits);
      return load_gradient<W>(tensors, [&](const auto* tensor) { return tensor + place.element; }, bits);
    };
    SetStats<A> of_sets[W];
    load_lane_stats(piece, t.stats, t.sets, of_sets);
    PositionStats<A, W> stats;
#pragma unroll
    for (int w = 0; w < W; ++w) stats.set(w, of_sets[w]);
    const RowSums<A> rows{f.gathered == nullptr ? nullptr : f.gathered + block_index() * shape.positions,
                          item == block_index()};
    LaneSums<A, W> mine;
    dispatch_backward<kSmooth, W>(t, [&](const auto& tensors, auto act) {
      walk_tile_together(piece, kept, ready, [&](const PackPlace& place, bool taken) {
        add_row<act.value>(tensors, t, piece, place, taken, stats, rows, read, mine);
      });
    });
    if (t.dx == nullptr && t.dresidual == nullptr) return;  // the same for all threads
    merge_rows(piece, mine, merged, [&](int c, const GradSums<A>& total) {
      const SetStats<A> s = load_stats(t.stats, t.sets, piece.outer * shape.C + piece.first_channel + c);
      const A scale = s.rstd / static_cast<A>(shape.positions);
      tile_terms[c] = InputTerms<A>(set_terms<A>(total, s.rstd, s.low, scale), s.rstd);
    });
    sync_block();
    LaneTerms<A, W> terms{};
    piece.values_of_sets(tile_terms, terms.lane);
    dispatch_backward<kSmooth, W>(
        t, [&](const auto& tensors, auto act) { apply_tile<act.value>(tensors, t, piece, stats, terms, read); });
  };
  for_waves(f.shape, shape.items, grid_blocks(), block_index(), Unprepared{}, load_piece, [] {}, use_wave);
  if (!f.grid_sync) return;
  sync_grid();
  fold_params(f.fold, all_blocks());
}

}  // namespace fastnorm::cuda
