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

// Side-by-side moments of a tile of channels, as plain arrays; means relative to each channel's origin.
struct TileMoments {
  double *mean, *m2;

  void clear(int64_t channels) const {
    std::fill_n(mean, channels, 0.0);
    std::fill_n(m2, channels, 0.0);
  }

  // Takes in other_count values per channel to the count it has; `other(i, moments)` gives lanes i to i + 7.
  template <class F>
  FASTNORM_INLINE void merge(int64_t channels, double count, double other_count, F&& other) const {
    int64_t i = 0;
    for (; i + PackD::kLanes <= channels; i += PackD::kLanes) {
      Moments<PackD> total{load(mean + i), load(m2 + i)};
      total.merge(other(i), count, other_count);
      store(mean + i, total.mean);
      store(m2 + i, total.m2);
    }
    if (i == channels) return;
    const int64_t rest = channels - i;
    Moments<PackD> total{load_first(mean + i, rest), load_first(m2 + i, rest)};
    total.merge(other(i), count, other_count);
    store_first(mean + i, total.mean, rest);
    store_first(m2 + i, total.m2, rest);
  }
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
  ColumnBlock(const T* x, int64_t positions, int64_t width, int64_t stride, const Arrays<A, 3>& scratch)
      : x_(x),
        positions_(positions),
        width_(width),
        stride_(stride),
        mean_(scratch[0]),
        delta_(scratch[1]),
        square_(scratch[2]) {}

  void merge_into(TileMoments total, double total_count, const double* origin) const {
    int64_t p = 0;
    for (; p + 4 <= positions_; p += 4) for_columns([&](int64_t i, auto access) { sum<4>(p, i, access); });
    for (; p < positions_; ++p) for_columns([&](int64_t i, auto access) { sum<1>(p, i, access); });
    const Pack<A> inverse(1.0 / static_cast<double>(positions_));
    for (int64_t i = 0; i < width_; i += L) store(mean_ + i, round_to<T>(load(mean_ + i) * inverse));  // as in rows
    for (p = 0; p + 4 <= positions_; p += 4) for_columns([&](int64_t i, auto access) { deviate<4>(p, i, access); });
    for (; p < positions_; ++p) for_columns([&](int64_t i, auto access) { deviate<1>(p, i, access); });
    const double count = static_cast<double>(positions_);
    total.merge(width_, total_count, count, [&](int64_t i) {
      const PackD shift = load_wide(delta_ + i);
      const PackD mean = (load_wide(mean_ + i) - load(origin + i)) + shift * PackD(1 / count);
      const PackD m2 = load_wide(square_ + i) - shift * shift * PackD(1 / count);
      return Moments<PackD>{mean, select(m2 <= PackD(0), PackD(0), m2)};
    });
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
    const ChannelArrays<A> coefs(g);
    if (args.plan.split) {
      const Arrays<double, 2> partials(outer_ * chunks_ * g.C);
      for_each_task(args.parallel, outer_ * chunks_, [&](int64_t t) {
        for (int64_t tile = 0; tile < tiles_; ++tile) {
          const int64_t first = tile * tile_, at = t * g.C + first;
          reduce(t / chunks_, t % chunks_, first, width(tile), {partials[0] + at, partials[1] + at});
        }
      });
      for_each_tile([&](int64_t n, int64_t first, int64_t channels) {
        fold(n, first, channels, [&](int64_t chunk) {
          const int64_t at = (n * chunks_ + chunk) * g.C + first;
          return TileMoments{partials[0] + at, partials[1] + at};
        });
        coefs.fill(*this, n, first, channels);
      });
      for_each_task(args.parallel, outer_ * chunks_, [&](int64_t t) {
        const int64_t back = outer_ * chunks_ - 1 - t, chunk = back % chunks_;  // what reduce read last is in cache
        apply(coefs, back / chunks_, 0, g.C, chunk * chunk_, chunk_end(chunk));
      });
      return;
    }
    for_each_tile([&](int64_t n, int64_t first, int64_t channels) {
      const Arrays<double, 2> partial(channels);
      fold(n, first, channels, [&](int64_t chunk) {
        reduce(n, chunk, first, channels, {partial[0], partial[1]});
        return TileMoments{partial[0], partial[1]};
      });
      coefs.fill(*this, n, first, channels);
      apply(coefs, n, first, channels, 0, positions_);
    });
  }

