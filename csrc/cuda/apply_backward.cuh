// Apply, backward.
//
// What: dx = scale * d - (offset + xhat * slope), dresidual = d. The terms come from fold; there are none where
//   statistics are given. The same launch folds the gradients of weight and bias from the partials of reduce, because
//   nothing waits for them.
// Who: the first blocks fold the parameters' partials. The others take the pieces of the plan's `apply` grid, from the
//   last to the first.
// Traffic: reads dy, x (and residual or mask) once, writes dx (and dresidual) once.
#pragma once

#include "backward_columns.cuh"
#include "backward_rows.cuh"
#include "fold.cuh"

namespace fastnorm::cuda {

template <class A>
FASTNORM_DEVICE InputTerms<A> load_terms(const SetTerms<A>* terms, int64_t set, A rstd) {
  return terms == nullptr ? InputTerms<A>{} : InputTerms<A>(load_one(terms + set), rstd);
}

template <class T, int W, bool kSmooth>
FASTNORM_KERNEL(kResidentThreads, 1)
apply_backward_rows(BackwardTensors<T> t, const SetTerms<Accum<T>>* terms, RowsShape shape,
                    FoldParamsArgs<Accum<T>> fold, int64_t fold_blocks) {
  const BlockRange all = all_blocks();
  if (all.index < fold_blocks) return fold_params(fold, {all.index, fold_blocks});
  for_rows<W>(shape, {all.index - fold_blocks, all.count - fold_blocks},
              [&](const Team& team, const RowsPiece<W>& piece, bool valid) {
                const auto stats = load_stats(t.stats, t.sets, piece.span.set);
                with_gradients<false, kSmooth>(
                    t, piece, stats, channel_params<T>(piece, t.weight, t.bias),
                    load_terms(terms, piece.span.set, stats.rstd), [&](const auto&, auto use) {
                      piece.template walk_read<kBackwardUnroll<kSmooth, W>, true>(
                          piece.whole(team, valid), [&](const Step& step) { return load_gradient(t, piece, step); },
                          [&](const Step& step, const GradientPacks<T, W>& packs) { use(step, packs); });
                    });
              });
}

template <class T, int W, bool kSmooth>
FASTNORM_KERNEL(kResidentThreads, 1)
apply_backward_columns(BackwardTensors<T> t, const SetTerms<Accum<T>>* terms, ColumnsShape shape,
                       FoldParamsArgs<Accum<T>> fold, int64_t fold_blocks) {
  using A = Accum<T>;
  const BlockRange all = all_blocks();
  if (all.index < fold_blocks) return fold_params(fold, {all.index, fold_blocks});
  for_columns<W>(shape, {all.index - fold_blocks, all.count - fold_blocks}, [&](const ColumnsPiece<W>& piece) {
    const LaneCoefs<A, W> coefs = load_lane_coefs(t, piece);
    LaneTerms<A, W> lane_terms{};
    if (piece.in) {
      piece.for_lane_sets([&](int w) { lane_terms.lane[w] = load_terms(terms, piece.set(w), coefs.lane[w].rstd); },
                          [&](int w) { lane_terms.lane[w] = lane_terms.lane[w - 1]; });
    }
    apply_gradient_columns<kSmooth, kGlobalRows<kSmooth, W>, true>(
        t, piece, piece.whole(), coefs, lane_terms,
        [&](const auto& tensors, const PackPlace& place) { return load_gradient(tensors, piece, place); });
  });
}

}  // namespace fastnorm::cuda
