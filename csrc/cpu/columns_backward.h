// Backward of columns_forward.h.
//
// What     sums of d and d xhat per channel (reduce), their weighted means per set (fold), then dx (apply).
// Who      a task -> a tile of channels over all positions, or (plan.split) a chunk of positions in each of two passes.
// Traffic  dy and x once from memory while a tile fits the cache (twice otherwise), dx once; a bit per element or the
//          residual when an activation follows a residual add.
// Numerics four positions added as a tree in A, block_positions positions in A, everything beyond in double, in order.
#pragma once

#include "task.h"

namespace fastnorm::FASTNORM_CPU_CAPABILITY {

struct TileSums {
  double *d, *d_xhat;
};

template <class T>
class ColumnsBackward : Call<T, BackwardArgs> {
  using Base = Call<T, BackwardArgs>;
  using A = Accum<T>;
  using Base::args, Base::g, Base::stats, Base::epilogue, Base::weight;
  static constexpr int64_t L = kLanes<A>;

  const T* dy_ = static_cast<const T*>(args.dy);
  const T* x_ = static_cast<const T*>(args.x);
  const T* residual_ = static_cast<const T*>(args.residual);
  T* dx_ = static_cast<T*>(args.dx);
  T* dresidual_ = static_cast<T*>(args.dresidual);
  const bool batch_ = g.kind == Kind::kBatch;
  const int64_t D_ = batch_ ? 1 : g.D();
  const int64_t positions_ = g.positions(), outer_ = g.outer();
  const int64_t tile_ = args.plan.tile, tiles_ = div_up(g.C, tile_);
  const int64_t chunk_ = args.plan.chunk_positions, chunks_ = div_up(positions_, chunk_);
  const int64_t mask_row_ = mask_row_bytes(g.C, args.dtype);
  const bool sums_ = !args.frozen || args.dweight || args.dbias;
  const bool applies_ = args.dx || args.dresidual;

  // Adds P neighbouring positions of one pack of channels.
  template <int P, class Access>
  FASTNORM_INLINE void add(const BackwardStretch<T>& s, int64_t i, const ChannelCoefs<A>& coefs, Access access,
                           A* sum_d, A* sum_d_xhat) const {
    Pack<A> d[P], xhat[P];
    load_grad(s, i, coefs, epilogue, access, Down<A>{g.C, mask_row_}, d, xhat);
    store(sum_d + i, load(sum_d + i) + tree_sum(d));
    store(sum_d_xhat + i, load(sum_d_xhat + i) + tree_dot(d, xhat));
  }

 public:
  using Base::Base;

  void run() {
    Buffer<double> d(outer_ * g.C), d_xhat(outer_ * g.C);
    if (args.plan.split) {
      if (sums_) reduce_split(d, d_xhat);
      if (applies_) {
        for_each_task(args.parallel, outer_ * chunks_, [&](int64_t t) {
          const int64_t back = outer_ * chunks_ - 1 - t, n = back / chunks_;  // what reduce read last is in cache
          apply(n, 0, g.C, back % chunks_ * chunk_, chunk_end(back % chunks_), {d + n * g.C, d_xhat + n * g.C});
        });
      }
    } else {
      for_each_task(args.parallel, outer_ * tiles_, [&](int64_t t) {
        const int64_t n = t / tiles_, first = t % tiles_ * tile_, channels = width(t % tiles_);
        const TileSums sums{d + n * g.C + first, d_xhat + n * g.C + first};
        if (sums_) {
          Buffer<double> chunk_d(channels), chunk_d_xhat(channels);
          for (int64_t k = 0; k < chunks_; ++k) {
            reduce(n, k, first, channels, {chunk_d, chunk_d_xhat});
            merge(k == 0, channels, {chunk_d, chunk_d_xhat}, sums);
          }
        }
        if (applies_) apply(n, first, channels, 0, positions_, sums);
      });
    }
    if (sums_) sum_over_samples(d, d_xhat);
  }

 private:
  int64_t width(int64_t tile) const { return std::min(tile_, g.C - tile * tile_); }
  int64_t chunk_end(int64_t chunk) const { return std::min((chunk + 1) * chunk_, positions_); }

  static void merge(bool first, int64_t channels, TileSums from, TileSums into) {
    for (int64_t i = 0; i < channels; ++i) {
      into.d[i] = first ? from.d[i] : into.d[i] + from.d[i];
      into.d_xhat[i] = first ? from.d_xhat[i] : into.d_xhat[i] + from.d_xhat[i];
    }
  }

