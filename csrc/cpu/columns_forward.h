// Forward where neighbouring channels lie next to each other: channels_last, and batch norm of (N, C).
//
// What     as rows_forward.h.
// Who      a task -> a tile of channels (whole groups) over all positions of a sample or, for batch norm, of the batch;
//          when such a tile does not fit the cache, or tiles are few (plan.split), a task -> a chunk of positions in
//          each of two passes, the second one backwards.
// Traffic  x once from memory while a tile fits the cache (twice otherwise), residual once, y once.
// Numerics one accumulator per channel; blocks of plan.block_positions as in rows_forward.h, merged in double in order;
//          a group then merges its channels in order.
// Why not  one pass with Welford's recurrence: a division per element, and its error grows with the number of steps.
#pragma once

#include "task.h"

namespace fastnorm::FASTNORM_CPU_CAPABILITY {

// Side-by-side moments of a tile of channels, as plain arrays.
struct TileMoments {
  double *mean, *m2;
};

// One block: `positions` rows of `width` channels, `stride` apart. Merges into `total` of total_count positions.
template <class T>
class ColumnBlock {
  using A = Accum<T>;
  static constexpr int64_t L = kLanes<A>;
  const T* x_;
  const int64_t positions_, width_, stride_;
  A *mean_, *delta_, *square_;  // [width]

 public:
  ColumnBlock(const T* x, int64_t positions, int64_t width, int64_t stride, A* scratch, int64_t pitch)
      : x_(x),
        positions_(positions),
        width_(width),
        stride_(stride),
        mean_(scratch),
        delta_(scratch + pitch),
        square_(scratch + 2 * pitch) {}

  void merge_into(TileMoments total, double total_count) const {
    int64_t p = 0;
    for (; p + 4 <= positions_; p += 4) for_columns([&](int64_t i, auto access) { sum<4>(p, i, access); });
    for (; p < positions_; ++p) for_columns([&](int64_t i, auto access) { sum<1>(p, i, access); });
    const Pack<A> inverse(1.0 / static_cast<double>(positions_));
    for (int64_t i = 0; i < width_; i += L) store(mean_ + i, load(mean_ + i) * inverse);
    for (p = 0; p + 4 <= positions_; p += 4) for_columns([&](int64_t i, auto access) { deviate<4>(p, i, access); });
    for (; p < positions_; ++p) for_columns([&](int64_t i, auto access) { deviate<1>(p, i, access); });
    const double count = static_cast<double>(positions_);
    for (int64_t i = 0; i < width_; ++i) {
      const double shift = delta_[i];
      Moments<double> moments{total.mean[i], total.m2[i]};
      const double m2 = square_[i] - shift * shift / count;
      moments.merge({mean_[i] + shift / count, m2 < 0 ? 0 : m2}, total_count, count);
      total.mean[i] = moments.mean;
      total.m2[i] = moments.m2;
    }
  }

 private:
  template <class F>
  FASTNORM_INLINE void for_columns(F&& f) const {
    int64_t i = 0;
    for (; i + L <= width_; i += L) f(i, Whole{});
    if (i < width_) f(i, Edge{width_ - i});
  }

  template <int P, class Access>
  FASTNORM_INLINE void sum(int64_t p, int64_t i, Access access) const {
    Pack<A> v[P];
    for (int k = 0; k < P; ++k) v[k] = access.get(x_ + (p + k) * stride_ + i, k);
    const Pack<A> sum = tree_sum(v);
    store(mean_ + i, p == 0 ? sum : load(mean_ + i) + sum);
  }

  template <int P, class Access>
  FASTNORM_INLINE void deviate(int64_t p, int64_t i, Access access) const {
    const Pack<A> mean = load(mean_ + i);
    Pack<A> d[P];
    for (int k = 0; k < P; ++k) d[k] = access.get(x_ + (p + k) * stride_ + i, k) - mean;
    const Pack<A> delta = tree_sum(d), square = tree_dot(d, d);
    store(delta_ + i, p == 0 ? delta : load(delta_ + i) + delta);
    store(square_ + i, p == 0 ? square : load(square_ + i) + square);
  }
};

template <class T>
class ColumnsForward : Call<T, ForwardArgs> {
  using Base = Call<T, ForwardArgs>;
  using A = Accum<T>;
  using Base::args, Base::g, Base::stats, Base::epilogue;

  const T* x_ = static_cast<const T*>(args.x);
  const T* residual_ = static_cast<const T*>(args.residual);
  T* y_ = static_cast<T*>(args.y);
  const int64_t positions_ = g.positions(), outer_ = g.outer();
  const int64_t tile_ = args.plan.tile, tiles_ = div_up(g.C, tile_);
  const int64_t chunk_ = args.plan.chunk_positions, chunks_ = div_up(positions_, chunk_);
  const int64_t mask_row_ = mask_row_bytes(g.C, args.dtype);

