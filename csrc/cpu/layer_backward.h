// Backward where every element of a set has its own weight: layer norm, and group norm of (N, C).
//
// What: takes the means of w d and w d xhat over each set, then computes dx as rows_backward.h does. dweight and dbias
//   are sums over the sets.
// Who: a task takes a chunk of samples and has its own row of partial dweight and dbias; the rows are folded in order
//   at the end.
// Traffic: reads dy and x from memory once while a set fits the cache, twice otherwise; writes dx once; writes and
//   reads the partials.
// Numerics: dweight and dbias are summed in A over kFlushSamples samples, then in double. The number of chunks depends
//   on the sizes alone.
#pragma once

#include "task.h"

namespace fastnorm::FASTNORM_CPU_CAPABILITY {

template <class T>
class LayerBackward : Call<T, BackwardCall> {
  using Base = Call<T, BackwardCall>;
  using A = Accum<T>;
  using Base::args, Base::g, Base::stats, Base::epilogue, Base::weight;
  static constexpr int64_t L = kLanes<A>;
  static constexpr int64_t kFlushSamples = 32;
  // Each row of partials costs memory traffic, so at least kMinSamples samples share one; 64 rows feed any machine.
  static constexpr int64_t kMinSamples = 64, kMaxChunks = 64;

  const T* dy_ = static_cast<const T*>(args.dy);
  const T* x_ = static_cast<const T*>(args.x);
  const T* residual_ = static_cast<const T*>(args.residual);
  T* dx_ = static_cast<T*>(args.dx);
  T* dresidual_ = static_cast<T*>(args.dresidual);
  const int64_t mask_row_ = mask_row_bytes(g.D(), args.dtype);
  const bool params_ = args.dweight || args.dbias, applies_ = dx_ || dresidual_;
  const int64_t chunks_ = std::clamp<int64_t>(g.N / (params_ ? kMinSamples : 1), std::min<int64_t>(g.N, 2), kMaxChunks);

  // The sets that go through a pass together, and the d that it keeps of them.
  const int64_t batch_ = sets_per_batch(2 * g.D()), cached_set_ = div_up(g.D(), L) * L;
  const bool caches_d_ = applies_ && Base::caches_slopes(batch_ * cached_set_);

  // Adds w d and w d xhat of a set to `sums`, and the set's part of dweight and dbias to those.
  struct SumPacks {
    const BackwardSpan<T>& s;
    const ElementCoefs<A>& coefs;
    const Epilogue<A>& epilogue;
    A *dweight, *dbias;  // or both null
    A* cached;           // receives d for the second pass; or null
    GradSums<PackD>& sums;

    template <int P, class Access>
    FASTNORM_INLINE void packs(int64_t i, Access access) const {
      Pack<A> d[P], centered[P], wd[P];
      load_grad(s, i, coefs, epilogue, access, Adjacent<A>{}, d, centered);
      if (cached) {
        for (int p = 0; p < P; ++p) store(cached + i + p * L, d[p]);
      }
      for (int p = 0; p < P; ++p) {
        const int64_t at = i + p * L;
        wd[p] = access.zero_past_end(d[p] * load(coefs.weight + at), p);
        if (dweight) {
          // The lanes past the end belong to the next set's channels, and d or xhat can be NaN there: add zero.
          d[p] = access.zero_past_end(d[p], p);
          store(dweight + at, fma(d[p], access.zero_past_end(centered[p] * coefs.rstd, p), load(dweight + at)));
          store(dbias + at, load(dbias + at) + d[p]);
        }
      }
      sums.d = sums.d + widen_halves(tree_sum(wd));
      sums.d_centered = sums.d_centered + widen_halves(tree_dot(wd, centered));
    }
  };

 public:
  using Base::Base;

