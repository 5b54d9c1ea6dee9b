// Backward of columns_forward.h.
//
// What: takes the sums of d and d (x - mean) of each channel (reduce) and their weighted means over each set (fold),
//   then computes dx (apply).
// Who: a task takes a sample (batch norm: the batch) or, in a split plan, a chunk of its positions in each of two
// passes. Traffic: reads dy and x twice, the second time from the cache as far as they stayed there; writes dx once.
// When an
//   activation follows a residual add, it also reads a bit per element or the residual.
// Numerics: kBlockPositions positions are added in A, and everything beyond in double, in order.
#pragma once

#include "columns_forward.h"

namespace fastnorm::FASTNORM_CPU_CAPABILITY {

// Adds d and d (x - mean) to the sums of the channels in rows.
template <class T, class E>
struct ColumnGradSums {
  using A = Accum<T>;
  const BackwardSpan<T> s;
  const ChannelCoefs<A>& coefs;
  const E& epilogue;
  A* cached;  // receives d for the second pass; or null
  A *sum, *sum_centered;

  template <int P, class Access>
  FASTNORM_INLINE void packs(int64_t i, Access access, Strided layout) const {
    Pack<A> total = load(sum + i), total_centered = load(sum_centered + i);
    for (int p = 0; p < P; ++p) {
      Pack<A> d[1], centered[1];
      load_grad(s, i, coefs, epilogue, access, Single<Strided>{layout, p}, d, centered);
      if (cached) store(cached + i + layout.kept(p), d[0]);
      total = total + d[0];
      total_centered = fma(d[0], centered[0], total_centered);
      prefetch(s.x + i + layout.later_element(p));
      prefetch(s.dy + i + layout.later_dy(p));
    }
    store(sum + i, total);
    store(sum_centered + i, total_centered);
  }
};

template <class T>
class ColumnsBackward : Call<T, BackwardCall> {
  using Base = Call<T, BackwardCall>;
  using A = Accum<T>;
  using Base::args, Base::whole, Base::g, Base::stats, Base::epilogue, Base::weight;

  const int64_t positions_ = g.positions(), outer_ = g.outer(), lanes_ = lane_pitch<A>(g.C);
  const int64_t chunk_ = args.plan.chunk_positions, chunks_ = div_up(positions_, chunk_);
  const int64_t mask_row_ = mask_row_bytes(g.C, args.dtype);
  const Strided layout_ = position_rows<T>(g, args.plan.rows_together, mask_row_);
  const bool sums_ = Base::takes_sums();
  const bool applies_ = args.dx || args.dresidual;
  const bool caches_d_ = sums_ && applies_ && Base::caches_slopes(outer_ * positions_ * lanes_, kCachedInL3);
  const Buffer<A> cached_{caches_d_ ? outer_ * positions_ * lanes_ : 0};
  const ChannelArrays<T> coefs_{g};
  const Arrays<A, 2> terms_{outer_ * lanes_};  // rstd mean(w d) and rstd mean(w d xhat) of the set of each channel

  // The sums of a part of a sample, in the order of lanes.
  struct Sums {
    double *d, *d_centered;
    Sums part(int64_t i) const { return {d + i, d_centered + i}; }
  };

 public:
  using Base::Base;

  void run() {
    coefs_.fill_all(*this);
    const int64_t sample = chunks_ * lanes_;
    const Arrays<double, 2> arrays(sums_ ? outer_ * sample : 0);
    const Sums sums{arrays[0], arrays[1]};
    if (args.sums) {
      for (int64_t c = 0; c < g.C; ++c) set_terms_at(0, c, Base::given_terms(c));
      clear_lanes_past_end(0);
    }
    if (args.plan.split) {
      const int64_t tasks = outer_ * chunks_;
      if (sums_) {
        for_each_task(args.parallel, tasks,
                      [&](int64_t t) { reduce(t / chunks_, t % chunks_, sums.part(t * lanes_)); });
        // Channels of a group stay together, and samples of groups are several.
        const int64_t width = g.set_channels() > 1 ? g.C : kFoldChannels, parts = div_up(g.C, width);
        for_each_task(Base::parallel_over(outer_ * (sample + kFinishNumbers * g.C)), outer_ * parts, [&](int64_t t) {
          const int64_t n = t / parts, first = t % parts * width;
          fold(n, first, std::min(width, g.C - first), sums.part(n * sample));
        });
      }
      if (applies_) {
        for_each_task(args.parallel, tasks, [&](int64_t t) { apply(t / chunks_, t % chunks_); }, Order::kBackwards);
      }
    } else {
      for_each_task(args.parallel, outer_, [&](int64_t n) {
        if (sums_) {
          for (int64_t k = 0; k < chunks_; ++k) reduce(n, k, sums.part(n * sample + k * lanes_));
          fold(n, 0, g.C, sums.part(n * sample));
        }
        for (int64_t k = chunks_; k-- > 0 && applies_;) apply(n, k);
      });
    }
    if (!sums_) return;
    Base::write_sums_of_channels([&](int64_t set) {
      const int64_t first = set * g.set_channels(), begin = first / g.C * sample, c = first % g.C;
      return [=](int64_t i) {
        const int64_t lane = begin + lane_of<T>(c + i);
        return GradSums<double>{sums.d[lane], sums.d_centered[lane]};
      };
    });
  }

