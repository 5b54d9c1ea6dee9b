// Forward where neighbouring channels lie next to each other: channels_last, and batch norm of (N, C).
//
// What: does what rows_forward.h does.
// Who: a task takes a sample (batch norm: the batch) or, in a split plan, a chunk of its positions in each of two
//   passes, of which the second takes the chunks in the opposite order. A task walks whole rows: all channels of a
//   position.
// Traffic: reads x twice, the second time from the cache as far as it stayed there; reads the residual and writes y
//   once.
// Numerics: every channel has its pivot and its sums (moments.h), in A over kBlockPositions positions, beyond in
//   double, in order; then each group merges its channels, in order.
#pragma once

#include <atomic>

#include "moments.h"
#include "task.h"

namespace fastnorm::FASTNORM_CPU_CAPABILITY {

// So many positions are summed in A. With 64 the variance of 60 numbers was off by 2.7 epsilons, torch's by 0.7.
constexpr int64_t kBlockPositions = 32;
// Of the sums of chunks a task folds about so many channels; to finish one takes as long as to add so many numbers.
constexpr int64_t kFoldChannels = 512, kFinishNumbers = 32;

// Adds x - pivot and its square to the sums of the channels in rows. Lanes past the last channel have zeros.
template <class T>
struct ColumnDeviations {
  using A = Accum<T>;
  const T* x;
  const A* pivot;
  A *delta, *square;

  template <int P, class Access>
  FASTNORM_INLINE void packs(int64_t i, Access access, Strided layout) const {
    const Pack<A> about = load(pivot + i);
    Pack<A> sum = load(delta + i), squares = load(square + i);
    for (int p = 0; p < P; ++p) {
      const T* at = x + i + layout.element(p);
      const Pack<A> d = access.get(at) - about;
      sum = sum + d;
      squares = fma(d, d, squares);
      prefetch(x + i + layout.later_element(p));
    }
    store(delta + i, sum);
    store(square + i, squares);
  }
};

// The pivots of n columns, in the order of lanes, from rows that are spread over them and lie `stride` apart.
template <class T>
void choose_column_pivots(const T* x, int64_t rows, int64_t n, int64_t stride, Accum<T>* pivots) {
  using A = Accum<T>;
  constexpr int64_t L = kLanes<A>, kSample = 8;
  const int64_t sample = std::min(kSample, rows);
  for (int64_t i = 0; i < n; i += L) {
    Pack<A> sum(0);
    for (int64_t k = 0; k < sample; ++k) {
      const T* at = x + rows * k / sample * stride + i;
      sum = sum + (n - i < L ? load_first(at, n - i) : load(at));
    }
    const Pack<A> pivot = round_to<T>(sum * Pack<A>(1.0 / static_cast<double>(sample)));
    // Sums about an infinite pivot would lose the infinities of x.
    store(pivots + i, select(pivot * Pack<A>(0) >= Pack<A>(0), pivot, Pack<A>(0)));
  }
}

// Sets delta and square, in the order of lanes, to the sums of x - pivot and of its square over the rows of n columns.
template <class T>
void reduce_columns(const T* x, int64_t rows, int64_t n, Strided layout, const Accum<T>* pivots, double* delta,
                    double* square) {
  using A = Accum<T>;
  const int64_t lanes = lane_pitch<A>(n);
  const Arrays<A, 2> block(lanes);
  std::fill_n(delta, lanes, 0.0);
  std::fill_n(square, lanes, 0.0);
  for (int64_t p = 0; p < rows; p += kBlockPositions) {
    std::fill_n(block[0], lanes, A(0));
    std::fill_n(block[1], lanes, A(0));
    for_rows<A>(std::min(kBlockPositions, rows - p), n, layout,
                [&](int64_t r) { return ColumnDeviations<T>{x + layout.element(p + r), pivots, block[0], block[1]}; });
    for (int64_t i = 0; i < lanes; ++i) delta[i] += block[0][i];
    for (int64_t i = 0; i < lanes; ++i) square[i] += block[1][i];
  }
}

template <class T>
class ColumnsForward : Call<T, ForwardCall> {
  using Base = Call<T, ForwardCall>;
  using A = Accum<T>;
  using Base::args, Base::whole, Base::g, Base::stats, Base::epilogue;

  const int64_t positions_ = g.positions(), outer_ = g.outer(), lanes_ = lane_pitch<A>(g.C);
  const int64_t chunk_ = args.plan.chunk_positions, chunks_ = div_up(positions_, chunk_);
  const int64_t mask_row_ = mask_row_bytes(g.C, args.dtype);
  const Strided layout_ = position_rows<T>(g, args.plan.rows_together, mask_row_);
  const Buffer<A> pivots_{outer_ * lanes_};
  const ChannelArrays<T> coefs_{g};

  // The sums of a part of a sample, in the order of lanes.
  struct Sums {
    double *delta, *square;
    Sums part(int64_t i) const { return {delta + i, square + i}; }
  };

