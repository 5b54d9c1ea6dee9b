// Fused forward over columns; see fused_forward_rows.cuh.
#pragma once

#include "columns_reduce.cuh"
#include "forward_columns.cuh"
#include "gang.cuh"

namespace fastnorm::cuda {

// The statistics of a tile's sets, from the moments of its channels over all positions.
template <int W, class T, class A>
FASTNORM_DEVICE void merge_channels(const ForwardTensors<T>& t, const ColumnsPiece<W>& piece, const Moments<A>* merged,
                                    SetStats<A>* set_stats) {
  const ColumnsShape& shape = piece.shape;
  const int set_channels = static_cast<int>(shape.set_channels);
  const A positions = static_cast<A>(shape.positions), channels = static_cast<A>(set_channels);
  for_each_set(piece, [&](int s, int lane, int lanes) {
    const Moments<A>* of_set = merged + s * set_channels;
    Sum<A> sum{};
    for (int c = lane; s >= 0 && c < set_channels; c += lanes) sum.merge({of_set[c].mean});
    const A mean = reduce_lanes(sum, lanes).value / channels;
    sum = {};
    for (int c = lane; s >= 0 && c < set_channels; c += lanes) {
      sum.merge({of_set[c].m2 + positions * (of_set[c].mean - mean) * (of_set[c].mean - mean)});
    }
    const A m2 = reduce_lanes(sum, lanes).value;
    if (s < 0 || lane != 0) return;
    const int64_t base = piece.outer * shape.positions * shape.C + piece.first_channel + s * set_channels;
    const A var = m2 / (positions * channels);
    set_stats[s] = finish_stats(mean, var, origin_of<A>(t.x + base), t.eps);
    if (piece.piece == 0) {
      store_stats(t.stats, t.sets, piece.first_set() + s, set_stats[s], var);
      store_running(t.running, piece.first_set() + s, set_stats[s].mean, var);
    }
  });
}

// kRereads: pieces go on beyond what is staged. That part is read from memory, and then, from its end, from L2.
template <class T, int W, bool kSmooth, bool kRereads>
FASTNORM_KERNEL(kResidentThreads, 1)
fused_forward_columns(ForwardTensors<T> t, ColumnsShape shape, FusedShape f) {
  using A = Accum<T>;
  unsigned char* const extra = shared_memory() + f.stages * f.stream_bytes;
  auto* const merged = reinterpret_cast<Moments<A>*>(extra);
  auto* const set_stats = reinterpret_cast<SetStats<A>*>(merged + merged_packs(block_threads(), shape.threads_x) * W);
  GangPartials<Moments<A>, A> gang(f, reinterpret_cast<A*>(set_stats) + 4 * shape.tile, shape.tile);
  const auto memory_of = [&](int stage) {
    return reinterpret_cast<Pack<T, W>*>(shared_memory() + stage * f.stream_bytes);
  };
  const auto load_piece = [&](int64_t item, int stage) {
    const ColumnsPiece<W> piece(shape, item);
    Pack<T, W>* const staged = memory_of(stage);
    stage_columns(piece, piece.template staged<kRereads>(), [&](const PackPlace& place) {
      fastnorm::cuda::stage<W>(staged + piece.slot(place, t.x), t.x + place.element);
    });
  };
  const auto use_wave = [&](int64_t item, Unprepared, int stage, int parity, auto ready) {
    const bool valid = item < shape.items;
    const ColumnsPiece<W> piece(shape, valid ? item : 0, valid);
    const Pack<T, W>* const staged = memory_of(stage);
    const Range kept = piece.template staged<kRereads>();
    const auto from_shared = [&](const PackPlace& place) { return staged[piece.slot(place, t.x)]; };
    const auto from_memory = [&](const PackPlace& place) { return load<W>(t.x + place.element); };
    const auto read = [&](const PackPlace& place) {
      return kRereads && place.position >= kept.end ? from_memory(place) : from_shared(place);
    };
    A origin[W];
    load_origins(piece, t.x, origin);
    LaneMoments<A, W> moments;
    walk_landed<kMomentsRows>(piece, kept, ready,
                              [&](const auto& places) { read_moments<T>(places, origin, from_shared, moments); });
    if constexpr (kRereads) {
      piece.template walk<kMomentsRows>({kept.end, piece.positions}, [&](const auto& places) {
        read_moments<T>(places, origin, from_memory, moments);
      });
    }
    const auto params = LaneParams<A, W>::template load<T>(piece, t.weight, t.bias);  // before the barriers
    // Rows of `merged` below the first are read by no one else after their channel is done.
    merge_rows(piece, moments, merged, [&](int c, const Welford<A>& total) {
      if (gang.is_block()) {
        merged[c] = total.moments;
      } else {
        gang.publish(parity, c, total.moments);
      }
    });
    if (!gang.is_block()) {
      gang.exchange_channels(
          parity, piece.channels, [&](int each) { return static_cast<A>(piece.positions_of(each)); },
          [&](int c, const Moments<A>& total) { merged[c] = total; });
    }
    sync_block();
    merge_channels(t, piece, merged, set_stats);
    sync_block();
    if (t.y != nullptr) {
      SetStats<A> stats[W] = {};
      piece.values_of_sets(set_stats, stats);
      forward_columns<kSmooth, kSmooth || W == 4 ? 1 : 2, kRereads>(t, piece, lane_coefs(stats, params), read);
    }
  };
  for_waves(f, shape.items, grid_blocks(), block_index(), Unprepared{}, load_piece, [&] { gang.begin(); }, use_wave);
  gang.exit();
}

}  // namespace fastnorm::cuda
