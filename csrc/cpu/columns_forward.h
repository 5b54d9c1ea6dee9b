// Forward where neighbouring channels lie next to each other: channels_last, and batch norm of (N, C).
//
// What: does what rows_forward.h does.
// Who: a task takes a tile of channels (whole groups) over all positions of a sample or, for batch norm, of the batch.
//   When such a tile does not fit the cache, or when there are few tiles, the plan is split: a task takes a chunk of
//   positions in each of two passes, and the second pass takes the chunks in the opposite order.
// Traffic: reads x from memory once while a tile fits the cache, twice otherwise; reads the residual and writes y once.
// Numerics: each channel has an accumulator. Blocks of plan.block_positions are reduced as in rows_forward.h and merged
//   in double, in order; then each group merges its channels, in order.
// Why not one pass with Welford's recurrence: it takes a division per element, and its error grows with the number of
//   steps.
#pragma once

#include "task.h"

namespace fastnorm::FASTNORM_CPU_CAPABILITY {

// The moments of a tile's channels as arrays. Means are relative to the origin of each channel.
struct TileMoments {
  double *mean, *m2;

  void clear(int64_t channels) const {
    std::fill_n(mean, channels, 0.0);
    std::fill_n(m2, channels, 0.0);
  }

  // Merges other_count values per channel into the `count` values that are there, for the channels from i on: eight of
  // them, or fewer at the end of the tile.
  FASTNORM_INLINE void merge(int64_t i, int64_t channels, const Moments<PackD>& other, double count,
                             double other_count) const {
    const int64_t rest = channels - i;
    const bool whole = rest >= PackD::kLanes;
    Moments<PackD> total{whole ? load(mean + i) : load_first(mean + i, rest),
                         whole ? load(m2 + i) : load_first(m2 + i, rest)};
    total.merge(other, count, other_count);
    if (whole) {
      store(mean + i, total.mean);
      store(m2 + i, total.m2);
    } else {
      store_first(mean + i, total.mean, rest);
      store_first(m2 + i, total.m2, rest);
    }
  }
};

// The moments of one pack of channels over `positions` rows that lie `stride` apart, taken about a pivot as in
// rows_forward.h.
template <class T>
struct ColumnMoments {
  using A = Accum<T>;
  Pack<A> pivot, delta, square;

  template <class Access>
  FASTNORM_INLINE ColumnMoments(const T* x, int64_t positions, int64_t stride, Access access)
      : pivot(0), delta(0), square(0) {
    for_fours(positions, [&](int64_t p, auto fours) {
      Pack<A> v[fours.value];
      for (int k = 0; k < fours.value; ++k) v[k] = access.get(x + (p + k) * stride, k);
      pivot = pivot + tree_sum(v);
    });
    pivot = round_to<T>(pivot * Pack<A>(1.0 / static_cast<double>(positions)));
    for_fours(positions, [&](int64_t p, auto fours) {
      Pack<A> d[fours.value];
      for (int k = 0; k < fours.value; ++k) {
        d[k] = access.get(x + (p + k) * stride, k) - pivot;
        __builtin_prefetch(x + (p + k + positions) * stride);  // of the next block, while this one is in L1
      }
      delta = delta + tree_sum(d);
      square = square + tree_dot(d, d);
    });
  }

