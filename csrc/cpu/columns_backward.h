// Backward of columns_forward.h.
//
// What: takes the sums of d and d (x - mean) of each channel (reduce) and their weighted means over each set (fold),
//   then computes dx (apply).
// Who: a task takes a tile of channels over all positions; in a split plan it takes a chunk of positions in each of two
//   passes.
// Traffic: reads dy and x from memory once while a tile fits the cache, twice otherwise; writes dx once. When an
//   activation follows a residual add, it also reads a bit per element or the residual.
// Numerics: four positions are added as a tree in A, block_positions positions in A, and everything beyond in double,
//   in order.
#pragma once

#include "task.h"

namespace fastnorm::FASTNORM_CPU_CAPABILITY {

struct TileSums {
  double *d, *d_centered;
  TileSums from(int64_t i) const { return {d + i, d_centered + i}; }
};

template <class T>
class ColumnsBackward : Call<T, BackwardCall> {
  using Base = Call<T, BackwardCall>;
  using A = Accum<T>;
  using Base::args, Base::g, Base::stats, Base::epilogue, Base::weight;
  static constexpr int64_t L = kLanes<A>;

  const T* dy_ = static_cast<const T*>(args.dy);
  const T* x_ = static_cast<const T*>(args.x);
  const T* residual_ = static_cast<const T*>(args.residual);
  T* dx_ = static_cast<T*>(args.dx);
  T* dresidual_ = static_cast<T*>(args.dresidual);
  const int64_t D_ = g.set_channels();
  const int64_t positions_ = g.positions(), outer_ = g.outer();
  const int64_t tile_ = args.plan.tile, tiles_ = div_up(g.C, tile_);
  const int64_t chunk_ = args.plan.chunk_positions, chunks_ = div_up(positions_, chunk_);
  const int64_t mask_row_ = mask_row_bytes(g.C, args.dtype);
  const bool sums_ = !args.frozen || args.dweight || args.dbias;
  const bool applies_ = args.dx || args.dresidual;
  // The kept d of all positions: a task keeps its own tile's in a split plan too, for whichever task applies it.
  const int64_t cached_row_ = div_up(g.C, L) * L;
  const bool caches_d_ = sums_ && applies_ && Base::caches_slopes(outer_ * positions_ * cached_row_, kCachedInL3);
  const Buffer<A> cached_{caches_d_ ? outer_ * positions_ * cached_row_ : 0};
  const Arrays<A, 2> terms_{outer_ * g.C};  // rstd mean(w d) and rstd mean(w d xhat) of the set of each channel

 public:
  using Base::Base;

  void run() {
    const ChannelArrays<A> coefs(g);
    coefs.fill_all(*this);
    const Arrays<double, 2> sums(outer_ * g.C);
    const TileSums all{sums[0], sums[1]};
    if (args.plan.split) {
      if (sums_) reduce_split(coefs, all);
      for (int64_t n = 0; n < outer_ && !args.frozen; ++n) fold(n, 0, g.C, all);
      if (applies_) {
        for_each_task(args.parallel, outer_ * chunks_, [&](int64_t t) {
          const int64_t back = outer_ * chunks_ - 1 - t, chunk = back % chunks_;  // reduce left it in the cache
          apply(coefs, back / chunks_, 0, g.C, chunk * chunk_, chunk_end(chunk));
        });
      }
    } else {
      for_each_tile(args.parallel, [&](int64_t n, int64_t first, int64_t channels) {
        if (sums_) {
          const Arrays<double, 2> chunk(channels);
          for (int64_t k = 0; k < chunks_; ++k) {
            reduce(coefs, n, k, first, channels, {chunk[0], chunk[1]});
            merge(k == 0, channels, {chunk[0], chunk[1]}, all.from(n * g.C + first));
          }
        }
        if (!args.frozen) fold(n, first, channels, all);
        if (applies_) apply(coefs, n, first, channels, 0, positions_);
      });
    }
    if (sums_) sum_over_samples(all);
  }

 private:
  template <class F>
  void for_each_tile(const Parallel& parallel, F&& f) const {
    for_each_task(parallel, outer_ * tiles_, [&](int64_t t) { f(t / tiles_, t % tiles_ * tile_, width(t % tiles_)); });
  }
  int64_t width(int64_t tile) const { return std::min(tile_, g.C - tile * tile_); }
  int64_t chunk_end(int64_t chunk) const { return std::min((chunk + 1) * chunk_, positions_); }

  static void merge(bool first, int64_t channels, TileSums from, TileSums into) {
    for (int64_t i = 0; i < channels; ++i) {
      into.d[i] = first ? from.d[i] : into.d[i] + from.d[i];
      into.d_centered[i] = first ? from.d_centered[i] : into.d_centered[i] + from.d_centered[i];
    }
  }

  void reduce_split(const ChannelArrays<A>& coefs, TileSums all) const {
    const Arrays<double, 2> partials(outer_ * chunks_ * g.C);
    const TileSums partial{partials[0], partials[1]};
    for_each_task(args.parallel, outer_ * chunks_, [&](int64_t t) {
      for (int64_t tile = 0; tile < tiles_; ++tile) {
        const int64_t first = tile * tile_;
        reduce(coefs, t / chunks_, t % chunks_, first, width(tile), partial.from(t * g.C + first));
      }
    });
    for_each_tile(Base::parallel_over(outer_ * chunks_ * g.C), [&](int64_t n, int64_t first, int64_t channels) {
      for (int64_t k = 0; k < chunks_; ++k) {
        merge(k == 0, channels, partial.from((n * chunks_ + k) * g.C + first), all.from(n * g.C + first));
      }
    });
  }

