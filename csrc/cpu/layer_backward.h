// Backward where every element of a set has its own weight: layer norm, and group norm of (N, C).
//
// What: takes the means of w d and w d xhat over each set, then computes dx as rows_backward.h does. dweight and dbias
//   are sums over the sets.
// Who: a task takes a chunk of samples, kRowGroup sets at a time where the plan says so and they are short, and has its
//   own row of partial dweight and dbias; the rows are folded in order at the end.
// Traffic: reads dy and x from memory once while a set fits the cache, twice otherwise; writes dx once; writes and
//   reads the partials.
// Numerics: the sums of a set are taken in A over kBlock elements, in double beyond. dweight and dbias are summed in A
//   over kFlushSamples samples, then in double. The number of chunks depends on the sizes alone.
#pragma once

#include "task.h"

namespace fastnorm::FASTNORM_CPU_CAPABILITY {

template <class T>
class LayerBackward : Call<T, BackwardCall> {
  using Base = Call<T, BackwardCall>;
  using A = Accum<T>;
  using Base::args, Base::whole, Base::g, Base::stats, Base::epilogue;
  static constexpr int64_t kFlushSamples = 32;
  // Each row of partials costs memory traffic, so at least kMinSamples samples share one; 64 rows feed any machine.
  static constexpr int64_t kMinSamples = 64, kMaxChunks = 64;
  // Fewer sets than this do not keep the cores busy, so that a task takes a range of elements.
  static constexpr int64_t kFewSets = 8, kRange = kBlock * kChunkBlocks;

  const ElementParams<T> weights_{g, Base::weight}, biases_{g, Base::bias};
  const int64_t mask_row_ = mask_row_bytes(g.D(), args.dtype);
  const int64_t lanes_ = g.G * lane_pitch<A>(g.D());  // of dweight or dbias
  const bool params_ = args.dweight || args.dbias, applies_ = args.dx || args.dresidual;
  const int64_t chunks_ = std::clamp<int64_t>(g.N / (params_ ? kMinSamples : 1), std::min<int64_t>(g.N, 2), kMaxChunks);

  // Sets that go through a pass together, and the d that it keeps of them.
  const bool together_ =
      args.plan.rows_together && g.G == 1 && 2 * kRowGroup * g.D() * static_cast<int64_t>(sizeof(T)) <= kRowsInL1;
  const int64_t set_lanes_ = lane_pitch<A>(g.D());
  const bool caches_d_ = applies_ && Base::caches_slopes((together_ ? kRowGroup : 1) * set_lanes_);

  // Adds w d and w d (x - mean) of each set to its sums, and the sets' part of dweight and dbias to those.
  template <int kRows, class E>
  struct SumPacks {
    const BackwardSpan<T> s;
    const ElementCoefs<A, kRows>& coefs;
    const E& epilogue;
    A *dweight, *dbias;  // or both null
    A* cached;           // receives d for the second pass; or null
    HalfSum<A> (&sum)[kRows], (&sum_centered)[kRows];

    template <int P, class Access>
    FASTNORM_INLINE void packs(int64_t i, Access access, Strided layout) const {
      const Pack<A> weight = load(coefs.weight + i);
      Pack<A> weights(0), biases(0);
      if (dweight) weights = load(dweight + i), biases = load(dbias + i);
      for (int p = 0; p < P; ++p) {
        Pack<A> d[1], centered[1];
        load_grad(s, i, coefs, epilogue, access, Single<Strided>{layout, p}, d, centered);
        if (cached) store(cached + i + layout.kept(p), d[0]);
        prefetch(s.x + i + layout.later_element(p));
        prefetch(s.dy + i + layout.later_dy(p));
        // Past the end d or x - mean can be NaN, which would spoil the sums.
        d[0] = access.template zero_past_end<T>(d[0]);
        centered[0] = access.template zero_past_end<T>(centered[0]);
        const Pack<A> wd = d[0] * weight;
        sum[p].add(wd);
        sum_centered[p].add_product(wd, centered[0]);
        weights = fma(d[0], centered[0] * Pack<A>(coefs.rstd[p]), weights);
        biases = biases + d[0];
      }
      if (!dweight) return;
      store(dweight + i, weights);
      store(dbias + i, biases);
    }
  };

 public:
  using Base::Base;

