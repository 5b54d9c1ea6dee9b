// The moments of a piece of rows: of a thread, and of its team.
#pragma once

#include "rows.cuh"
#include "stats.cuh"

namespace fastnorm::cuda {

// Moments of so many values: the sum of x - origin, and the sum of squared deviations from their own mean. Sums need no
// weights, and infinite ones stay infinite.
template <class A>
struct ThreadMoments {
  A count = 0, inverse = 0;  // inverse: 1 / count, or 0
  A sum = 0, m2 = 0;

  // Merges `values` values of this sum, relative to the origin, after Chan, Golub and LeVeque.
  FASTNORM_DEVICE void merge(A values, A share, A other_sum, A other_m2) {  // share: 1 / values
    const A total = count + values, inverse_total = reciprocal_of(total);
    const A delta = std::fma(-sum, inverse, other_sum * share);
    m2 = std::fma(delta, delta * (values * (count * inverse_total)), m2 + other_m2);  // 0 where count is, not NaN
    sum += other_sum;
    count = total;
    inverse = inverse_total;
  }
};

template <class A>
FASTNORM_DEVICE bool is_finite(A v) {
  return v - v == A(0);
}

// Takes N packs, all of them `in`. 16-bit numbers are added up as they are: so few of them add up in float32 without a
// rounding that matters, and the origin is subtracted once. Sums are divided afterwards, because the quotient of a
// denormal number loses digits; only where the largest numbers overflow a sum, each is divided first.
template <int N, int W, class T, class A>
FASTNORM_DEVICE void take_packs(const Pack<T, W> (&packs)[N], A origin, ThreadMoments<A>& total) {
  constexpr bool kRaw = sizeof(T) == 2;
  constexpr int kValues = N * W, kSums = kValues < 4 ? kValues : 4;  // independent sums
  constexpr A kShare = A(1) / kValues;                               // exact: kValues is a power of two
  A x[N][W], sums[kSums], squares[kSums];
#pragma unroll
  for (int n = 0; n < N; ++n) {
    widen<A>(packs[n], x[n]);
#pragma unroll
    for (int w = 0; w < W; ++w) {
      const int i = n * W + w;
      if (!kRaw) x[n][w] -= origin;
      sums[i % kSums] = i < kSums ? x[n][w] : sums[i % kSums] + x[n][w];
    }
  }
  const A plain = tree_sum(sums);
  A mean = plain * kShare, sum = kRaw ? std::fma(-origin, A(kValues), plain) : plain;
  if (kRaw && !is_finite(sum)) {
    mean = 0;
#pragma unroll
    for (int i = 0; i < kValues; ++i) mean = std::fma(x[i / W][i % W], kShare, mean);
    sum = (mean - origin) * kValues;
  }
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    const A deviation = x[i / W][i % W] - mean;
    squares[i % kSums] = i < kSums ? deviation * deviation : std::fma(deviation, deviation, squares[i % kSums]);
  }
  total.merge(kValues, kShare, sum, tree_sum(squares));
}

// Takes those of N packs that are `in`.
template <int N, int W, class T, class A>
FASTNORM_DEVICE void take_some(const Pack<T, W> (&packs)[N], const Step (&steps)[N], A origin,
                               ThreadMoments<A>& total) {
  int values = 0;
  A x[N][W], sum = 0, m2 = 0;
#pragma unroll
  for (int n = 0; n < N; ++n) {
    if (!steps[n].in) continue;
    values += W;
    widen<A>(packs[n], x[n]);
#pragma unroll
    for (int w = 0; w < W; ++w) {
      x[n][w] -= origin;
      sum += x[n][w];
    }
  }
  if (values == 0) return;
  const A share = A(1) / static_cast<A>(values), mean = sum * share;
#pragma unroll
  for (int n = 0; n < N; ++n) {
    if (!steps[n].in) continue;
#pragma unroll
    for (int w = 0; w < W; ++w) m2 = std::fma(x[n][w] - mean, x[n][w] - mean, m2);
  }
  total.merge(static_cast<A>(values), share, sum, m2);
}

// Merges the moments of this thread's part of a range, relative to `origin`, into `total`; read(step) gives the pack of
// x there.
template <class T, int W, class A, class Read>
FASTNORM_DEVICE void accumulate_moments(const RowsPiece<W>& piece, const ThreadSteps& range, A origin, Read read,
                                        ThreadMoments<A>& total) {
  if (!range.valid) return;
  const bool gaps = piece.has_gaps();
  ThreadSteps steps_of_range = range;
  steps_of_range.valid = true;  // the compiler knows it now
  piece.template walk<kRowsUnroll<W>>(steps_of_range, [&]<int N>(const Step(&steps)[N]) {
    Pack<T, W> packs[N];
    if (N > 1 && !gaps) {
#pragma unroll
      for (int u = 0; u < N; ++u) packs[u] = read(steps[u]);
      return take_packs(packs, origin, total);
    }
#pragma unroll
    for (int u = 0; u < N; ++u) {
      if (steps[u].in) packs[u] = read(steps[u]);
    }
    if (N > 1) {
      take_some(packs, steps, origin, total);
    } else if (steps[0].in) {
      take_packs(packs, origin, total);
    }
  });
}

// The moments of a team's piece from those of its threads: the common mean first, then the squared deviations from it.
// Both are plain sums. All threads of the block take part.
template <int W, class A>
FASTNORM_DEVICE Welford<A> merge_team(const RowsPiece<W>& piece, const Team& team, const ThreadMoments<A>& mine,
                                      void* scratch) {
  const A count = static_cast<A>(piece.elements());
  // The second sum is that of quotients, in case the first overflows.
  A sums[2] = {mine.sum, mine.sum * reciprocal_of(count)};
  sum_team(team, sums, scratch, 0);
  const A mean = is_finite(sums[0]) ? sums[0] / count : sums[1];
  const A deviation = std::fma(mine.sum, mine.inverse, -mean);
  A m2[1] = {std::fma(deviation, deviation * mine.count, mine.m2)};
  sum_team(team, m2, scratch, 2);
  return {count, {mean, m2[0]}};
}

}  // namespace fastnorm::cuda