 private:
  template <class F>
  void for_each_tile(F&& f) const {
    for_each_task(args.parallel, outer_ * tiles_,
                  [&](int64_t t) { f(t / tiles_, t % tiles_ * tile_, width(t % tiles_)); });
  }
  int64_t width(int64_t tile) const { return std::min(tile_, g.C - tile * tile_); }
  int64_t chunk_end(int64_t chunk) const { return std::min((chunk + 1) * chunk_, positions_); }
  double chunk_count(int64_t chunk) const { return static_cast<double>(chunk_end(chunk) - chunk * chunk_); }

  void read_origins(int64_t n, int64_t first, int64_t channels, double* origin) const {
    const T* row = x_ + n * positions_ * g.C + first;
    for (int64_t i = 0; i < channels; ++i) origin[i] = origin_of(row + i);
  }

  void reduce(int64_t n, int64_t chunk, int64_t first, int64_t channels, TileMoments out) const {
    const Arrays<A, 3> scratch(channels);
    const Buffer<double> origin(channels);
    read_origins(n, first, channels, origin);
    out.clear(channels);
    const int64_t begin = chunk * chunk_, end = chunk_end(chunk);
    for (int64_t p = begin; p < end; p += args.plan.block_positions) {
      const int64_t rows = std::min(args.plan.block_positions, end - p);
      const T* block = x_ + (n * positions_ + p) * g.C + first;
      ColumnBlock<T>(block, rows, channels, g.C, scratch).merge_into(out, static_cast<double>(p - begin), origin);
    }
  }

  // Chunks into channels, channels into sets, sets into the stats tensor.
  template <class F>
  void fold(int64_t n, int64_t first, int64_t channels, F&& partial) const {
    const Arrays<double, 2> arrays(channels);
    const TileMoments total{arrays[0], arrays[1]};
    total.clear(channels);
    double count = 0;
    for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
      const TileMoments other = partial(chunk);
      total.merge(channels, count, chunk_count(chunk),
                  [&](int64_t i) { return Moments<PackD>{load(other.mean + i), load(other.m2 + i)}; });
      count += chunk_count(chunk);
    }
    const Buffer<double> origin(channels);
    read_origins(n, first, channels, origin);
    const int64_t D = g.kind == Kind::kBatch ? 1 : g.D();
    for (int64_t i = 0; i < channels; i += D) {
      Moments<double> set{total.mean[i], total.m2[i]};
      for (int64_t c = 1; c < D; ++c) {
        const double mean = (origin[i + c] - origin[i]) + total.mean[i + c];
        set.merge({mean, total.m2[i + c]}, count * static_cast<double>(c), count);
      }
      set.mean += origin[i];
      stats.finish((n * g.C + first + i) / D, set, count * static_cast<double>(D), args.eps);
    }
  }

  // Positions [begin, end) of a tile.
  void apply(const ChannelArrays<A>& arrays, int64_t n, int64_t first, int64_t channels, int64_t begin,
             int64_t end) const {
    if (!y_) return;  // only the statistics are wanted
    const ChannelCoefs<A> coefs = arrays.at(n, first);
    for (int64_t p = begin; p < end; ++p) {
      const int64_t row = n * positions_ + p, at = row * g.C + first;
      uint8_t* mask = args.mask ? args.mask + row * mask_row_ + first / 8 : nullptr;
      forward_stretch<T>({x_ + at, residual_ ? residual_ + at : nullptr, y_ + at, mask}, channels, coefs, epilogue);
    }
  }
};

}  // namespace fastnorm::FASTNORM_CPU_CAPABILITY
