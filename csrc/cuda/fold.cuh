// Fold: from partials to statistics, terms of dx, and gradients of weight and bias. Also the running statistics.
//
// Who: a warp takes a set; neighbouring lanes take a channel. The lanes take the partials in strides and merge their
//   sums in a fixed order.
// Traffic: reads the partials once and writes a few numbers per set.
// Numerics: double throughout, because partials are few and the result must not show how many there were.
#pragma once

#include "core/formulas.h"
#include "group_reduce.cuh"
#include "launches.h"
#include "stats.cuh"

namespace fastnorm::cuda {

constexpr int kFoldWarps = kBlockThreads / kWarp;

// Calls body(i, lane) for every i < items; a warp takes an i.
template <class Body>
FASTNORM_DEVICE void for_each_by_warp(int64_t items, Body body) {
  const int warp = thread_index() / kWarp, lane = thread_index() % kWarp;
  for (int64_t i = block_index() * kFoldWarps + warp; i < items; i += grid_blocks() * kFoldWarps) body(i, lane);
}

// Calls body(c) for every channel; a thread takes a channel.
template <class Body>
FASTNORM_DEVICE void for_each_channel(int64_t channels, Body body) {
  for (int64_t c = block_index() * block_threads() + thread_index(); c < channels;
       c += grid_blocks() * block_threads()) {
    body(c);
  }
}

// Calls use(index, column) for this lane's part of the partials of set `group` of `outer`.
template <class Use>
FASTNORM_DEVICE void for_partials(int64_t outer, int64_t group, int64_t pieces, int64_t groups, int64_t columns,
                                  int lane, Use use) {
  for (int64_t i = lane; i < pieces * columns; i += kWarp) {
    const int64_t piece = columns == 1 ? i : i / columns, column = columns == 1 ? 0 : i - piece * columns;
    use((outer * pieces + piece) * groups * columns + group * columns + column, column);
  }
}

template <class A>
FASTNORM_KERNEL(kBlockThreads, 1)
fold_forward(FoldForwardArgs<A> f) {
  for_each_by_warp(f.sets, [&](int64_t set, int lane) {
    const int64_t outer = set / f.groups, group = set - outer * f.groups;
    Welford<double> total{};
    for_partials(outer, group, f.pieces, f.groups, f.columns, lane, [&](int64_t at, int64_t) {
      const Welford<A> p = load_one(f.partials + at);
      total.merge({double(p.count), {double(p.moments.mean), double(p.moments.m2)}});
    });
    total = reduce_lanes(total, kWarp);
    if (lane != 0) return;
    const double first = load_number<double>(f.x, f.dtype, outer * f.outer_stride + group * f.set_stride);
    const double mean = (first - first == 0 ? first : 0) + total.moments.mean, var = total.moments.m2 / total.count;
    const A rounded = static_cast<A>(mean), low = static_cast<A>(mean - rounded);
    const SetStats<A> stats{rounded, static_cast<A>(1 / std::sqrt(var + f.eps)), low - low == A(0) ? low : A(0)};
    store_stats(f.stats, f.sets, set, stats, static_cast<A>(var));
    store_running(f.running, set, stats.mean, static_cast<A>(var));
  });
}

FASTNORM_DEVICE void merge_weighted(GradSums<double>& total, double d, double d_centered, double weight) {
  total.d += weight * d;
  total.d_centered += weight * d_centered;
}

template <class A>
FASTNORM_KERNEL(kBlockThreads, 1)
fold_terms(FoldTermsArgs<A> f) {
  for_each_by_warp(f.sets, [&](int64_t set, int lane) {
    const int64_t outer = set / f.groups, group = set - outer * f.groups;
    GradSums<double> total{};
    for_partials(outer, group, f.pieces, f.groups, f.columns, lane, [&](int64_t at, int64_t column) {
      const GradSums<A> p = load_one(f.sums + at);
      const double weight = f.weighted ? 1.0 : load_param(f.weight, group * f.columns + column, 1.0);
      merge_weighted(total, p.d, p.d_centered, weight);
    });
    total = reduce_lanes(total, kWarp);
    if (lane != 0) return;
    const SetStats<A> s = load_stats(f.stats, f.sets, set);
    const double rstd = s.rstd, scale = (f.weighted ? 1.0 : rstd) / static_cast<double>(f.set_size);
    const SetTerms<A> terms = set_terms<A>(total, rstd, static_cast<double>(s.low), scale);
    store_one(reinterpret_cast<SetTerms<A>*>(f.terms) + set, terms);
  });
}

// The terms of dx from the sums over all ranks; a thread takes a channel.
template <class A>
FASTNORM_KERNEL(kBlockThreads, 1)
given_terms(GivenTermsArgs<A> f) {
  const double count = load_one(f.count);
  for_each_channel(f.channels, [&](int64_t c) {
    const SetStats<A> s = load_stats(f.stats, f.channels, c);
    const double w = load_param(f.weight, c, 1.0), rstd = s.rstd;
    const double d = load_one(f.sums + c), d_xhat = load_one(f.sums + f.channels + c);
    const SetTerms<A> terms = set_terms<A>(w * d, w * d_xhat, rstd, static_cast<double>(s.low), rstd / count);
    store_one(reinterpret_cast<SetTerms<A>*>(f.terms) + c, terms);
  });
}

// Lanes per channel: each has eight partials at least. The fewer lanes a channel has, the more neighbouring channels
// share the sectors that a warp reads.
FASTNORM_HOST_DEVICE inline int fold_lanes(int64_t partials) {
  int lanes = 1;
  while (lanes < kWarp && lanes * 8 < partials) lanes *= 2;
  return lanes;
}

// These blocks compute dweight and dbias.
template <class A>
FASTNORM_DEVICE void fold_params(const FoldParamsArgs<A>& f, const BlockRange& blocks) {
  const int64_t partials = f.outer * f.pieces;
  const int lanes = fold_lanes(partials), lane = thread_index() % lanes;
  const int64_t width = block_threads() / lanes;
  for (int64_t first = blocks.index * width; first < f.channels; first += blocks.count * width) {
    const int64_t channel = first + thread_index() / lanes;
    const bool in = channel < f.channels;
    GradSums<double> total{};
    for (int64_t i = lane; in && i < partials; i += lanes) {
      const GradSums<A> p = load_one(f.sums + i * f.channels + channel);
      double low = 0, rstd = 1;
      if (!f.scaled) {
        const int64_t outer = f.pieces == 1 ? i : i / f.pieces;
        const SetStats<A> s =
            load_stats(f.stats, f.sets, outer * (f.channels / f.set_channels) + channel / f.set_channels);
        low = s.low, rstd = s.rstd;
      }
      merge_weighted(total, p.d, (double(p.d_centered) - low * double(p.d)) * rstd, 1);
    }
    total = reduce_lanes(total, lanes);
    if (!in || lane != 0) continue;
    if (f.dweight.data != nullptr) store_number(f.dweight.data, f.dweight.dtype, channel, total.d_centered);
    if (f.dbias.data != nullptr) store_number(f.dbias.data, f.dbias.dtype, channel, total.d);
  }
}

template <class A>
FASTNORM_KERNEL(kBlockThreads, 1)
fold_params_alone(FoldParamsArgs<A> f) {
  fold_params(f, all_blocks());
}

// ---- running statistics ----

// The mean over the samples of a channel's statistic, which lies in `row`.
template <class A>
FASTNORM_DEVICE double mean_of_samples(const A* row, const RunningArgs& r, int64_t channel) {
  double sum = 0;
  for (int64_t set = channel; set < r.sets; set += r.channels) sum += load_one(row + set);
  return sum / static_cast<double>(r.sets / r.channels);
}

// What: running = (1 - momentum) running + momentum * stats, averaged over the samples where there are several.
// Who: a thread takes a channel. Where the average is cumulative the launch has one block, so that all threads read
//   num_batches_tracked before it is raised.
template <class A>
FASTNORM_KERNEL(kBlockThreads, 1)
update_running(RunningArgs r) {
  const double momentum = r.cumulative ? 1.0 / static_cast<double>(load_one(r.num_batches_tracked) + 1) : r.momentum;
  if (r.cumulative) sync_block();
  if (block_index() == 0 && thread_index() == 0) count_batch(r.num_batches_tracked);
  const double count = r.given_count ? load_one(r.given_count) : static_cast<double>(r.count);
  if (count == 0) return;
  const double factor = r.given_count ? unbiased(count) : r.unbiased;
  const A* stats = static_cast<const A*>(r.stats);
  for_each_channel(r.channels, [&](int64_t c) {
    move_running(r.running_mean, c * r.mean_stride, mean_of_samples(stats + kMean * r.sets, r, c), momentum);
    const double var = mean_of_samples(stats + kVar * r.sets, r, c);
    if (has_variance(r, count)) move_running(r.running_var, c * r.var_stride, var * factor, momentum);
  });
}

// ---- several ranks ----

// What: the statistics of batch norm from the partials of all ranks.
// Who: a warp takes a channel, its lanes the ranks in strides; they merge in a fixed order.
template <class A>
FASTNORM_KERNEL(kBlockThreads, 2)
fold_partials(FoldArgs f) {
  const A* partials = static_cast<const A*>(f.partials);
  for_each_by_warp(f.channels, [&](int64_t c, int lane) {
    Welford<double> total{};
    for (int64_t r = lane; r < f.ranks; r += kWarp) {
      const A* partial = partials + r * partial_size(f.channels);
      total.merge(welford_of_partial([&](int64_t i) { return load_one(partial + i); }, f.channels, c));
    }
    total = reduce_lanes(total, kWarp);
    if (lane != 0) return;
    const FoldedStats<A> folded(total, f.eps);
    store_stats(static_cast<A*>(f.stats), f.channels, c, SetStats<A>{folded.mean, folded.rstd, folded.mean_low},
                folded.var);
    if (c == 0) store_one(f.count, total.count);
  });
}

}  // namespace fastnorm::cuda
