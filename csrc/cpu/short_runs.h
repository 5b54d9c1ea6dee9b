// Planar batch norm whose runs are short (7x7, 14x14): a sample is a row of channels * S columns.
//
// What: does what rows_forward.h and rows_backward.h do, by the loops of columns_forward.h and columns_backward.h: runs
//   of 49 elements would cost a tail each, and their streams end before the processor has found them.
// Who: a task takes a tile of channels, whose columns lie side by side, in all samples.
// Traffic: reads x (backward: dy and x) from memory once while a tile fits the cache; writes y (dx) once.
// Numerics: a column is summed over kBlockPositions samples in A; then a channel sums its columns in double.
#pragma once

#include <numeric>

#include "columns_backward.h"

namespace fastnorm::FASTNORM_CPU_CAPABILITY {

// Whether runs are short and samples are many enough to expand the coefficients of channels into those of columns: for
// longer runs more of them (28x28 bfloat16: 32 samples took 0.62 times the time of run by run, 8 samples 1.6 times).
template <class T, class Args>
bool has_short_runs(const Args& args, int64_t bytes = kShortRunBytes) {
  const Geometry& g = args.geometry;
  const int64_t run = g.S * static_cast<int64_t>(sizeof(T)), samples = run <= kShortRunBytes / 2 ? 8 : 16;
  return g.kind == Kind::kBatch && g.traversal() == Traversal::kRows && g.N >= samples && run <= bytes;
}

// The channels of a tile, and their columns in the order of lanes.
template <class T>
class ColumnMap {
  using A = Accum<T>;

 public:
  // A tile has so many columns; fewer where that makes four of the tensor, for the threads.
  static constexpr int64_t kColumns = 1600, kLeastColumns = 320;

  ColumnMap(const Geometry& g, DType dtype) : S_(g.S), dtype_(dtype) {
    const int64_t whole = kLanes<A> / std::gcd(S_, kLanes<A>);  // channels that make whole packs
    const int64_t columns = std::clamp(g.C * S_ / 4, kLeastColumns, kColumns);
    const int64_t most = std::max<int64_t>(1, columns / S_);
    channels_ = most >= whole ? most / whole * whole : most;
  }
  int64_t channels() const { return channels_; }
  int64_t lanes() const { return lane_pitch<A>(channels_ * S_); }
  // The mask of a two-sided activation behind a residual has tile by tile a row for each sample. It takes no more room
  // than a row for each run, for which it is allocated.
  int64_t mask_row(int64_t channels) const { return mask_row_bytes(channels * S_, dtype_); }
  int64_t mask_at(int64_t first, int64_t samples) const { return first / channels_ * samples * mask_row(channels_); }
  // Calls each(first, channels) for the tiles of C channels, a task each.
  template <class F>
  void for_each_tile(const Parallel& parallel, int64_t C, F&& each) const {
    for_each_task(parallel, div_up(C, channels_), [&](int64_t t) {
      const int64_t first = t * channels_;
      each(first, std::min(channels_, C - first));
    });
  }

  // Sets out[lane of column i] = value[channel of i] for `channels` channels. line: lanes() numbers to work in.
  void expand(int64_t channels, const A* value, A* line, A* out) const {
    for (int64_t c = 0; c < channels; ++c) std::fill_n(line + c * S_, S_, value[c]);
    const int64_t columns = channels * S_, lanes = lane_pitch<A>(columns);
    std::fill_n(line + columns, lanes - columns, A(0));  // numbers that no store writes
    for (int64_t i = 0; i < lanes; i += kLanes<A>) to_lanes<T>(line + i, out + i);
  }
  // Adds the columns of each channel up: out[c] += their sum.
  void fold(int64_t channels, const A* in, A* line, double* out) const {
    for (int64_t i = 0; i < channels * S_; i += kLanes<A>) from_lanes<T>(in + i, line + i);
    for (int64_t c = 0; c < channels; ++c) {
      HalfSum<A> sum;
      const A* p = line + c * S_;
      int64_t i = 0;
      for (; i + kLanes<A> <= S_; i += kLanes<A>) sum.add(load(p + i));
      if (i < S_) sum.add(load_first(p + i, S_ - i));
      out[c] += sum_lanes(sum);
    }
  }