  void reduce_split(double* d, double* d_xhat) const {
    Buffer<double> partial_d(outer_ * chunks_ * g.C), partial_d_xhat(outer_ * chunks_ * g.C);
    for_each_task(args.parallel, outer_ * chunks_, [&](int64_t t) {
      for (int64_t tile = 0; tile < tiles_; ++tile) {
        const int64_t first = tile * tile_, at = t * g.C + first;
        reduce(t / chunks_, t % chunks_, first, width(tile), {partial_d + at, partial_d_xhat + at});
      }
    });
    for (int64_t t = 0; t < outer_ * chunks_; ++t) {
      const int64_t into = t / chunks_ * g.C;
      merge(t % chunks_ == 0, g.C, {partial_d + t * g.C, partial_d_xhat + t * g.C}, {d + into, d_xhat + into});
    }
  }

  BackwardStretch<T> stretch(int64_t n, int64_t position, int64_t first) const {
    const int64_t row = n * positions_ + position, at = row * g.C + first;
    return {dy_ + at,
            x_ + at,
            residual_ ? residual_ + at : nullptr,
            args.mask ? args.mask + row * mask_row_ + first / 8 : nullptr,
            dx_ ? dx_ + at : nullptr,
            dresidual_ ? dresidual_ + at : nullptr};
  }

  void reduce(int64_t n, int64_t chunk, int64_t first, int64_t channels, TileSums out) const {
    const ChannelArrays<A> arrays(channels);
    const ChannelCoefs<A> coefs = arrays.fill(*this, n, first, channels);
    const int64_t pitch = div_up(channels, L) * L;
    Buffer<A> scratch(2 * pitch);
    A *sum_d = scratch, *sum_d_xhat = scratch + pitch;
    std::fill_n(out.d, channels, 0.0);
    std::fill_n(out.d_xhat, channels, 0.0);
    const int64_t end = chunk_end(chunk);
    for (int64_t p = chunk * chunk_; p < end; p += args.plan.block_positions) {
      const int64_t block_end = std::min(p + args.plan.block_positions, end);
      std::fill_n(sum_d, 2 * pitch, A(0));
      int64_t q = p;
      for (; q + 4 <= block_end; q += 4) add_row<4>(stretch(n, q, first), channels, coefs, sum_d, sum_d_xhat);
      for (; q < block_end; ++q) add_row<1>(stretch(n, q, first), channels, coefs, sum_d, sum_d_xhat);
      for (int64_t i = 0; i < channels; ++i) {
        out.d[i] += sum_d[i];
        out.d_xhat[i] += sum_d_xhat[i];
      }
    }
  }

  template <int P>
  FASTNORM_INLINE void add_row(const BackwardStretch<T>& s, int64_t channels, const ChannelCoefs<A>& coefs, A* sum_d,
                               A* sum_d_xhat) const {
    int64_t i = 0;
    for (; i + L <= channels; i += L) add<P>(s, i, coefs, Whole{}, sum_d, sum_d_xhat);
    if (i < channels) add<P>(s, i, coefs, Edge{channels - i}, sum_d, sum_d_xhat);
  }

  // Positions [begin, end) of a tile, backwards; `sums` are those of its channels over all positions.
  void apply(int64_t n, int64_t first, int64_t channels, int64_t begin, int64_t end, TileSums sums) const {
    const ChannelArrays<A> arrays(channels);
    const ChannelCoefs<A> coefs = arrays.fill(*this, n, first, channels);
    Buffer<A> offset(channels), slope(channels);
    if (!args.frozen) fold(n, first, channels, sums, offset, slope);
    for (int64_t p = end - 1; p >= begin; --p) {
      const BackwardStretch<T> s = stretch(n, p, first);
      if (args.frozen) {
        backward_stretch(s, channels, coefs, FrozenTerms<A>{}, epilogue);
      } else {
        backward_stretch(s, channels, coefs, ChannelTerms<A>{offset, slope}, epilogue);
      }
    }
  }

  void fold(int64_t n, int64_t first, int64_t channels, TileSums sums, A* offset, A* slope) const {
    for (int64_t s = 0; s < channels; s += D_) {
      double d = 0, d_xhat = 0;
      for (int64_t i = s; i < s + D_; ++i) {
        const double w = weight[first + i];
        d += w * sums.d[i];
        d_xhat += w * sums.d_xhat[i];
      }
      const int64_t set = batch_ ? first + s : n * g.G + (first + s) / D_;
      const double scale = stats.rstd[set] / static_cast<double>(g.set_size());
      std::fill_n(offset + s, D_, static_cast<A>(d * scale));
      std::fill_n(slope + s, D_, static_cast<A>(d_xhat * scale));
    }
  }

  void sum_over_samples(const double* d, const double* d_xhat) const {
    for (int64_t c = 0; c < g.C; ++c) {
      GradSums<double> total{d[c], d_xhat[c]};
      for (int64_t n = 1; n < outer_; ++n) total.merge({d[n * g.C + c], d_xhat[n * g.C + c]});
      if (args.dbias) args.dbias[c] = total.d;
      if (args.dweight) args.dweight[c] = total.d_xhat;
    }
  }
};

}  // namespace fastnorm::FASTNORM_CPU_CAPABILITY
