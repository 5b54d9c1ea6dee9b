// Reduce, backward.
//
// What: the sums of d and of d (x - mean) for every piece of every cell. Where weights change with every element, the
//   sums are of a set, times rstd * weight, and the launch also sums d and d xhat down the rows, for the weights.
// Who: as reduce.cuh; the sets are the plan's `cells`. In reduce_elements some blocks go along the rows, others down.
// Traffic: reads dy, x (and residual or mask) once, writes 8 bytes per piece; reduce_elements reads them once each way.
// Numerics: Accum<T>; a pack in two or more sums, a thread in its order, threads as a tree, pieces in double by fold.
//   d (x - mean) instead of d xhat saves one rounding per element.
#pragma once

#include "backward_columns.cuh"
#include "backward_rows.cuh"

namespace fastnorm::cuda {

template <bool kSmooth, int W, class T, class A = Accum<T>>
FASTNORM_DEVICE void sum_rows(const BackwardTensors<T>& t, GradSums<A>* sums, const RowsShape& shape,
                              const BlockRange& blocks) {
  for_rows<W>(shape, blocks, [&](const Team& team, const RowsPiece<W>& piece, bool valid) {
    const auto stats = load_stats(t.stats, t.sets, piece.span.stats(shape));
    GradSums<A> mine{};
    with_sums<false, kSmooth>(t, piece, stats, channel_params<T>(piece, t.weight, t.bias), [&](const auto& sums) {
      piece.template walk_read<kBackwardUnroll<kSmooth, W>>(
          piece.whole(team, valid), [&](const Step& step) { return load_gradient(t, piece, step); },
          [&](const Step& step, const GradientPacks<T, W>& packs) {
            sums.add(step, packs, [](const auto&...) {}, mine);
          });
    });
    const auto total = sum_team(team, mine, shared_memory());
    if (valid && team.lane == 0) store_one(sums + partial_of(shape, piece.span), total);
  });
}

template <class T, int W, bool kSmooth>
FASTNORM_KERNEL(kResidentThreads, 1)
reduce_backward_rows(BackwardTensors<T> t, GradSums<Accum<T>>* sums, RowsShape shape) {
  sum_rows<kSmooth, W>(t, sums, shape, all_blocks());
}

// Merges the threads' sums to those of an item's channels, and stores them.
template <int W, class A>
FASTNORM_DEVICE void store_sums(const ColumnsPiece<W>& piece, const LaneSums<A, W>& mine, GradSums<A>* sums) {
  merge_rows(piece, mine, reinterpret_cast<GradSums<A>*>(shared_memory()),
             [&](int c, const GradSums<A>& total) { store_one(sums + piece.partial(c), total); });
  sync_block();  // before the next item's sums overwrite these
}

template <class T, int W, bool kSmooth>
FASTNORM_KERNEL(kResidentThreads, 1)
reduce_backward_columns(BackwardTensors<T> t, GradSums<Accum<T>>* sums, ColumnsShape shape) {
  using A = Accum<T>;
  for_columns<W>(shape, all_blocks(), [&](const ColumnsPiece<W>& piece) {
    const LaneCoefs<A, W> coefs = load_lane_coefs(t, piece);
    LaneSums<A, W> mine;
    dispatch_backward<kSmooth, W>(t, [&](const auto& tensors, auto act) {
      piece.template walk<kGlobalRows<kSmooth, W>>(piece.whole(), [&](const auto& places) {
        add_sums<act.value>(
            tensors, places, coefs,
            [&](const auto& from, const PackPlace& place) { return load_gradient(from, piece, place); },
            [](const auto&...) {}, mine);
      });
    });
    store_sums(piece, mine, sums);
  });
}

// The sums of d xhat for dweight and of d for dbias, where statistics change with the position and weights with the
// channel.
template <bool kSmooth, int W, class T, class A = Accum<T>>
FASTNORM_DEVICE void sum_params(const BackwardTensors<T>& t, GradSums<A>* sums, const ColumnsShape& shape,
                                const BlockRange& blocks) {
  for_columns<W>(shape, blocks, [&](const ColumnsPiece<W>& piece) {
    const auto params = LaneParams<A, W>::template load<T>(piece, t.weight, t.bias);
    LaneSums<A, W> mine;
    dispatch_activation<kSmooth>(t.epilogue.activation, [&](auto act) {
      piece.template walk_read<1>(
          piece.whole(), [&](const PackPlace& place) { return load_gradient(t, piece, place); },
          [&](const PackPlace& place, const GradientPacks<T, W>& packs) {
            // A pack lies in one group: its statistics are those of its first lane.
            const SetStats<A> s = load_stats(t.stats, t.sets, piece.set(0, place.position));
            RowCoefs<A, W> coefs{s.mean, s.rstd, {}, {}};
            set_affine(s, params.weight, params.bias, coefs);
            A x[W], d[W];
            gradient<act.value>(t, packs, coefs, x, d);
#pragma unroll
            for (int w = 0; w < W; ++w) {
              mine.d[w] += d[w];
              mine.d_centered[w] = std::fma(d[w], (x[w] - s.mean) * s.rstd - s.low * s.rstd, mine.d_centered[w]);
            }
          });
    });
    store_sums(piece, mine, sums);
  });
}

// The first blocks, as many as the rows' grid has (none where dx is not wanted), go along the rows. The others go down.
template <class T, int W, int kColumnsW, bool kSmooth>
FASTNORM_KERNEL(kResidentThreads, 1)
reduce_elements(BackwardTensors<T> t, GradSums<Accum<T>>* sums, RowsShape rows, int64_t rows_blocks,
                GradSums<Accum<T>>* params, ColumnsShape columns) {
  const BlockRange all = all_blocks();
  if (all.index < rows_blocks) {
    sum_rows<kSmooth, W>(t, sums, rows, {all.index, rows_blocks});
  } else {
    sum_params<kSmooth, kColumnsW>(t, params, columns, {all.index - rows_blocks, all.count - rows_blocks});
  }
}

}  // namespace fastnorm::cuda