  void run() {
    Buffer<double> partials(params_ ? 2 * chunks_ * g.C : 0);
    for_each_task(args.parallel, chunks_, [&](int64_t t) {
      run_chunk(g.N * t / chunks_, g.N * (t + 1) / chunks_, partials + (params_ ? 2 * t * g.C : 0));
    });
    if (!params_) return;
    for_each_task(args.parallel, div_up(g.C, kBlock), [&](int64_t t) {
      for (int64_t c = t * kBlock; c < std::min((t + 1) * kBlock, g.C); ++c) {
        double dbias = 0, dweight = 0;
        for (int64_t k = 0; k < chunks_; ++k) {
          dbias += partials[2 * k * g.C + c];
          dweight += partials[(2 * k + 1) * g.C + c];
        }
        if (args.dbias) args.dbias[c] = dbias;
        if (args.dweight) args.dweight[c] = dweight;
      }
    });
  }

 private:
  void run_chunk(int64_t begin, int64_t end, double* partial) const {
    const int64_t pitch = div_up(g.C, L) * L + L;
    Buffer<A> sums(params_ ? 2 * pitch : 0);
    if (params_) {
      std::fill_n(partial, 2 * g.C, 0.0);
      std::fill_n(static_cast<A*>(sums), 2 * pitch, A(0));
    }
    A *dbias = params_ ? static_cast<A*>(sums) : nullptr, *dweight = params_ ? sums + pitch : nullptr;
    const Buffer<A> cached(caches_d_ ? batch_ * cached_set_ : 0);
    const int64_t flush = params_ ? kFlushSamples : end - begin;
    for (int64_t first = begin; first < end; first += flush) {
      const int64_t last = std::min(first + flush, end);
      run_sets(first * g.G, last * g.G, dweight, dbias, caches_d_ ? static_cast<A*>(cached) : nullptr);
      if (!params_) continue;
      for (int64_t c = 0; c < g.C; ++c) {
        partial[c] += dbias[c];
        partial[g.C + c] += dweight[c];
      }
      std::fill_n(static_cast<A*>(sums), 2 * pitch, A(0));
    }
  }

  void run_sets(int64_t begin, int64_t end, A* dweight, A* dbias, A* cached) const {
    const Epilogue<A> none{Activation::kNone, Pack<A>(0)};
    SharedTerms<A> terms[kMaxBatch];
    for (int64_t first = begin; first < end; first += batch_) {
      const int64_t last = std::min(first + batch_, end);
      for (int64_t set = first; set < last; ++set) {
        terms[set - first] = reduce(set, dweight, dbias, cached ? cached + (set - first) * cached_set_ : nullptr);
      }
      for (int64_t set = first; set < last && applies_; ++set) {
        const BackwardSpan<T> s = span(set);
        if (cached) {
          backward_span(s.with_d(cached + (set - first) * cached_set_), g.D(), Base::element_coefs(set),
                        terms[set - first], none);
        } else {
          backward_span(s, g.D(), Base::element_coefs(set), terms[set - first], epilogue);
        }
      }
    }
  }

  SharedTerms<A> reduce(int64_t set, A* dweight, A* dbias, A* cached) const {
    const int64_t c = first_channel(g, set);
    const BackwardSpan<T> s = span(set);
    const ElementCoefs<A> coefs = Base::element_coefs(set);
    GradSums<PackD> lanes{PackD(0), PackD(0)};
    for_packs<A>(g.D(), SumPacks{s, coefs, epilogue, dweight ? dweight + c : nullptr, dbias ? dbias + c : nullptr,
                                 cached, lanes});
    const GradSums<double> sums{sum_lanes(lanes.d), sum_lanes(lanes.d_centered)};
    return Base::set_terms(set, sums.d, Base::xhat_sum(set, sums));
  }

  BackwardSpan<T> span(int64_t set) const {
    const int64_t at = set * g.D();
    return {dy_ + at,
            x_ + at,
            residual_ ? residual_ + at : nullptr,
            args.mask ? args.mask + set * mask_row_ : nullptr,
            dx_ ? dx_ + at : nullptr,
            dresidual_ ? dresidual_ + at : nullptr,
            args.plan.stream};
  }
};

}  // namespace fastnorm::FASTNORM_CPU_CAPABILITY