 public:
  using Base::Base;

  void run() {
    if (args.plan.split) {
      Buffer<double> mean(outer_ * chunks_ * g.C), m2(outer_ * chunks_ * g.C);
      for_each_task(args.parallel, outer_ * chunks_, [&](int64_t t) {
        for (int64_t tile = 0; tile < tiles_; ++tile) {
          const int64_t first = tile * tile_;
          reduce(t / chunks_, t % chunks_, first, width(tile), {mean + t * g.C + first, m2 + t * g.C + first});
        }
      });
      for (int64_t n = 0; n < outer_; ++n) {
        fold(n, 0, g.C, [&](int64_t chunk) {
          const int64_t at = (n * chunks_ + chunk) * g.C;
          return TileMoments{mean + at, m2 + at};
        });
      }
      for_each_task(args.parallel, outer_ * chunks_, [&](int64_t t) {
        const int64_t back = outer_ * chunks_ - 1 - t;  // what reduce read last is still in cache
        apply(back / chunks_, 0, g.C, back % chunks_ * chunk_, chunk_end(back % chunks_));
      });
      return;
    }
    for_each_task(args.parallel, outer_ * tiles_, [&](int64_t t) {
      const int64_t n = t / tiles_, first = t % tiles_ * tile_, channels = width(t % tiles_);
      Buffer<double> mean(channels), m2(channels);
      fold(n, first, channels, [&](int64_t chunk) {
        reduce(n, chunk, first, channels, {mean, m2});
        return TileMoments{mean, m2};
      });
      apply(n, first, channels, 0, positions_);
    });
  }

 private:
  int64_t width(int64_t tile) const { return std::min(tile_, g.C - tile * tile_); }
  int64_t chunk_end(int64_t chunk) const { return std::min((chunk + 1) * chunk_, positions_); }
  double chunk_count(int64_t chunk) const { return static_cast<double>(chunk_end(chunk) - chunk * chunk_); }
  const T* row(const T* base, int64_t n, int64_t position) const { return base + (n * positions_ + position) * g.C; }

  void reduce(int64_t n, int64_t chunk, int64_t first, int64_t channels, TileMoments out) const {
    const int64_t pitch = div_up(channels, kLanes<A>) * kLanes<A>;
    Buffer<A> scratch(3 * pitch);
    std::fill_n(out.mean, channels, 0.0);
    std::fill_n(out.m2, channels, 0.0);
    const int64_t begin = chunk * chunk_, end = chunk_end(chunk);
    for (int64_t p = begin; p < end; p += args.plan.block_positions) {
      const int64_t rows = std::min(args.plan.block_positions, end - p);
      ColumnBlock<T>(row(x_, n, p) + first, rows, channels, g.C, scratch, pitch)
          .merge_into(out, static_cast<double>(p - begin));
    }
  }

  // Chunks into channels, channels into sets, sets into the stats tensor.
  template <class F>
  void fold(int64_t n, int64_t first, int64_t channels, F&& partial) const {
    Buffer<double> mean(channels), m2(channels);
    double count = 0;
    for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
      const TileMoments other = partial(chunk);
      for (int64_t i = 0; i < channels; ++i) {
        Moments<double> moments{chunk == 0 ? 0 : mean[i], chunk == 0 ? 0 : m2[i]};
        moments.merge({other.mean[i], other.m2[i]}, count, chunk_count(chunk));
        mean[i] = moments.mean;
        m2[i] = moments.m2;
      }
      count += chunk_count(chunk);
    }
    const int64_t D = g.kind == Kind::kBatch ? 1 : g.D();
    const int64_t first_set = g.kind == Kind::kBatch ? first : n * g.G + first / D;
    for (int64_t s = 0; s < channels / D; ++s) {
      Moments<double> set{mean[s * D], m2[s * D]};
      for (int64_t i = 1; i < D; ++i) {
        set.merge({mean[s * D + i], m2[s * D + i]}, count * static_cast<double>(i), count);
      }
      stats.finish(first_set + s, set, count * static_cast<double>(D), args.eps);
    }
  }

  // Positions [begin, end) of a tile, backwards.
  void apply(int64_t n, int64_t first, int64_t channels, int64_t begin, int64_t end) const {
    if (!y_) return;  // only the statistics are wanted
    const ChannelArrays<A> arrays(channels);
    const ChannelCoefs<A> coefs = arrays.fill(*this, n, first, channels);
    for (int64_t p = end - 1; p >= begin; --p) {
      const int64_t at = (n * positions_ + p) * g.C + first;
      uint8_t* mask = args.mask ? args.mask + (n * positions_ + p) * mask_row_ + first / 8 : nullptr;
      forward_stretch<T>({x_ + at, residual_ ? residual_ + at : nullptr, y_ + at, mask}, channels, coefs, epilogue);
    }
  }
};

}  // namespace fastnorm::FASTNORM_CPU_CAPABILITY
