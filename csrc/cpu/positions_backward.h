// Backward of positions_forward.h.
//
// What: takes the means of w d and w d xhat over each position, then computes dx as rows_backward.h does. dweight and
//   dbias are sums over the positions: those of a row.
// Who: a task takes a chunk of tiles, one after the other, and has its own partial dweight and dbias; these are folded
//   in order at the end.
// Traffic: reads dy and x from memory once while a tile fits L2, twice otherwise; writes dx once.
// Numerics: the sums of a position are taken in A over kBlockPositions channels, those of a channel over a tile's row
//   (at most 1024 positions), beyond in double. Tiles and chunks follow from the sizes alone.
#pragma once

#include "positions_forward.h"

namespace fastnorm::FASTNORM_CPU_CAPABILITY {

template <class T>
class PositionsBackward : Call<T, BackwardCall> {
  using Base = Call<T, BackwardCall>;
  using A = Accum<T>;
  using Base::args, Base::whole, Base::g, Base::stats, Base::epilogue, Base::weight, Base::bias;
  static constexpr int64_t kMaxChunks = 64;

  const PositionTiles tiles_{g, args.plan};
  const int64_t lanes_ = lane_pitch<A>(tiles_.width()), mask_row_ = mask_row_bytes(g.S, args.dtype);
  const int64_t chunks_ = std::min(tiles_.count(), kMaxChunks);
  const bool params_ = args.dweight || args.dbias, applies_ = args.dx || args.dresidual;
  const bool caches_d_ = applies_ && Base::caches_slopes(g.C * lanes_);

  // What a task works in, of a tile, in the order of lanes.
  struct Scratch {
    const Buffer<A> cached;         // d of every row; empty unless it is cached
    const Arrays<A, 3> statistics;  // mean, rstd, mean_low
    const Arrays<A, 2> block, terms;
    const Arrays<double, 2> sums;  // of w d and w d (x - mean)
    Scratch(int64_t cached, int64_t lanes)
        : cached(cached), statistics(lanes), block(lanes), terms(lanes), sums(lanes) {}
  };

  // Adds w d and w d (x - mean) of some rows to the sums of the positions, and d and d xhat to those of the rows.
  template <int kRows, class E>
  struct SumPacks {
    const BackwardSpan<T> s;
    const PositionCoefs<A>& coefs;
    const E& epilogue;
    const bool params;
    A* cached;  // receives d for the second pass; or null
    A *sum, *sum_centered;
    HalfSum<A> (&row_d)[kRows], (&row_d_xhat)[kRows];

    template <int P, class Access>
    FASTNORM_INLINE void packs(int64_t i, Access access, Strided layout) const {
      Pack<A> total = load(sum + i), total_centered = load(sum_centered + i);
      for (int p = 0; p < P; ++p) {
        Pack<A> d[1], centered[1];
        load_grad(s, i, coefs, epilogue, access, Single<Strided>{layout, p}, d, centered);
        if (cached) store(cached + i + layout.kept(p), d[0]);
        prefetch(s.x + i + layout.later_element(p));
        prefetch(s.dy + i + layout.later_dy(p));
        const Pack<A> wd = d[0] * Pack<A>(coefs.weight[p]);
        total = total + wd;
        total_centered = fma(wd, centered[0], total_centered);
        if (!params) continue;
        // Past the end d can be NaN, which would spoil the sums of the row.
        const Pack<A> own = access.template zero_past_end<T>(d[0]);
        row_d[p].add(own);
        row_d_xhat[p].add_product(own, access.template zero_past_end<T>(centered[0] * load(coefs.rstd + i)));
      }
      store(sum + i, total);
      store(sum_centered + i, total_centered);
    }
  };

 public:
  using Base::Base;

  void run() {
    const Buffer<double> partials(params_ ? chunks_ * 2 * g.C : 0);
    for_each_task(args.parallel, chunks_, [&](int64_t k) {
      const Scratch scratch(caches_d_ ? g.C * lanes_ : 0, lanes_);
      double* const partial = partials + (params_ ? k * 2 * g.C : 0);
      if (params_) std::fill_n(partial, 2 * g.C, 0.0);
      for (int64_t t = tiles_.count() * k / chunks_; t < tiles_.count() * (k + 1) / chunks_; ++t) {
        run_tile(tiles_[t], scratch, partial);
      }
    });
    for (int64_t c = 0; c < g.C && params_; ++c) {
      for (int64_t k = 1; k < chunks_; ++k) {
        partials[c] += partials[k * 2 * g.C + c];
        partials[g.C + c] += partials[(k * 2 + 1) * g.C + c];
      }
      if (args.dbias) args.dbias[c] = partials[c];
      if (args.dweight) args.dweight[c] = partials[g.C + c];
    }
  }