  void run() {
    if (g.sets() < kFewSets && g.D() >= 2 * kRange) return run_ranges();
    Buffer<double> partials(params_ ? chunks_ * 2 * lanes_ : 0);
    for_each_task(args.parallel, chunks_, [&](int64_t t) {
      run_chunk(g.N * t / chunks_, g.N * (t + 1) / chunks_, partials + (params_ ? t * 2 * lanes_ : 0));
    });
    if (!params_) return;
    for_each_task(Base::parallel_over(chunks_ * 2 * lanes_), div_up(lanes_, kBlock), [&](int64_t t) {
      for (int64_t i = t * kBlock; i < std::min((t + 1) * kBlock, lanes_); ++i) {
        for (int64_t k = 1; k < chunks_; ++k) {
          partials[i] += partials[k * 2 * lanes_ + i];
          partials[lanes_ + i] += partials[(k * 2 + 1) * lanes_ + i];
        }
      }
    });
    write_params([&](int64_t lane) { return partials[lane]; });
  }

 private:
  void run_chunk(int64_t begin, int64_t end, double* partial) const {
    Buffer<A> sums(params_ ? 2 * lanes_ : 0);
    if (params_) {
      std::fill_n(partial, 2 * lanes_, 0.0);
      std::fill_n(static_cast<A*>(sums), 2 * lanes_, A(0));
    }
    A *dbias = params_ ? static_cast<A*>(sums) : nullptr, *dweight = params_ ? sums + lanes_ : nullptr;
    const Buffer<A> cached(caches_d_ ? (together_ ? kRowGroup : 1) * set_lanes_ : 0);
    const int64_t flush = params_ ? kFlushSamples : end - begin;
    for (int64_t first = begin; first < end; first += flush) {
      const int64_t last = std::min(first + flush, end);
      run_sets(first * g.G, last * g.G, dweight, dbias, caches_d_ ? static_cast<A*>(cached) : nullptr);
      if (!params_) continue;
      for (int64_t i = 0; i < 2 * lanes_; ++i) partial[i] += sums[i];
      std::fill_n(static_cast<A*>(sums), 2 * lanes_, A(0));
    }
  }

  void run_sets(int64_t set, int64_t end, A* dweight, A* dbias, A* cached) const {
    if constexpr (kRowGroup > 1) {
      for (; together_ && set + kRowGroup <= end; set += kRowGroup) {
        run_group<kRowGroup>(set, dweight, dbias, cached);
      }
    }
    for (; set < end; ++set) run_group<1>(set, dweight, dbias, cached);
  }

  template <int kRows>
  void run_group(int64_t set, A* dweight, A* dbias, A* cached) const {
    GradSums<double> total[kRows] = {};
    reduce<kRows>(set, 0, g.D(), dweight, dbias, cached, total);
    if (applies_) apply<kRows>(set, 0, g.D(), total, cached);
  }

  // A few long sets: a task takes a range of elements, in all of them for the sums, in one of them for dx.
  void run_ranges() const {
    const int64_t ranges = div_up(g.D(), kRange), sets = g.sets();
    const Buffer<A> sums(params_ ? 2 * lanes_ : 0);
    A *dbias = params_ ? static_cast<A*>(sums) : nullptr, *dweight = params_ ? sums + lanes_ : nullptr;
    if (params_) std::fill_n(dbias, 2 * lanes_, A(0));
    const Buffer<GradSums<double>> totals(sets * ranges);
    std::fill_n(static_cast<GradSums<double>*>(totals), sets * ranges, GradSums<double>{0, 0});
    for_each_task(args.parallel, ranges, [&](int64_t t) {
      const int64_t end = std::min((t + 1) * kRange, g.D());
      for (int64_t set = 0; set < sets; ++set) {
        reduce<1>(set, t * kRange, end, dweight, dbias, nullptr, totals + set * ranges + t);
      }
    });
    for (int64_t set = 0; set < sets; ++set) {
      for (int64_t t = 1; t < ranges; ++t) totals[set * ranges].merge(totals[set * ranges + t]);
    }
    const auto apply_range = [&](int64_t t) {
      const int64_t set = t % sets, begin = t / sets * kRange;
      apply<1>(set, begin, std::min(begin + kRange, g.D()), totals + set * ranges, nullptr);
    };
    for_each_task(args.parallel, applies_ ? sets * ranges : 0, apply_range, Order::kBackwards);
    write_params([&](int64_t lane) { return static_cast<double>(sums[lane]); });
  }