  // Those of some channels over all chunks, merged chunk by chunk: channel by channel each number would take a line of
  // its own from the cache (a tenth of the time of 32x2048x7x7).
  class ChannelSums {
   public:
    ChannelSums(Sums sums, int64_t chunks, int64_t pitch, int64_t first, int64_t channels)
        : first_(first / kLanes<A> * kLanes<A>), lanes_(lane_pitch<A>(first + channels) - first_), total_(lanes_) {
      std::fill_n(total_[0], lanes_, 0.0);
      std::fill_n(total_[1], lanes_, 0.0);
      for (int64_t k = 0; k < chunks; ++k) {
        const Sums chunk = sums.part(k * pitch + first_);
        for (int64_t i = 0; i < lanes_; ++i) total_[0][i] += chunk.delta[i];
        for (int64_t i = 0; i < lanes_; ++i) total_[1][i] += chunk.square[i];
      }
    }
    PivotSums operator[](int64_t lane) const { return {total_[0][lane - first_], total_[1][lane - first_]}; }

   private:
    const int64_t first_, lanes_;
    const Arrays<double, 2> total_;
  };

 public:
  using Base::Base;

  void run() {
    if (args.plan.split) {
      run_split();
      return;
    }
    for_each_task(args.parallel, outer_, [&](int64_t n) {
      const Arrays<double, 2> arrays(chunks_ * lanes_);
      const Sums sums{arrays[0], arrays[1]};
      choose_pivots(n);
      for (bool again : {false, true}) {
        for (int64_t k = 0; k < chunks_; ++k) reduce(n, k, sums.part(k * lanes_));
        if (!fold(n, 0, g.C, sums) || again) break;
      }
      for (int64_t k = chunks_; k-- > 0;) apply(n, k);
    });
  }

 private:
  void run_split() {
    const int64_t sample = chunks_ * lanes_;
    const Arrays<double, 2> arrays(outer_ * sample);
    const Sums sums{arrays[0], arrays[1]};
    for (int64_t n = 0; n < outer_; ++n) choose_pivots(n);
    const int64_t D = g.set_channels(), width = div_up(kFoldChannels, D) * D, parts = div_up(g.C, width);
    for (bool again : {false, true}) {
      for_each_task(args.parallel, outer_ * chunks_,
                    [&](int64_t t) { reduce(t / chunks_, t % chunks_, sums.part(t * lanes_)); });
      std::atomic<bool> far_off{false};
      for_each_task(Base::parallel_over(outer_ * (sample + kFinishNumbers * g.C)), outer_ * parts, [&](int64_t t) {
        const int64_t n = t / parts, first = t % parts * width;
        if (fold(n, first, std::min(width, g.C - first), sums.part(n * sample))) far_off = true;
      });
      if (!far_off || again) break;
    }
    for_each_task(
        args.parallel, outer_ * chunks_, [&](int64_t t) { apply(t / chunks_, t % chunks_); }, Order::kBackwards);
  }

  void choose_pivots(int64_t n) const {
    choose_column_pivots(whole.x + n * positions_ * g.C, positions_, g.C, g.C, pivots_ + n * lanes_);
  }

  int64_t chunk_end(int64_t chunk) const { return std::min((chunk + 1) * chunk_, positions_); }

  void reduce(int64_t n, int64_t chunk, Sums out) const {
    const int64_t begin = chunk * chunk_;
    reduce_columns(whole.x + (n * positions_ + begin) * g.C, chunk_end(chunk) - begin, g.C, layout_,
                   pivots_ + n * lanes_, out.delta, out.square);
  }

  // Merges chunks into channels and channels into sets, and writes the statistics and coefficients of the sets. True
  // where a pivot was far off; it is a better one then.
  bool fold(int64_t n, int64_t first, int64_t channels, Sums sums) const {
    const int64_t D = g.set_channels();
    const double count = static_cast<double>(positions_), set_count = count * static_cast<double>(D);
    const double share = 1 / count, set_share = 1 / set_count;
    A* const pivots = pivots_ + n * lanes_;
    const ChannelSums total(sums, chunks_, lanes_, first, channels);
    const Buffer<double> mean(D);
    bool far_off = false;
    for (int64_t c = first; c < first + channels; c += D) {
      Moments<double> set{0, 0};
      for (int64_t i = 0; i < D; ++i) {
        const int64_t lane = lane_of<T>(c + i);
        const Moments<double> channel = total[lane].moments(pivots[lane], share);
        mean[i] = channel.mean;
        set.mean += channel.mean;
        set.m2 += channel.m2;
      }
      if (D > 1) set.mean /= static_cast<double>(D);
      for (int64_t i = 0; i < D && D > 1; ++i) set.m2 += count * (mean[i] - set.mean) * (mean[i] - set.mean);
      for (int64_t i = 0; i < D; ++i) {
        const int64_t lane = lane_of<T>(c + i);
        if (!total[lane].far_off(set, share, set_count)) continue;
        pivots[lane] = round_pivot<T>(mean[i]);
        far_off = true;
      }
      stats.finish((n * g.C + c) / D, set, set_share, args.eps);
    }
    coefs_.fill(*this, n, first, channels);
    return far_off;
  }

  // Writes y at the positions of a chunk.
  void apply(int64_t n, int64_t chunk) const {
    if (!whole.y) return;  // the caller wants only the statistics
    const int64_t begin = chunk * chunk_;
    const ForwardSpan<T> s = span(n * positions_ + begin).fetching(layout_.ahead);
    forward_rows(s, chunk_end(chunk) - begin, g.C, layout_, coefs_.at(n), epilogue);
  }

  ForwardSpan<T> span(int64_t row) const { return whole.moved(row * g.C, row * mask_row_); }
};

}  // namespace fastnorm::FASTNORM_CPU_CAPABILITY
