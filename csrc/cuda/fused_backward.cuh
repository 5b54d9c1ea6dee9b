// Fused backward: both halves in one launch, dy and x (and residual) in shared memory meanwhile.
//
// What: as reduce_backward.cuh and apply_backward.cuh; and the sums of dweight and dbias as they come by.
// Who: rows: a team to a set, whose units (Units in plan_cuda.h) first reduce a segment of a cell each; columns: a
// block
//   to a tile of whole sets.
// Traffic: reads dy, x (and residual) once, the mask twice, writes dx (and dresidual) once: the least there is but for
//   the mask; 8 bytes a cell for the parameters.
// Needs: as fused_forward.cuh, with two or three tensors staged.
// Numerics: float32 sums: packs as trees, units as trees, cells of a set as a tree.
#pragma once

#include "backward.cuh"

namespace fastnorm::cuda {

// What the fused kernels know besides the shape. Bytes are of shared memory.
template <class A>
struct FusedBackward {
  int stream_bytes;  // one staged tensor
  int team_bytes;    // rows: all that a team has
  int unit_threads, segments, unit_length, cells, cell_packs;
  GradSums<A>* sums;          // [outer, C] for fold, or null
  GradSums<A>* gathered;      // [blocks, C] of d xhat and d, or null
  ParamGrads dweight, dbias;  // batch norm: written here
};

// The tensors of a set or a tile in shared memory.
template <class T, int W>
struct Staged {
  Pack<T, W>*x, *dy, *residual;