 private:
  int64_t chunk_end(int64_t chunk) const { return std::min((chunk + 1) * chunk_, positions_); }

  BackwardSpan<T> span(int64_t row) const { return whole.moved(row * g.C, row * g.C, row * mask_row_); }

  void reduce(int64_t n, int64_t chunk, Sums out) const {
    const ChannelCoefs<A> coefs = coefs_.at(n);
    const Arrays<A, 2> block(lanes_);
    std::fill_n(out.d, lanes_, 0.0);
    std::fill_n(out.d_centered, lanes_, 0.0);
    const int64_t end = chunk_end(chunk);
    for (int64_t p = chunk * chunk_; p < end; p += kBlockPositions) {
      std::fill_n(block[0], lanes_, A(0));
      std::fill_n(block[1], lanes_, A(0));
      const int64_t row = n * positions_ + p;
      const BackwardSpan<T> s = span(row);
      with_smooth_activation(epilogue, [&](const auto& e) FASTNORM_LAMBDA {
        const auto at_row = [&](int64_t r) {
          A* const cached = caches_d_ ? cached_ + (row + r) * lanes_ : nullptr;
          return ColumnGradSums<T, std::decay_t<decltype(e)>>{
              s.moved(r * g.C, r * g.C, r * mask_row_), coefs, e, cached, block[0], block[1]};
        };
        for_rows<A>(std::min(kBlockPositions, end - p), g.C, layout_, at_row);
      });
      for (int64_t i = 0; i < lanes_; ++i) out.d[i] += block[0][i];
      for (int64_t i = 0; i < lanes_; ++i) out.d_centered[i] += block[1][i];
    }
  }

  // Writes dx and dresidual at the positions of a chunk.
  void apply(int64_t n, int64_t chunk) const {
    const int64_t begin = chunk * chunk_, rows = chunk_end(chunk) - begin, row = n * positions_ + begin;
    const ChannelCoefs<A> coefs = coefs_.at(n);
    const ChannelTerms<A> terms{terms_[0] + n * lanes_, terms_[1] + n * lanes_};
    const BackwardSpan<T> s = span(row);
    if (caches_d_) {
      const Epilogue<A> none{Activation::kNone, Pack<A>(0), false};
      const Strided layout{g.C, 0, lanes_, 0, layout_.together};
      backward_rows(s.with_d(cached_ + row * lanes_), rows, g.C, layout, coefs, terms, none);
    } else if (args.frozen) {
      backward_rows(s, rows, g.C, layout_, coefs, FrozenTerms<A>{}, epilogue);
    } else {
      backward_rows(s, rows, g.C, layout_, coefs, terms, epilogue);
    }
  }

  // Adds the chunks of a sample up, in the first, and turns the sums of its channels into the terms of their sets. The
  // channels begin at a pack.
  void fold(int64_t n, int64_t first, int64_t channels, Sums sums) const {
    const int64_t lanes_end = lane_pitch<A>(first + channels);
    for (int64_t k = 1; k < chunks_; ++k) {
      const Sums chunk = sums.part(k * lanes_);
      for (int64_t i = first; i < lanes_end; ++i) sums.d[i] += chunk.d[i];
      for (int64_t i = first; i < lanes_end; ++i) sums.d_centered[i] += chunk.d_centered[i];
    }
    if (args.frozen) return;
    const int64_t D = g.set_channels();
    for (int64_t c = first; c < first + channels; c += D) {
      const int64_t set = (n * g.C + c) / D;
      const double low = Base::center(set).low;
      double d = 0, d_xhat = 0;
      for (int64_t i = c; i < c + D; ++i) {
        const int64_t lane = lane_of<T>(i);
        const double w = weight[i];
        d += w * sums.d[lane];
        d_xhat += w * Base::xhat_sum(set, {sums.d[lane], sums.d_centered[lane]}, low);
      }
      const SetTerms<A> terms = Base::set_terms(set, d, d_xhat, low);
      for (int64_t i = c; i < c + D; ++i) set_terms_at(n, i, terms);
    }
    if (first + channels == g.C) clear_lanes_past_end(n);
  }

  void set_terms_at(int64_t n, int64_t channel, const SetTerms<A>& terms) const {
    terms_[0][n * lanes_ + lane_of<T>(channel)] = terms.offset;
    terms_[1][n * lanes_ + lane_of<T>(channel)] = terms.slope;
  }
  // Numbers that no store writes.
  void clear_lanes_past_end(int64_t n) const {
    for (int64_t i = g.C; i < lanes_; ++i) set_terms_at(n, i, {0, 0});
  }
};

}  // namespace fastnorm::FASTNORM_CPU_CAPABILITY