  BackwardSpan<T> span(int64_t n, int64_t position, int64_t first) const {
    const int64_t row = n * positions_ + position, at = row * g.C + first;
    return {dy_ + at,
            x_ + at,
            residual_ ? residual_ + at : nullptr,
            args.mask ? args.mask + row * mask_row_ + first / 8 : nullptr,
            dx_ ? dx_ + at : nullptr,
            dresidual_ ? dresidual_ + at : nullptr,
            args.plan.stream};
  }

  A* cached_at(int64_t n, int64_t position, int64_t channel) const {
    return cached_ + (n * positions_ + position) * cached_row_ + channel;
  }

  void reduce(const ChannelArrays<A>& arrays, int64_t n, int64_t chunk, int64_t first, int64_t channels,
              TileSums out) const {
    const ChannelCoefs<A> coefs = arrays.at(n, first);
    std::fill_n(out.d, channels, 0.0);
    std::fill_n(out.d_centered, channels, 0.0);
    const int64_t end = chunk_end(chunk);
    for (int64_t p = chunk * chunk_; p < end; p += args.plan.block_positions) {
      const int64_t rows = std::min(args.plan.block_positions, end - p);
      int64_t i = 0;
      for (; i + L <= channels; i += L) reduce_column(n, p, rows, first, i, channels, coefs, Whole{}, out);
      if (i < channels) reduce_column(n, p, rows, first, i, channels, coefs, Edge{channels - i}, out);
    }
  }

  // Adds the sums of one pack of channels over `rows` positions from p on.
  template <class Access>
  FASTNORM_INLINE void reduce_column(int64_t n, int64_t p, int64_t rows, int64_t first, int64_t i, int64_t channels,
                                     const ChannelCoefs<A>& coefs, Access access, TileSums out) const {
    const SharedCoefs<A> fixed(coefs.at(i));
    const Strided<A> strided{g.C, mask_row_};
    Pack<A> sum(0), sum_centered(0);
    for_fours(rows, [&](int64_t q, auto fours) {
      Pack<A> d[fours.value], centered[fours.value];
      const BackwardSpan<T> s = span(n, p + q, first);
      load_grad(s, i, fixed, epilogue, access, strided, d, centered);
      if (caches_d_) {
        for (int k = 0; k < fours.value; ++k) store(cached_at(n, p + q + k, first + i), d[k]);
      }
      for (int k = 0; k < fours.value; ++k) {  // of the next block
        __builtin_prefetch(s.x + i + (k + rows) * g.C);
        __builtin_prefetch(s.dy + i + (k + rows) * g.C);
      }
      sum = sum + tree_sum(d);
      sum_centered = sum_centered + tree_dot(d, centered);
    });
    alignas(kPackBytes) A lane[2][L];
    store(lane[0], sum);
    store(lane[1], sum_centered);
    for (int64_t k = 0; k < std::min(L, channels - i); ++k) {
      out.d[i + k] += lane[0][k];
      out.d_centered[i + k] += lane[1][k];
    }
  }

  // Writes dx and dresidual at the positions [begin, end) of a tile.
  void apply(const ChannelArrays<A>& arrays, int64_t n, int64_t first, int64_t channels, int64_t begin,
             int64_t end) const {
    const ChannelCoefs<A> coefs = arrays.at(n, first);
    const ChannelTerms<A> terms{terms_[0] + n * g.C + first, terms_[1] + n * g.C + first};
    const Epilogue<A> none{Activation::kNone, Pack<A>(0)};
    for (int64_t p = begin; p < end; ++p) {
      const BackwardSpan<T> s = span(n, p, first);
      if (caches_d_) {
        backward_span(s.with_d(cached_at(n, p, first)), channels, coefs, terms, none);
      } else if (args.frozen) {
        backward_span(s, channels, coefs, FrozenTerms<A>{}, epilogue);
      } else {
        backward_span(s, channels, coefs, terms, epilogue);
      }
    }
  }

  // Turns the sums of the channels into the terms of their sets.
  void fold(int64_t n, int64_t first, int64_t channels, TileSums all) const {
    const int64_t at = n * g.C + first;
    for (int64_t i = 0; i < channels; i += D_) {
      const int64_t set = (at + i) / D_;
      double d = 0, d_xhat = 0;
      for (int64_t c = i; c < i + D_; ++c) {
        const double w = weight[first + c];
        d += w * all.d[at + c];
        d_xhat += w * Base::xhat_sum(set, {all.d[at + c], all.d_centered[at + c]});
      }
      const SetTerms<A> terms = Base::set_terms(set, d, d_xhat);
      std::fill_n(terms_[0] + at + i, D_, terms.offset);
      std::fill_n(terms_[1] + at + i, D_, terms.slope);
    }
  }

  void sum_over_samples(TileSums all) const {
    for (int64_t c = 0; c < g.C; ++c) {
      double d = 0, d_xhat = 0;
      for (int64_t i = c; i < outer_ * g.C; i += g.C) {
        d += all.d[i];
        d_xhat += Base::xhat_sum(i / D_, {all.d[i], all.d_centered[i]});
      }
      if (args.dbias) args.dbias[c] = d;
      if (args.dweight) args.dweight[c] = d_xhat;
    }
  }
};

}  // namespace fastnorm::FASTNORM_CPU_CAPABILITY