 private:
  int64_t S_, channels_;
  DType dtype_;
};

// Expands the coefficients of a tile's channels: center, rstd, scale, bias.
template <class T, class Args>
void expand_coefs(const Call<T, Args>& call, const ColumnMap<T>& map, int64_t first, int64_t channels,
                  const Arrays<Accum<T>, 4>& arrays, Accum<T>* line) {
  const Arrays<Accum<T>, 4> own(channels);
  for (int64_t c = 0; c < channels; ++c) {
    const SharedCoefs<Accum<T>> coefs = call.shared_coefs(first + c, first + c);
    own[0][c] = coefs.mean, own[1][c] = coefs.rstd, own[2][c] = coefs.scale, own[3][c] = coefs.bias;
  }
  for (int k = 0; k < 4; ++k) map.expand(channels, own[k], line, arrays[k]);
}

// Also with given statistics, which EvalForward has put in their place then.
template <class T>
class ShortRunsForward : Call<T, ForwardCall> {
  using Base = Call<T, ForwardCall>;
  using A = Accum<T>;
  using Base::args, Base::whole, Base::g, Base::stats, Base::epilogue, Base::weight, Base::bias;

  const ColumnMap<T> map_{g, args.dtype};
  const int64_t row_ = g.C * g.S, lanes_ = map_.lanes();

 public:
  using Base::Base;

  void run() {
    map_.for_each_tile(args.parallel, g.C, [&](int64_t first, int64_t channels) { run_tile(first, channels); });
    if (!whole.mask) return;
    const int64_t last = (g.C - 1) / map_.channels() * map_.channels();
    const int64_t used = map_.mask_at(last, g.N) + g.N * map_.mask_row(g.C - last);
    std::memset(whole.mask + used, 0, mask_bytes(g, args.dtype) - used);  // the same bytes in every run
  }

 private:
  void run_tile(int64_t first, int64_t channels) const {
    const Arrays<A, 4> arrays(lanes_);
    const Buffer<A> line(lanes_);
    if (!args.has_statistics()) take_statistics(first, channels, arrays, line);
    if (!whole.y) return;  // the caller wants only the statistics
    expand_coefs(*this, map_, first, channels, arrays, line);
    const ForwardSpan<T> s = whole.moved(first * g.S, map_.mask_at(first, g.N)).fetching(kRowGroup * row_);
    forward_rows(s, g.N, channels * g.S, Strided{row_, map_.mask_row(channels), 0, 0},
                 ChannelCoefs<A>{arrays[0], arrays[1], arrays[2], arrays[3]}, epilogue);
  }

  void take_statistics(int64_t first, int64_t channels, const Arrays<A, 4>& arrays, A* line) const {
    const Arrays<double, 2> sums(channels);
    const Buffer<A> pivots(channels);
    const double count = static_cast<double>(g.N * g.S), share = 1 / count;
    for (int64_t c = 0; c < channels; ++c) pivots[c] = pivot_of(first + c);
    for (bool again : {false, true}) {
      std::fill_n(sums[0], channels, 0.0);
      std::fill_n(sums[1], channels, 0.0);
      map_.expand(channels, pivots, line, arrays[0]);
      reduce(first, channels, arrays[0], arrays[1], arrays[2], line, sums[0], sums[1]);
      bool far_off = false;
      for (int64_t c = 0; c < channels; ++c) {
        const PivotSums total{sums[0][c], sums[1][c]};
        const Moments<double> moments = total.moments(pivots[c], share);
        stats.finish(first + c, moments, share, args.eps);
        if (!total.far_off(moments, share, count)) continue;
        pivots[c] = round_pivot<T>(moments.mean);
        far_off = true;
      }
      if (!far_off || again) break;
    }
  }

  // The mean of a channel's first run.
  A pivot_of(int64_t channel) const {
    PivotSample<T> sample;
    for (int64_t i = 0; i < g.S; i += kLanes<A>) sample.add(whole.x + channel * g.S + i, g.S - i);
    return sample.pivot();
  }

  void reduce(int64_t first, int64_t channels, const A* pivots, A* delta, A* square, A* line, double* deltas,
              double* squares) const {
    for (int64_t n = 0; n < g.N; n += kBlockPositions) {
      std::fill_n(delta, lanes_, A(0));
      std::fill_n(square, lanes_, A(0));
      const T* x = whole.x + n * row_ + first * g.S;
      const Strided layout = Strided{row_, 0, 0, 0}.fetching(kRowGroup);
      for_rows<A>(std::min(kBlockPositions, g.N - n), channels * g.S, layout,
                  [&](int64_t r) { return ColumnDeviations<T>{x + r * row_, pivots, delta, square}; });
      map_.fold(channels, delta, line, deltas);
      map_.fold(channels, square, line, squares);
    }
  }
};

template <class T>
class ShortRunsBackward : Call<T, BackwardCall> {
  using Base = Call<T, BackwardCall>;
  using A = Accum<T>;
  using Base::args, Base::whole, Base::g, Base::stats, Base::epilogue, Base::weight;