  // Merges these moments into those of the tile's channels from i on.
  FASTNORM_INLINE void merge_into(const TileMoments& total, int64_t i, int64_t channels, const double* origin,
                                  double count, double positions) const {
    const auto half = [&](int64_t at, PackD about, PackD sum, PackD squares) {
      const PackD shift = sum * PackD(1 / positions), m2 = squares - sum * shift;
      // When the mean is infinite, shift is NaN: the infinite mean must stay.
      const PackD mean = select(about * PackD(0) >= PackD(0), (about - load(origin + at)) + shift, about);
      total.merge(at, channels, {mean, select(m2 <= PackD(0), PackD(0), m2)}, count, positions);
    };
    half(i, widen_lower(pivot), widen_lower(delta), widen_lower(square));
    if constexpr (sizeof(A) == 4) {
      if (i + 8 < channels) half(i + 8, widen_upper(pivot), widen_upper(delta), widen_upper(square));
    }
  }
};

template <class T>
class ColumnsForward : Call<T, ForwardCall> {
  using Base = Call<T, ForwardCall>;
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
      for_each_tile(Base::parallel_over(outer_ * chunks_ * g.C), [&](int64_t n, int64_t first, int64_t channels) {
        fold(n, first, channels, [&](int64_t chunk) {
          const int64_t at = (n * chunks_ + chunk) * g.C + first;
          return TileMoments{partials[0] + at, partials[1] + at};
        });
        coefs.fill(*this, n, first, channels);
      });
      for_each_task(args.parallel, outer_ * chunks_, [&](int64_t t) {
        const int64_t back = outer_ * chunks_ - 1 - t, chunk = back % chunks_;  // reduce left it in the cache
        apply(coefs, back / chunks_, 0, g.C, chunk * chunk_, chunk_end(chunk));
      });
      return;
    }
    for_each_tile(args.parallel, [&](int64_t n, int64_t first, int64_t channels) {
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
  void for_each_tile(const Parallel& parallel, F&& f) const {
    for_each_task(parallel, outer_ * tiles_, [&](int64_t t) { f(t / tiles_, t % tiles_ * tile_, width(t % tiles_)); });
  }
  int64_t width(int64_t tile) const { return std::min(tile_, g.C - tile * tile_); }
  int64_t chunk_end(int64_t chunk) const { return std::min((chunk + 1) * chunk_, positions_); }
  double chunk_count(int64_t chunk) const { return static_cast<double>(chunk_end(chunk) - chunk * chunk_); }

  void read_origins(int64_t n, int64_t first, int64_t channels, double* origin) const {
    const T* row = x_ + n * positions_ * g.C + first;
    for (int64_t i = 0; i < channels; ++i) origin[i] = origin_of(row + i);
  }

  void reduce(int64_t n, int64_t chunk, int64_t first, int64_t channels, TileMoments out) const {
    constexpr int64_t L = kLanes<A>;
    const Buffer<double> origin(channels);
    read_origins(n, first, channels, origin);
    out.clear(channels);
    const int64_t begin = chunk * chunk_, end = chunk_end(chunk);
    for (int64_t p = begin; p < end; p += args.plan.block_positions) {
      const int64_t rows = std::min(args.plan.block_positions, end - p);
      const T* block = x_ + (n * positions_ + p) * g.C + first;
      const auto column = [&](int64_t i, auto access) {
        ColumnMoments<T>(block + i, rows, g.C, access)
            .merge_into(out, i, channels, origin, static_cast<double>(p - begin), static_cast<double>(rows));
      };
      int64_t i = 0;
      for (; i + L <= channels; i += L) column(i, Whole{});
      if (i < channels) column(i, Edge{channels - i});
    }
  }

  // Merges chunks into channels and channels into sets, and writes the statistics of the sets.
  template <class F>
  void fold(int64_t n, int64_t first, int64_t channels, F&& partial) const {
    const Arrays<double, 2> arrays(channels);
    const TileMoments total{arrays[0], arrays[1]};
    total.clear(channels);
    double count = 0;
    for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
      const TileMoments other = partial(chunk);
      for (int64_t i = 0; i < channels; i += PackD::kLanes) {
        total.merge(i, channels, {load(other.mean + i), load(other.m2 + i)}, count, chunk_count(chunk));
      }
      count += chunk_count(chunk);
    }
    const Buffer<double> origin(channels);
    read_origins(n, first, channels, origin);
    const int64_t D = g.set_channels();
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

  // Writes y at the positions [begin, end) of a tile.
  void apply(const ChannelArrays<A>& arrays, int64_t n, int64_t first, int64_t channels, int64_t begin,
             int64_t end) const {
    if (!y_) return;  // the caller wants only the statistics
    const ChannelCoefs<A> coefs = arrays.at(n, first);
    for (int64_t p = begin; p < end; ++p) {
      const int64_t row = n * positions_ + p, at = row * g.C + first;
      uint8_t* mask = args.mask ? args.mask + row * mask_row_ + first / 8 : nullptr;
      forward_span<T>({x_ + at, residual_ ? residual_ + at : nullptr, y_ + at, mask, args.plan.stream}, channels, coefs,
                      epilogue);
    }
  }
};

}  // namespace fastnorm::FASTNORM_CPU_CAPABILITY