  FASTNORM_DEVICE Staged(unsigned char* memory, int stream_bytes)
      : x(reinterpret_cast<Pack<T, W>*>(memory)),
        dy(reinterpret_cast<Pack<T, W>*>(memory + stream_bytes)),
        residual(reinterpret_cast<Pack<T, W>*>(memory + 2 * stream_bytes)) {}
  FASTNORM_DEVICE void put(int slot, const GradientPacks<T, W>& packs, bool with_residual) const {
    x[slot] = packs.x;
    dy[slot] = packs.dy;
    if (with_residual) residual[slot] = packs.residual;
  }
  FASTNORM_DEVICE GradientPacks<T, W> get(int slot, bool with_residual) const {
    return {x[slot], dy[slot], with_residual ? residual[slot] : Pack<T, W>{}, 0};
  }
};

template <class A>
FASTNORM_DEVICE void store_param_gradients(const FusedBackward<A>& f, int64_t channel, const GradSums<A>& sums,
                                           const SetStats<A>& s) {
  if (f.dweight.data != nullptr) {
    store_number(f.dweight.data, f.dweight.dtype, channel, (sums.d_centered - s.low * sums.d) * s.rstd);
  }
  if (f.dbias.data != nullptr) store_number(f.dbias.data, f.dbias.dtype, channel, sums.d);
}

// The sums of each cell of a set, by its units, and from them those of the set, weighted.
template <bool kSmooth, int W, class T, class A>
FASTNORM_DEVICE GradSums<A> sums_by_cells(const BackwardTensors<T>& t, const FusedBackward<A>& f,
                                          const RowsPiece<W>& piece, const Team& team, bool valid,
                                          const SetStats<A>& stats, const Staged<T, W>& staged,
                                          GradSums<A>* unit_sums) {
  const bool with_residual = t.residual != nullptr;
  const int slots = team.width / f.unit_threads, slot = team.lane / f.unit_threads, units = f.cells * f.segments;
  for (int first = 0; first < units; first += slots) {
    const int unit = first + slot, cell = unit / f.segments, begin = (unit - cell * f.segments) * f.unit_length;
    const int steps = valid && unit < units ? std::min(f.unit_length, f.cell_packs - begin) : 0;
    const Stretch stretch{cell * f.cell_packs + begin, steps, f.unit_length, team.lane % f.unit_threads,
                          f.unit_threads};
    const GradSums<A> mine = accumulate_sums<kSmooth>(
        t, piece, stretch, stats, [&](const Place& place) { return load_gradient(t, piece, place); },
        [&](const Place& place, const GradientPacks<T, W>& packs, const A(&)[W], const A(&)[W]) {
          staged.put(place.step, packs, with_residual);
        });
    const GradSums<A> total = reduce_lanes(mine, f.unit_threads);
    if (unit < units && team.lane % f.unit_threads == 0) unit_sums[unit] = total;
  }
  team.sync();
  GradSums<A> weighted{};
  for (int cell = team.lane; cell < f.cells; cell += team.width) {
    GradSums<A> sums = unit_sums[cell * f.segments];
    for (int s = 1; s < f.segments; ++s) sums.merge(unit_sums[cell * f.segments + s]);
    if (!valid) continue;
    const int64_t channel = piece.channel + cell;
    if (f.sums != nullptr) store_one(f.sums + piece.span.set * f.cells + cell, sums);
    store_param_gradients(f, channel, sums, stats);
    const A weight = load_param_of<T>(t.weight, channel, A(1));
    weighted.merge({weight * sums.d, weight * sums.d_centered});
  }
  return weighted;
}

// The sums of a set whose weights change with every element, times rstd; each row's share of the weights' own gradients
// is gathered in shared memory, where a thread meets none but its own.
template <bool kSmooth, int W, class T, class A>
FASTNORM_DEVICE GradSums<A> sums_by_elements(const BackwardTensors<T>& t, const RowsPiece<W>& piece, const Team& team,
                                             bool valid, const SetStats<A>& stats, const Staged<T, W>& staged,
                                             GradSums<A>* gathered) {
  const bool with_residual = t.residual != nullptr;
  return accumulate_sums<kSmooth>(
      t, piece, piece.whole(team, valid), stats, [&](const Place& place) { return load_gradient(t, piece, place); },
      [&](const Place& place, const GradientPacks<T, W>& packs, const A(&x)[W], const A(&d)[W]) {
        staged.put(place.step, packs, with_residual);
        if (gathered == nullptr) return;
#pragma unroll
        for (int w = 0; w < W; ++w) {
          const A xhat = (x[w] - stats.mean) * stats.rstd - stats.low * stats.rstd;
          gathered[w * piece.span.packs + place.pack].merge({d[w], d[w] * xhat});
        }
      });
}

template <class T, int W, bool kSmooth>
FASTNORM_KERNEL(kBlockThreads, 2)
fused_backward_rows(BackwardTensors<T> t, FusedBackward<Accum<T>> f, RowsShape shape) {
  using A = Accum<T>;
  const Team team(shape.team);
  const int teams = block_threads() / team.width, streams = t.residual != nullptr ? 3 : 2;
  const bool with_residual = t.residual != nullptr;
  unsigned char* mine = shared_memory() + team.index * f.team_bytes;
  const Staged<T, W> staged(mine, f.stream_bytes);
  auto* extra = reinterpret_cast<GradSums<A>*>(mine + streams * f.stream_bytes);  // of units, or gathered
  void* scratch = shared_memory() + teams * f.team_bytes;
  const int row = static_cast<int>(shape.set_size);
  if (f.gathered != nullptr) {
    for (int i = team.lane; i < row; i += team.width) extra[i] = {};
    team.sync();
  }
  for (int64_t first = block_index() * teams; first < shape.items; first += grid_blocks() * teams) {
    const bool valid = first + team.index < shape.items;
    const RowsPiece<W> piece(shape, valid ? first + team.index : first);
    const SetStats<A> stats = load_stats(t.stats, t.sets, piece.span.set);
    const GradSums<A> share =
        shape.per_element
            ? sums_by_elements<kSmooth>(t, piece, team, valid, stats, staged, f.gathered != nullptr ? extra : nullptr)
            : sums_by_cells<kSmooth>(t, f, piece, team, valid, stats, staged, extra);
    const GradSums<A> sums = reduce_team(team, share, scratch);
    const A scale = (shape.per_element ? A(1) : stats.rstd) / static_cast<A>(shape.set_size);
    const SetTerms<A> terms = t.frozen ? SetTerms<A>{} : set_terms<A>(sums, stats.rstd, stats.low, scale);
    team.sync();  // staged by other threads
    apply_gradient_rows<kSmooth, 1>(t, piece, piece.whole(team, valid), stats, terms, [&](const Place& place) {
      GradientPacks<T, W> packs = staged.get(place.step, with_residual);
      if (t.mask != nullptr) packs.bits = piece.mask_bits(t.mask, place);
      return packs;
    });
    team.sync();  // before the next set is staged
  }
  if (f.gathered == nullptr) return;
  sync_block();
  const int packs = row / W, step = f.team_bytes / static_cast<int>(sizeof(GradSums<A>));
  const auto* gathered = reinterpret_cast<const GradSums<A>*>(shared_memory() + streams * f.stream_bytes);
  for (int c = thread_index(); c < row; c += block_threads()) {
    const int at = c % W * packs + c / W;
    GradSums<A> total = gathered[at];
    for (int i = 1; i < teams; ++i) total.merge(gathered[i * step + at]);
    store_one(f.gathered + block_index() * row + c, total);
  }
}

// The widest packs take more registers than two blocks leave them.
template <class T, int W, bool kSmooth>
FASTNORM_KERNEL(kBlockThreads, W == 8 ? 1 : 2)
fused_backward_columns(BackwardTensors<T> t, FusedBackward<Accum<T>> f, ColumnsShape shape) {
  using A = Accum<T>;
  const bool with_residual = t.residual != nullptr;
  const Staged<T, W> staged(shared_memory(), f.stream_bytes);
  auto* merged = reinterpret_cast<GradSums<A>*>(shared_memory() + (with_residual ? 3 : 2) * f.stream_bytes);
  auto* set_terms_of = reinterpret_cast<SetTerms<A>*>(merged + block_threads() * W);
  const int tile_packs = shape.tile / W, set_channels = static_cast<int>(shape.set_channels);
  for (int64_t item = block_index(); item < shape.items; item += grid_blocks()) {
    const ColumnsPiece<W> piece(shape, item);
    LaneCoefs<A, W> coefs;
    load_lane_coefs(t, piece, coefs);
    GradSums<A> mine[W];
    accumulate_lane_sums<kSmooth>(t, piece, coefs, mine, [&](int position, const GradientPacks<T, W>& packs) {
      staged.put(position * tile_packs + piece.x, packs, with_residual);
    });
    const int64_t first_set = piece.outer * shape.groups + piece.first_channel / set_channels;
    merge_down(piece, mine, merged, [&](int c, const GradSums<A>& total) {
      merged[c] = total;
      const int64_t channel = piece.first_channel + c;
      if (f.sums != nullptr) store_one(f.sums + piece.outer * shape.C + channel, total);
      store_param_gradients(f, channel, total, load_stats(t.stats, t.sets, first_set + c / set_channels));
    });
    sync_block();
    for (int s = thread_index(); s < piece.channels / set_channels; s += block_threads()) {
      GradSums<A> total{};
      for (int c = s * set_channels; c < (s + 1) * set_channels; ++c) {
        const A weight = load_param_of<T>(t.weight, piece.first_channel + c, A(1));
        total.merge({weight * merged[c].d, weight * merged[c].d_centered});
      }
      const SetStats<A> stats = load_stats(t.stats, t.sets, first_set + s);
      const A scale = stats.rstd / static_cast<A>(shape.positions * set_channels);
      set_terms_of[s] = t.frozen ? SetTerms<A>{} : set_terms<A>(total, stats.rstd, stats.low, scale);
    }
    sync_block();
    LaneTerms<A, W> terms{};
#pragma unroll
    for (int w = 0; w < W; ++w) {
      if (piece.in) terms.lane[w] = set_terms_of[(piece.x * W + w) / set_channels];
    }
    apply_gradient_columns<kSmooth, 1>(t, piece, coefs, terms, [&](int position) {
      GradientPacks<T, W> packs = staged.get(position * tile_packs + piece.x, with_residual);
      if (t.mask != nullptr) packs.bits = piece.mask_bits(t.mask, position);
      return packs;
    });
  }
}

}  // namespace fastnorm::cuda
