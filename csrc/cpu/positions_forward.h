// Forward of layer norm over the channels of planar maps (LayerNorm2d): every position is a set, its elements lie a row
// apart, and those of neighbouring positions side by side.
//
// What: does what layer_forward.h does, by the loops of columns_forward.h: the positions are the columns. The weight
//   changes from row to row.
// Who: a task takes a tile of positions of a sample, all channels of it.
// Traffic: reads x from memory once while a tile fits L2, twice otherwise; reads the residual and writes y once.
// Numerics: every position has its pivot and its sums (moments.h), in A over kBlockPositions channels, beyond in
//   double, in order. They are the same whatever the tile.
#pragma once

#include "columns_forward.h"

namespace fastnorm::FASTNORM_CPU_CAPABILITY {

// The tiles of all samples, in order.
class PositionTiles {
 public:
  struct Tile {
    int64_t sample, first, positions;
  };
  PositionTiles(const Geometry& g, const CpuPlan& plan)
      : S_(g.S), width_(std::min(plan.chunk_positions, g.S)), of_sample_(div_up(g.S, width_)), samples_(g.N) {}
  int64_t count() const { return samples_ * of_sample_; }
  int64_t width() const { return width_; }
  Tile operator[](int64_t t) const {
    const int64_t first = t % of_sample_ * width_;
    return {t / of_sample_, first, std::min(width_, S_ - first)};
  }

 private:
  int64_t S_, width_, of_sample_, samples_;
};

template <class T>
class PositionsForward : Call<T, ForwardCall> {
  using Base = Call<T, ForwardCall>;
  using A = Accum<T>;
  using Base::args, Base::whole, Base::g, Base::stats, Base::epilogue, Base::weight, Base::bias;

  const PositionTiles tiles_{g, args.plan};
  const int64_t lanes_ = lane_pitch<A>(tiles_.width()), mask_row_ = mask_row_bytes(g.S, args.dtype);

 public:
  using Base::Base;

  void run() {
    for_each_task(args.parallel, tiles_.count(), [&](int64_t t) { run_tile(tiles_[t]); });
  }

 private:
  void run_tile(const PositionTiles::Tile& tile) const {
    const int64_t row = tile.sample * g.C, at = row * g.S + tile.first;
    const Buffer<A> statistics(kStatsRows * lanes_);
    const Stats<A> own(statistics, lanes_);  // of the tile, in the order of lanes
    take_statistics(whole.x + at, tile.positions, own);
    write_statistics(own, tile.sample * g.S + tile.first, tile.positions);
    if (!whole.y) return;  // the caller wants only the statistics
    const ForwardSpan<T> s = whole.moved(at, row * mask_row_ + tile.first / 8);
    with_smooth_activation(epilogue, [&](const auto& e) FASTNORM_LAMBDA {
      using Packs = ForwardPacks<T, PositionCoefs<A>, std::decay_t<decltype(e)>>;
      const bool stream = s.streams();
      for_row_groups(g.C, true, [&](auto rows, int64_t c) FASTNORM_LAMBDA {
        const PositionCoefs<A> coefs{own.mean, own.rstd, weight + c, bias + c};
        across_rows<decltype(rows)::value, A>(tile.positions, Packs{s.moved(c * g.S, c * mask_row_), coefs, e},
                                              Strided{g.S, mask_row_, 0, 0}, stream);
      });
    });
  }

  void take_statistics(const T* x, int64_t positions, const Stats<A>& own) const {
    const int64_t lanes = lane_pitch<A>(positions);
    const Buffer<A> pivots(lanes);
    const Arrays<double, 2> sums(lanes);
    const double count = static_cast<double>(g.C), share = 1 / count;
    const Strided layout =
        Strided{g.S, 0, 0, 0}.fetching(rows_to_fetch(kRowGroup, positions * static_cast<int64_t>(sizeof(T))));
    choose_column_pivots(x, g.C, positions, g.S, pivots);
    for (bool again : {false, true}) {
      reduce_columns(x, g.C, positions, layout, pivots, sums[0], sums[1]);
      int far_off = 0;
      for (int64_t i = 0; i < lanes; ++i) {
        const PivotSums total{sums[0][i], sums[1][i]};
        const Moments<double> moments = total.moments(pivots[i], share);
        own.finish(i, moments, share, args.eps);
        far_off |= total.far_off(moments, share, count);
      }
      if (!far_off || again) break;
      for (int64_t i = 0; i < lanes; ++i) {
        const PivotSums total{sums[0][i], sums[1][i]};
        const Moments<double> moments = total.moments(pivots[i], share);
        if (total.far_off(moments, share, count)) pivots[i] = round_pivot<T>(moments.mean);
      }
    }
  }

  // Writes the statistics of the sets from `set` on.
  void write_statistics(const Stats<A>& own, int64_t set, int64_t positions) const {
    constexpr int64_t L = kLanes<A>;
    for (const auto& [lanes, out] : {std::pair(own.mean, stats.mean), std::pair(own.rstd, stats.rstd),
                                     std::pair(own.var, stats.var), std::pair(own.mean_low, stats.mean_low)}) {
      for (int64_t i = 0; i < positions; i += L) {
        alignas(kPackBytes) A line[L];
        from_lanes<T>(lanes + i, line);
        std::copy_n(line, std::min(L, positions - i), out + set + i);
      }
    }
  }
};

}  // namespace fastnorm::FASTNORM_CPU_CAPABILITY
