// Forward of layer norm over the channels of planar maps.
//
// What: statistics, y = act((x - mean) * rstd * weight + bias + residual), and the mask's bits of a two-sided
//   activation.
// Who: a block takes a tile of positions with all their channels (positions.cuh). The blocks are all on the device and
//   take tiles in strides; with two stages the next tile is copied to shared memory during this one.
// Traffic: reads x (and residual) once, writes y (and a bit per element) once: the least there is. Rows that do not fit
//   in shared memory are read twice, the second time from L2.
// Needs: pack divides S and every address. A tile ends with a whole byte of the mask, or with the row.
// Numerics: as fused_forward_columns.cuh: a thread's moments of x - origin, then of the block's threads; deviations
//   from a common mean.
#pragma once

#include "forward.cuh"
#include "positions.cuh"

namespace fastnorm::cuda {

template <class T, int W>
struct ForwardRow {
  Pack<T, W> x, residual;
  RowParams<Accum<T>> params;
};

// y (and the mask) of a tile whose statistics are known; read(place) gives this thread's pack of x. From the last row
// to the first: L2 has what was read last.
template <Activation kAct, int U, int W, class Tensors, class T, class A, class Read>
FASTNORM_DEVICE void forward_tile(const Tensors& t, const Params& weight, const Params& bias,
                                  const ColumnsPiece<W>& piece, const PositionStats<A, W>& stats, Read read) {
  const auto read_row = [&](const PackPlace& place) {
    ForwardRow<T, W> row{read(place), {}, load_row_params<T>(weight, bias, place.position)};
    if (t.residual != nullptr) row.residual = load<W>(t.residual + place.element);
    return row;
  };
  const auto use_row = [&](const PackPlace& place, bool in, const ForwardRow<T, W>& row) {
    forward_pack<kAct>(t, row.x, row.residual, in, RowOfPositions<A, W>{stats, row.params}, place.element,
                       [&] { return piece.mask_byte(t.mask, place.position); });
  };
  constexpr bool kSharesBytes = is_two_sided(kAct) && kLanesPerByte<W> > 1 && !is_plain_forward<Tensors>;
  if constexpr (kSharesBytes) {  // the lanes whose bits share a byte write it together
    piece.template walk_together<U, true>(piece.whole(), [&](const PackPlace(&places)[U], const auto& taken) {
      ForwardRow<T, W> rows[U]{};
#pragma unroll
      for (int u = 0; u < U; ++u) {
        if (taken[u]) rows[u] = read_row(places[u]);
      }
#pragma unroll
      for (int u = 0; u < U; ++u) use_row(places[u], taken[u], rows[u]);
    });
  } else {
    piece.template walk_read<U, true>(
        piece.whole(), read_row,
        [&](const PackPlace& place, const ForwardRow<T, W>& row) { use_row(place, true, row); });
  }
}

template <class T, int W, bool kSmooth>
FASTNORM_KERNEL(kResidentThreads, 1)
forward_positions(ForwardTensors<T> t, ColumnsShape shape, FusedShape f) {
  using A = Accum<T>;
  auto* const merged = reinterpret_cast<Moments<A>*>(shared_memory() + f.stages * f.stream_bytes);
  auto* const tile_stats = reinterpret_cast<SetStats<A>*>(merged + merged_packs(block_threads(), shape.threads_x) * W);
  const auto memory_of = [&](int stage) {
    return reinterpret_cast<Pack<T, W>*>(shared_memory() + stage * f.stream_bytes);
  };
  const auto load_piece = [&](int64_t item, int stage) {
    const ColumnsPiece<W> piece(shape, item);
    Pack<T, W>* const staged = memory_of(stage);
    stage_columns(piece, piece.template staged<true>(), [&](const PackPlace& place) {
      fastnorm::cuda::stage<W>(staged + piece.slot(place, t.x), t.x + place.element);
    });
  };
  const auto use_wave = [&](int64_t item, Unprepared, int stage, int /*parity*/, auto ready) {
    const bool valid = item < shape.items;
    const ColumnsPiece<W> piece(shape, valid ? item : 0, valid);
    const Pack<T, W>* const staged = memory_of(stage);
    const Range kept = piece.template staged<true>();
    const auto from_shared = [&](const PackPlace& place) { return staged[piece.slot(place, t.x)]; };
    const auto from_memory = [&](const PackPlace& place) { return load<W>(t.x + place.element); };
    const auto read = [&](const PackPlace& place) {
      return place.position < kept.end ? from_shared(place) : from_memory(place);
    };
    A origin[W];
    load_origins(piece, t.x, origin);
    LaneMoments<A, W> moments;
    walk_landed<kMomentsRows>(piece, kept, ready,
                              [&](const auto& places) { read_moments<T>(places, origin, from_shared, moments); });
    piece.template walk<kMomentsRows>({kept.end, piece.positions}, [&](const auto& places) {
      read_moments<T>(places, origin, from_memory, moments);
    });
    merge_rows(piece, moments, merged, [&](int c, const Welford<A>& total) {
      const int64_t position = piece.first_channel + c, set = piece.outer * shape.C + position;
      const A var = total.moments.m2 / total.count;
      const A first = origin_of<A>(t.x + (piece.outer * shape.positions * shape.C + position));
      tile_stats[c] = finish_stats(total.moments.mean, var, first, t.eps);
      store_stats(t.stats, t.sets, set, tile_stats[c], var);
    });
    sync_block();
    if (t.y == nullptr) return;
    PositionStats<A, W> stats{};
#pragma unroll
    for (int w = 0; w < W; ++w) {
      if (piece.in) stats.set(w, tile_stats[piece.x * W + w]);
    }
    dispatch_forward<kSmooth, W>(t, [&](const auto& tensors, auto act) {
      using Tensors = std::remove_cvref_t<decltype(tensors)>;
      constexpr int kPlain = kSmooth || W == 4 ? 1 : 2;
      constexpr int kTogether = kForwardPacks<kSmooth, kPlain, Tensors>;
      forward_tile<act.value, kTogether, W, Tensors, T>(tensors, t.weight, t.bias, piece, stats, read);
    });
  };
  for_waves(f, shape.items, grid_blocks(), block_index(), Unprepared{}, load_piece, [] {}, use_wave);
}

}  // namespace fastnorm::cuda