  const ColumnMap<T> map_{g, args.dtype};
  const int64_t row_ = g.C * g.S, lanes_ = map_.lanes();
  const bool applies_ = args.dx || args.dresidual;
  const bool sums_ = Base::takes_sums();
  const bool caches_d_ = sums_ && applies_ && Base::caches_slopes(g.N * lanes_);

 public:
  using Base::Base;

  void run() {
    map_.for_each_tile(args.parallel, g.C, [&](int64_t first, int64_t channels) { run_tile(first, channels); });
  }

 private:
  void run_tile(int64_t first, int64_t channels) const {
    const Arrays<A, 4> arrays(lanes_);
    const Arrays<A, 2> sums(lanes_);
    const Buffer<A> line(lanes_), cached(caches_d_ ? g.N * lanes_ : 0);
    expand_coefs(*this, map_, first, channels, arrays, line);
    const ChannelCoefs<A> coefs{arrays[0], arrays[1], arrays[2], arrays[3]};
    const int64_t at = first * g.S, columns = channels * g.S;
    const BackwardSpan<T> s = whole.moved(at, at, map_.mask_at(first, g.N));
    const Strided layout = Strided{row_, map_.mask_row(channels), row_, lanes_}.fetching(kRowGroup);
    const Arrays<A, 2> terms(channels);
    if (sums_) {
      const Arrays<double, 2> totals(channels);
      std::fill_n(totals[0], channels, 0.0);
      std::fill_n(totals[1], channels, 0.0);
      reduce(s, coefs, columns, channels, layout, caches_d_ ? static_cast<A*>(cached) : nullptr, sums, line, totals);
      for (int64_t c = 0; c < channels; ++c) {
        const int64_t set = first + c;
        const double w = weight[set], low = Base::center(set).low, d = totals[0][c];
        const double d_xhat = Base::xhat_sum(set, {d, totals[1][c]}, low);
        if (args.dbias) args.dbias[set] = d;
        if (args.dweight) args.dweight[set] = d_xhat;
        const SetTerms<A> own = Base::set_terms(set, w * d, w * d_xhat, low);
        terms[0][c] = own.offset, terms[1][c] = own.slope;
      }
    } else if (args.sums) {
      for (int64_t c = 0; c < channels; ++c) {
        const SetTerms<A> own = Base::given_terms(first + c);
        terms[0][c] = own.offset, terms[1][c] = own.slope;
      }
    }
    if (!applies_) return;
    if (!args.frozen) {
      map_.expand(channels, terms[0], line, sums[0]);
      map_.expand(channels, terms[1], line, sums[1]);
    }
    const ChannelTerms<A> column_terms{sums[0], sums[1]};
    if (caches_d_) {
      const Epilogue<A> none{Activation::kNone, Pack<A>(0), false};
      backward_rows(s.with_d(cached), g.N, columns, Strided{row_, 0, lanes_, 0}, coefs, column_terms, none);
    } else if (args.frozen) {
      backward_rows(s, g.N, columns, layout, coefs, FrozenTerms<A>{}, epilogue);
    } else {  // x and dy are in L2
      const Strided near{row_, layout.mask_stride, row_, 0};
      backward_rows(s, g.N, columns, near, coefs, column_terms, epilogue);
    }
  }

  void reduce(const BackwardSpan<T>& s, const ChannelCoefs<A>& coefs, int64_t columns, int64_t channels, Strided layout,
              A* cached, const Arrays<A, 2>& sums, A* line, const Arrays<double, 2>& totals) const {
    for (int64_t n = 0; n < g.N; n += kBlockPositions) {
      std::fill_n(sums[0], lanes_, A(0));
      std::fill_n(sums[1], lanes_, A(0));
      with_smooth_activation(epilogue, [&](const auto& e) FASTNORM_LAMBDA {
        const auto at_row = [&](int64_t r) {
          return ColumnGradSums<T, std::decay_t<decltype(e)>>{
              s.moved(layout.element(n + r), layout.dy(n + r), layout.mask(n + r)),
              coefs,
              e,
              cached ? cached + (n + r) * lanes_ : nullptr,
              sums[0],
              sums[1]};
        };
        for_rows<A>(std::min(kBlockPositions, g.N - n), columns, layout, at_row);
      });
      map_.fold(channels, sums[0], line, totals[0]);
      map_.fold(channels, sums[1], line, totals[1]);
    }
  }
};

}  // namespace fastnorm::FASTNORM_CPU_CAPABILITY