 private:
  void run_tile(const PositionTiles::Tile& tile, const Scratch& scratch, double* partial) const {
    const int64_t row = tile.sample * g.C, at = row * g.S + tile.first, lanes = lane_pitch<A>(tile.positions);
    const BackwardSpan<T> s = whole.moved(at, at, row * mask_row_ + tile.first / 8);
    read_statistics(tile.sample * g.S + tile.first, tile.positions, scratch);
    reduce(s, tile.positions, scratch, partial);
    if (!applies_) return;
    const A *rstd = scratch.statistics[1], *low = scratch.statistics[2];
    const double share = 1 / static_cast<double>(g.C);
    for (int64_t i = 0; i < lanes; ++i) {
      const GradSums<double> total{scratch.sums[0][i], scratch.sums[1][i]};
      const SetTerms<A> terms = fastnorm::set_terms<A, double>(total, rstd[i], low[i], rstd[i] * share);
      scratch.terms[0][i] = terms.offset, scratch.terms[1][i] = terms.slope;
    }
    if (caches_d_) {
      apply(s.with_d(scratch.cached), lanes_, tile.positions, scratch,
            Epilogue<A>{Activation::kNone, Pack<A>(0), false});
    } else {
      apply(s, g.S, tile.positions, scratch, epilogue);
    }
  }

  // Brings the statistics of the sets from `set` on into the order of lanes. Past the last they are zeros.
  void read_statistics(int64_t set, int64_t positions, const Scratch& scratch) const {
    constexpr int64_t L = kLanes<A>;
    const A* const rows[]{stats.mean, stats.rstd, stats.mean_low};
    for (int k = 0; k < 3; ++k) {
      for (int64_t i = 0; i < positions; i += L) {
        alignas(kPackBytes) A line[L] = {};
        std::copy_n(rows[k] + set + i, std::min(L, positions - i), line);
        to_lanes<T>(line, scratch.statistics[k] + i);
      }
    }
  }

  PositionCoefs<A> coefs(const Scratch& scratch, int64_t c) const {
    return {scratch.statistics[0], scratch.statistics[1], weight + c, bias + c};
  }

  void reduce(const BackwardSpan<T>& s, int64_t positions, const Scratch& scratch, double* partial) const {
    const int64_t lanes = lane_pitch<A>(positions);
    const Arrays<A, 2>& block = scratch.block;
    std::fill_n(scratch.sums[0], lanes, 0.0);
    std::fill_n(scratch.sums[1], lanes, 0.0);
    for (int64_t first = 0; first < g.C; first += kBlockPositions) {
      std::fill_n(block[0], lanes, A(0));
      std::fill_n(block[1], lanes, A(0));
      with_smooth_activation(epilogue, [&](const auto& e) FASTNORM_LAMBDA {
        for_row_groups(std::min(kBlockPositions, g.C - first), true, [&](auto rows, int64_t r) FASTNORM_LAMBDA {
          constexpr int kRows = decltype(rows)::value;
          const int64_t c = first + r;
          const PositionCoefs<A> own = coefs(scratch, c);
          HalfSum<A> row_d[kRows], row_d_xhat[kRows];
          const SumPacks<kRows, std::decay_t<decltype(e)>> packs{s.moved(c * g.S, c * g.S, c * mask_row_),
                                                                 own,
                                                                 e,
                                                                 params_,
                                                                 caches_d_ ? scratch.cached + c * lanes_ : nullptr,
                                                                 block[0],
                                                                 block[1],
                                                                 row_d,
                                                                 row_d_xhat};
          const Strided layout = Strided{g.S, mask_row_, g.S, lanes_}.fetching(
              rows_to_fetch(kRows, positions * static_cast<int64_t>(sizeof(T))));
          across_rows<kRows, A>(positions, packs, layout, false);
          for (int p = 0; p < kRows && params_; ++p) {
            partial[c + p] += sum_lanes(row_d[p]);
            partial[g.C + c + p] += sum_lanes(row_d_xhat[p]);
          }
        });
      });
      for (int64_t i = 0; i < lanes; ++i) scratch.sums[0][i] += block[0][i];
      for (int64_t i = 0; i < lanes; ++i) scratch.sums[1][i] += block[1][i];
    }
  }

  // Writes dx and dresidual of a tile. Rows of dy lie d_row apart.
  template <class D>
  void apply(const BackwardSpan<T, D>& s, int64_t d_row, int64_t positions, const Scratch& scratch,
             const Epilogue<A>& after) const {
    const ChannelTerms<A> terms{scratch.terms[0], scratch.terms[1]};
    const bool stream = s.streams();
    with_activation(after, [&](const auto& e) FASTNORM_LAMBDA {
      using Packs = BackwardPacks<T, D, PositionCoefs<A>, ChannelTerms<A>, std::decay_t<decltype(e)>>;
      for_row_groups(g.C, true, [&](auto rows, int64_t c) FASTNORM_LAMBDA {
        const PositionCoefs<A> own = coefs(scratch, c);
        across_rows<decltype(rows)::value, A>(positions,
                                              Packs{s.moved(c * g.S, c * d_row, c * mask_row_), own, terms, e},
                                              Strided{g.S, mask_row_, d_row, 0}, stream);
      });
    });
  }
};

}  // namespace fastnorm::FASTNORM_CPU_CAPABILITY