  // Writes dbias and dweight; at(lane) gives the sums.
  template <class F>
  void write_params(F&& at) const {
    for (int64_t c = 0; c < g.C && params_; ++c) {
      const int64_t lane = c / g.D() * set_lanes_ + lane_of<T>(c % g.D());
      if (args.dbias) args.dbias[c] = at(lane);
      if (args.dweight) args.dweight[c] = at(lanes_ + lane);
    }
  }

  // Adds the sums over the elements [begin, end) of kRows sets to `total`, and to dweight and dbias. begin is that of a
  // block.
  template <int kRows>
  void reduce(int64_t set, int64_t begin, int64_t end, A* dweight, A* dbias, A* cached, GradSums<double>* total) const {
    const int64_t group = set % g.G;
    const BackwardSpan<T> s = span(set);
    const ElementCoefs<A, kRows> coefs(stats.mean + set, stats.rstd + set, weights_.of_group(group),
                                       biases_.of_group(group));
    const Strided layout = Strided{g.D(), mask_row_, g.D(), set_lanes_}.fetching(
        rows_to_fetch(kRows, g.D() * static_cast<int64_t>(sizeof(T))));
    for (int64_t offset = begin; offset < end; offset += kBlock) {
      HalfSum<A> sum[kRows], sum_centered[kRows];
      const int64_t first = group * set_lanes_ + offset;
      const ElementCoefs<A, kRows> moved = coefs.moved(offset);
      with_smooth_activation(epilogue, [&](const auto& e) FASTNORM_LAMBDA {
        const SumPacks<kRows, std::decay_t<decltype(e)>> packs{s.moved(offset, offset, offset / 8),
                                                               moved,
                                                               e,
                                                               dweight ? dweight + first : nullptr,
                                                               dbias ? dbias + first : nullptr,
                                                               cached ? cached + offset : nullptr,
                                                               sum,
                                                               sum_centered};
        across_rows<kRows, A>(std::min(kBlock, end - offset), packs, layout, false);
      });
      for (int p = 0; p < kRows; ++p) total[p].merge({sum_lanes(sum[p]), sum_lanes(sum_centered[p])});
    }
  }

  // Writes dx and dresidual of the elements [begin, end) of kRows sets.
  template <int kRows>
  void apply(int64_t set, int64_t begin, int64_t end, const GradSums<double>* total, const A* cached) const {
    using Coefs = ElementCoefs<A, kRows>;
    using Terms = ElementTerms<A, kRows>;
    const int64_t D = g.D(), group = set % g.G;
    const BackwardSpan<T> s = span(set).moved(begin, begin, begin / 8);
    const Coefs coefs =
        Coefs(stats.mean + set, stats.rstd + set, weights_.of_group(group), biases_.of_group(group)).moved(begin);
    Terms terms;
    for (int p = 0; p < kRows; ++p) {
      const double low = stats.mean_low[set + p];
      const SetTerms<A> own = Base::set_terms(set + p, total[p].d, Base::xhat_sum(set + p, total[p], low), low);
      terms.offset[p] = own.offset, terms.slope[p] = own.slope;
    }
    const bool stream = s.streams();
    if (cached) {
      using E = FixedEpilogue<Activation::kNone, A>;
      const E none{Pack<A>(0)};
      const BackwardPacks<T, A, Coefs, Terms, E> packs{s.with_d(cached + begin), coefs, terms, none};
      across_rows<kRows, A>(end - begin, packs, Strided{D, 0, set_lanes_, 0}, stream);
    } else {
      with_activation(epilogue, [&](const auto& e) FASTNORM_LAMBDA {
        const BackwardPacks<T, T, Coefs, Terms, std::decay_t<decltype(e)>> packs{s, coefs, terms, e};
        across_rows<kRows, A>(end - begin, packs, Strided{D, mask_row_, D, set_lanes_}, stream);
      });
    }
  }

  BackwardSpan<T> span(int64_t set) const {
    const int64_t at = set * g.D();
    return whole.moved(at, at, set * mask_row_);
  }
};

}  // namespace fastnorm::FASTNORM_CPU_CAPABILITY
