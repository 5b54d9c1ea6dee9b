// Reductions over columns: a thread's moments of its channels, and the merge of a channel's accumulators over the rows
// of threads of a block.
#pragma once

#include <algorithm>

#include "columns.cuh"

namespace fastnorm::cuda {

// ---- a thread's moments ----

// The moments of a thread's channels over `count` positions: the sum of x - origin, and the sum of squared deviations
// from the thread's own mean.
template <class A, int W>
struct LaneMoments {
  A count = 0, inverse = 0;  // inverse: 1 / count, and 0 where that is 0
  A sum[W] = {}, m2[W] = {};
};

// Takes packs below one another as moments about their own mean, lane by lane, and merges them into the lanes' moments
// after Chan, Golub and LeVeque. The weights are the same for all lanes.
//
// The mean of a batch is taken of x itself where x has 16 bits: a few of its numbers add up in float32 without a
// rounding that matters, so that the origin is subtracted once a batch. A part of each is added, because a sum of the
// largest would overflow.
template <int kRows, int W, class T, class A>
FASTNORM_DEVICE void take_moments(const Pack<T, W> (&packs)[kRows], const A (&origin)[W], LaneMoments<A, W>& total) {
  constexpr bool kRaw = sizeof(T) == 2;
  const A count = total.count + kRows, inverse = reciprocal_of(count), product = total.count * kRows * inverse;
#pragma unroll
  for (int w = 0; w < W; ++w) {
    A x[kRows], mean = 0, m2 = 0;
#pragma unroll
    for (int u = 0; u < kRows; ++u) {
      x[u] = widen_lane<A>(packs[u], w);
      if (!kRaw) x[u] -= origin[w];
      mean = kRaw ? std::fma(x[u], A(1) / kRows, mean) : mean + x[u];
    }
    if (!kRaw) mean *= A(1) / kRows;
#pragma unroll
    for (int u = 0; u < kRows; ++u) m2 = std::fma(x[u] - mean, x[u] - mean, m2);
    if (kRaw) mean -= origin[w];
    const A delta = std::fma(-total.sum[w], total.inverse, mean);
    total.m2[w] = std::fma(delta * product, delta, total.m2[w] + m2);
    total.sum[w] = std::fma(mean, A(kRows), total.sum[w]);
  }
  total.count = count;
  total.inverse = inverse;
}

// Reads packs of x at places below one another, and merges their moments into `total`.
template <class T, int W, class A, class Read, class Places>
FASTNORM_DEVICE void read_moments(const Places& places, const A (&origin)[W], Read read, LaneMoments<A, W>& total) {
  constexpr int kRows = std::extent_v<Places>;
  Pack<T, W> packs[kRows];
#pragma unroll
  for (int u = 0; u < kRows; ++u) packs[u] = read(places[u]);
  take_moments(packs, origin, total);
}

template <int W, class T, class A>
FASTNORM_DEVICE void load_origins(const ColumnsPiece<W>& piece, const T* x, A (&origin)[W]) {
  const int64_t set_channels = piece.shape.set_channels;
  if (!piece.in) {
#pragma unroll
    for (int w = 0; w < W; ++w) origin[w] = 0;
  } else if (set_channels == 1) {  // the channels' first elements adjoin
    widen<A>(load_cached<W>(x + piece.set_base(0)), origin);
#pragma unroll
    for (int w = 0; w < W; ++w) origin[w] = as_origin(origin[w]);
  } else {
    piece.for_lane_sets([&](int w) { origin[w] = origin_of<A>(x + piece.set_base(w)); },
                        [&](int w) { origin[w] = origin[w - 1]; });
  }
}

// The statistics of this thread's channels.
template <int W, class A>
FASTNORM_DEVICE void load_lane_stats(const ColumnsPiece<W>& piece, const A* stats, int64_t sets,
                                     SetStats<A> (&out)[W]) {
  if (!piece.in) {
#pragma unroll
    for (int w = 0; w < W; ++w) out[w] = {};
  } else if (piece.shape.set_channels == 1) {  // the channels' statistics adjoin
    A mean[W], rstd[W], low[W];
    load_adjoining(stats + kMean * sets + piece.set(0), mean);
    load_adjoining(stats + kRstd * sets + piece.set(0), rstd);
    load_adjoining(stats + kMeanLow * sets + piece.set(0), low);
#pragma unroll
    for (int w = 0; w < W; ++w) out[w] = {mean[w], rstd[w], low[w]};
  } else {
    piece.for_lane_sets([&](int w) { out[w] = load_stats(stats, sets, piece.set(w)); },
                        [&](int w) { out[w] = out[w - 1]; });
  }
}

// The sums of a thread's channels over d and d (x - mean).
template <class A, int W>
struct LaneSums {
  A d[W] = {}, d_centered[W] = {};
};

// ---- a block's channels ----

// The number of rows of threads whose accumulators stay apart when lanes have been merged by shuffles. A row has
// threads_x * W channels. plan/grid.cpp reserves shared memory for so many.
FASTNORM_DEVICE int merged_rows(const ColumnsShape& shape) { return block_threads() >> shape.log_row_threads; }

// 1 / n; 0 where n is 0.
template <class A>
FASTNORM_DEVICE A inverse_of(int n) {
  return n > 0 ? A(1) / static_cast<A>(n) : A(0);
}

// Sums over the lanes of a warp that have the same channels.
template <int K, class A>
FASTNORM_DEVICE void sum_over_rows(A (&values)[K], int threads_x) {
#pragma unroll 1
  for (int lanes = threads_x; lanes < kWarp; lanes *= 2) {
#pragma unroll
    for (int k = 0; k < K; ++k) values[k] += shuffle_xor(values[k], lanes);
  }
}

// Writes the accumulators of a warp's channels, or of a row of threads that is wider, to its row of `merged`. Returns
// the width of a row.
template <int W, class Acc>
FASTNORM_DEVICE int stack_rows(const ColumnsPiece<W>& piece, const Acc (&mine)[W], Acc* merged) {
  const ColumnsShape& shape = piece.shape;
  const int log_row = shape.log_row_threads, width = shape.threads_x * W, row = thread_index() >> log_row;
  if ((thread_index() & ((1 << log_row) - 1)) < shape.threads_x) {
#pragma unroll
    for (int w = 0; w < W; ++w) merged[row * width + piece.x * W + w] = mine[w];
  }
  sync_block();
  return width;
}

// Merges the sums of a channel over the rows of threads. Some thread calls use(c, total) once for each channel c of the
// item.
template <int W, class A, class Use>
FASTNORM_DEVICE void merge_rows(const ColumnsPiece<W>& piece, const LaneSums<A, W>& mine, GradSums<A>* merged,
                                Use use) {
  A sums[2 * W];
#pragma unroll
  for (int w = 0; w < W; ++w) sums[w] = mine.d[w], sums[W + w] = mine.d_centered[w];
  sum_over_rows(sums, piece.shape.threads_x);
  GradSums<A> of_row[W];
#pragma unroll
  for (int w = 0; w < W; ++w) of_row[w] = {sums[w], sums[W + w]};
  const int width = stack_rows(piece, of_row, merged), rows = merged_rows(piece.shape);
  for (int c = thread_index(); c < piece.channels; c += block_threads()) {
    GradSums<A> total = merged[c];
    for (int row = 1; row < rows; ++row) total.merge(merged[row * width + c]);
    use(c, total);
  }
}

// The same for moments. The common mean is taken first, of a warp and then of the block: both are plain sums, and so
// are the squared deviations from it.
template <int W, class A, class Use>
FASTNORM_DEVICE void merge_rows(const ColumnsPiece<W>& piece, const LaneMoments<A, W>& mine, Moments<A>* merged,
                                Use use) {
  const ColumnsShape& shape = piece.shape;
  const int log_row = shape.log_row_threads, per_row = 1 << (log_row - shape.log_threads_x);  // rows of threads
  const A row_inverse = inverse_of<A>(piece.count((thread_index() >> log_row) * per_row, per_row));
  A mean[W], m2[W];
#pragma unroll
  for (int w = 0; w < W; ++w) mean[w] = mine.sum[w];
  sum_over_rows(mean, shape.threads_x);
#pragma unroll
  for (int w = 0; w < W; ++w) {
    mean[w] *= row_inverse;
    const A deviation = std::fma(mine.sum[w], mine.inverse, -mean[w]);
    m2[w] = std::fma(deviation * mine.count, deviation, mine.m2[w]);
  }
  sum_over_rows(m2, shape.threads_x);
  Moments<A> row_moments[W];
#pragma unroll
  for (int w = 0; w < W; ++w) row_moments[w] = {mean[w], m2[w]};
  const int width = stack_rows(piece, row_moments, merged), rows = merged_rows(shape);
  const A positions = static_cast<A>(piece.positions);
  for (int c = thread_index(); c < piece.channels; c += block_threads()) {
    A sum = 0, m2 = 0;
    for (int row = 0; row < rows; ++row) {
      sum = std::fma(merged[row * width + c].mean, static_cast<A>(piece.count(row * per_row, per_row)), sum);
    }
    const A mean = sum / positions;
    for (int row = 0; row < rows; ++row) {
      const A deviation = merged[row * width + c].mean - mean;
      m2 += std::fma(static_cast<A>(piece.count(row * per_row, per_row)) * deviation, deviation,
                     merged[row * width + c].m2);
    }
    use(c, Welford<A>{positions, {mean, m2}});
  }
}

// Calls body(set, lane, lanes) for the sets of a tile. As many neighbouring lanes as a set has channels, at most a
// warp, take a set together. All lanes of a warp make the same number of calls; set is -1 where no set is left.
template <int W, class Body>
FASTNORM_DEVICE void for_each_set(const ColumnsPiece<W>& piece, Body body) {
  const int channels = static_cast<int>(piece.shape.set_channels);
  // Where there is one set, by_set_channels divides by 1. An invalid piece has none.
  const auto most = static_cast<int>(piece.shape.by_set_channels.divide(static_cast<unsigned>(piece.channels)));
  const int sets = static_cast<int>(std::min(static_cast<int64_t>(most), piece.shape.groups));
  const int log_lanes = std::min(bit_width(channels - 1), log2_of(kWarp));
  const int lanes = 1 << log_lanes, lane = thread_index() & (lanes - 1), group = thread_index() >> log_lanes;
  const int groups = block_threads() >> log_lanes;
  for (int first = 0; first < sets; first += groups) body(first + group < sets ? first + group : -1, lane, lanes);
}

}  // namespace fastnorm::cuda
