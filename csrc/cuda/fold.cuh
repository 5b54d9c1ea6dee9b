// Fold: from partials to statistics, terms of dx, and gradients of weight and bias. Also the running statistics.
//
// Who: a warp takes a set; neighbouring lanes take a channel. The lanes take the partials in strides and merge their
//   sums in a fixed order.
// Traffic: reads the partials once and writes a few numbers per set.
// Numerics: double throughout, because partials are few and the result must not show how many there were. A lane takes
//   plain sums about its first partial's mean: merging one after the other would take divisions, which each wait for the
//   last.
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

// Calls use(partial, column) for this lane's part of the partials of set `group` of `outer`.
template <class Partial, class Args, class Use>
FASTNORM_DEVICE void for_partials(const Partial* partials, const Args& f, int64_t outer, int64_t group, int lane,
                                  Use use) {
  const int64_t row = f.groups * f.columns;
  const int set_columns = static_cast<int>(f.columns);
  const int lanes_rows = kWarp / set_columns, lanes_columns = kWarp % set_columns;
  const Partial* const of_set = partials + outer * f.pieces * row + group * f.columns;
  int64_t piece = lane / set_columns;
  int column = lane % set_columns;
  while (piece < f.pieces) {
    Partial some[kFoldedTogether];
    int columns[kFoldedTogether];
    bool in[kFoldedTogether];
#pragma unroll
    for (int k = 0; k < kFoldedTogether; ++k) {
      in[k] = piece < f.pieces;
      columns[k] = column;
      if (in[k]) some[k] = load_one(of_set + piece * row + column);
      piece += lanes_rows;
      column += lanes_columns;
      if (column >= set_columns) column -= set_columns, ++piece;
    }
#pragma unroll
    for (int k = 0; k < kFoldedTogether; ++k) {
      if (in[k]) use(some[k], columns[k]);
    }
  }
}

// Plain sums of moments: of counts, of values about an origin, and of their squares.
struct PooledMoments {
  double origin = 0, count = 0, sum = 0, squares = 0;

  template <class A>
  FASTNORM_DEVICE void add(const Welford<A>& p) {
    const double n = p.count, mean = p.moments.mean;
    if (count == 0 && mean - mean == 0) origin = mean;
    const double from_origin = n * (mean - origin);
    count += n;
    sum += from_origin;
    squares += std::fma(from_origin, mean - origin, double(p.moments.m2));
  }
  FASTNORM_DEVICE Welford<double> total() const {
    if (count == 0) return {};
    const double mean = sum / count;
    return {count, {origin + mean, std::fma(-sum, mean, squares)}};
  }
};

template <class A>
FASTNORM_KERNEL(kBlockThreads, 1)
fold_forward(FoldForwardArgs<A> f) {
  for_each_by_warp(f.sets, [&](int64_t set, int lane) {
    const int64_t outer = set / f.groups, group = set - outer * f.groups;
    PooledMoments mine;
    for_partials(f.partials, f, outer, group, lane, [&](const Welford<A>& partial, int) { mine.add(partial); });
    const Welford<double> total = reduce_lanes(mine.total(), kWarp);
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
    for_partials(f.sums, f, outer, group, lane, [&](const GradSums<A>& p, int column) {
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
