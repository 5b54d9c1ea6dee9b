// Forward with given statistics: the running ones (evaluation), or those of several ranks.
//
// What: y = act((x - mean) * rstd * w + b + residual). There is nothing to reduce, so it walks through memory once, in
//   its own order.
// Who: a task takes about kTaskElements elements: whole positions or runs, or a part of one long run; of short runs as
//   many elements, wherever they begin.
// Traffic: reads x and the residual once, writes y once.
// Numerics: rstd is computed in double, everything else in A.
#pragma once

#include "short_runs.h"

namespace fastnorm::FASTNORM_CPU_CAPABILITY {

// Coefficients of one pack.
template <class A>
struct FixedCoefs {
  Affine<A> affine;
  FASTNORM_INLINE Affine<A> at(int64_t, int) const { return affine; }
};

// Those of a pack whose first n elements are of one run, and the others of the next.
template <class T, class A = Accum<T>>
FASTNORM_INLINE FixedCoefs<A> join(int64_t n, const SharedCoefs<A>& run, const SharedCoefs<A>& next) {
  const Mask<A> first = first_elements<T>(n);
  const auto of = [&](A a, A b) FASTNORM_LAMBDA { return select(first, Pack<A>(a), Pack<A>(b)); };
  return {{of(run.mean, next.mean), of(run.rstd, next.rstd), of(run.scale, next.scale), of(run.bias, next.bias)}};
}

template <class T>
class EvalForward : Call<T, ForwardCall> {
  using Base = Call<T, ForwardCall>;
  using A = Accum<T>;
  using Base::args, Base::whole, Base::g, Base::stats, Base::epilogue;
  // Without statistics to take, memory is walked in its own order, except for tiny runs: 7x7 bfloat16 took 0.85 times
  // as long as columns, 7x7 float32 1.2 times as long. A mask is in the order that backward reads it in.
  static constexpr int64_t kTinyRunBytes = 128;
  static constexpr int64_t kLongRowBytes = 4096;
  static constexpr int64_t kTaskElements = kBlock * kChunkBlocks;

  const int64_t mask_row_ = mask_row_bytes(g.mask_run(), args.dtype);

 public:
  using Base::Base;

  void run() {
    if (!args.stats_given) take_running();
    if (g.traversal() == Traversal::kColumns) {
      columns();
    } else if (args.mask ? has_short_runs<T>(args) : has_short_runs<T>(args, kTinyRunBytes)) {
      ShortRunsForward<T>(args).run();
    } else if (g.S >= kLanes<A> && g.S * static_cast<int64_t>(sizeof(T)) <= kShortRunBytes && !args.mask) {
      short_runs();
    } else {
      rows();
    }
  }

 private:
  void take_running() const {
    const int64_t C = g.C;
    Buffer<A> var(C);
    read_params<A>(args.running_mean, C, A(0), stats.mean);
    read_params<A>(args.running_var, C, A(0), var);
    for (int64_t c = 0; c < C; ++c) {
      stats.var[c] = var[c];
      stats.mean_low[c] = 0;
      stats.rstd[c] = static_cast<A>(1 / std::sqrt(static_cast<double>(var[c]) + args.eps));
    }
  }

  void columns() const {
    const ChannelArrays<T> arrays(g);
    arrays.fill_all(*this);
    const ChannelCoefs<A> coefs = arrays.at(0);
    // No pass before this one has read x: from the last cache, short rows are faster one by one (8x512x28x28 float32
    // took 1.45 times as long four by four, 32x2048x7x7 0.77 times).
    const bool together =
        args.plan.rows_together && (g.C * static_cast<int64_t>(sizeof(T)) >= kLongRowBytes || g.numel() <= kCachedInL2);
    const Strided layout = position_rows<T>(g, together, mask_row_);
    const int64_t positions = g.positions(), per_task = std::max<int64_t>(1, kTaskElements / g.C);
    for_each_task(args.parallel, div_up(positions, per_task), [&](int64_t t) {
      const int64_t end = std::min((t + 1) * per_task, positions);
      forward_rows(span(t * per_task, 0).fetching(layout.ahead), end - t * per_task, g.C, layout, coefs, epilogue);
    });
  }

  // A task takes several runs, or a chunk of one.
  void rows() const {
    const int64_t runs = g.N * g.C, chunks = div_up(g.S, kTaskElements);
    const int64_t per_task = std::max<int64_t>(1, kTaskElements / g.S);
    if (chunks > 1) {
      for_each_task(args.parallel, runs * chunks, [&](int64_t t) {
        const int64_t offset = t % chunks * kTaskElements;
        apply(t / chunks, offset, std::min(kTaskElements, g.S - offset));
      });
      return;
    }
    for_each_task(args.parallel, div_up(runs, per_task), [&](int64_t t) {
      const int64_t end = std::min((t + 1) * per_task, runs);
      for (int64_t run = t * per_task; run < end; ++run) apply(run, 0, g.S);
    });
  }

  // Packs go over the ends of runs, so that none is in parts: all of memory is one row of whole packs and lines, with
  // coefficients that change (14x14 took 0.57 to 0.64 times as long as run by run, 7x7 float32 0.55 to 0.68 times).
  void short_runs() const {
    const Buffer<SharedCoefs<A>> coefs(g.C);
    for (int64_t c = 0; c < g.C; ++c) coefs[c] = Base::shared_coefs(c, c);
    for_each_task(args.parallel, div_up(g.numel(), kTaskElements), [&](int64_t t) {
      const int64_t begin = t * kTaskElements, end = std::min(begin + kTaskElements, g.numel());
      with_smooth_activation(epilogue, [&](const auto& e) FASTNORM_LAMBDA { across_runs(coefs, begin, end, e); });
    });
  }

  // Writes y in [begin, end), of which begin is that of a pack.
  template <class E>
  __attribute__((noinline)) void across_runs(const SharedCoefs<A>* of_channel, int64_t begin, int64_t end,
                                             const E& e) const {
    const bool stream = args.plan.exceeds_cache && can_stream(whole.y);
    int64_t channel = begin / g.S % g.C, edge = (begin / g.S + 1) * g.S;
    for (int64_t i = begin; i < end;) {
      const SharedCoefs<A> own = of_channel[channel];
      const ForwardPacks<T, SharedCoefs<A>, E> packs{whole.moved(i, 0), own, e};
      i += for_whole_packs<A>(0, std::min(edge, end) - i, packs, stream);
      if (i >= end) break;
      // The next pack has the elements of two runs, or of the last one what is left.
      const int64_t first = edge - i, left = end - i;
      channel = channel + 1 == g.C ? 0 : channel + 1;
      edge += g.S;
      if (first == 0) continue;
      const FixedCoefs<A> both = join<T>(first, own, of_channel[channel]);
      const ForwardPacks<T, FixedCoefs<A>, E> pack{whole.moved(i, 0), both, e};
      if (left < kLanes<A>) {
        pack.template packs<1>(0, Tail{left}, Adjacent<A>{});
      } else {
        pack.template packs<1>(0, Whole{stream}, Adjacent<A>{});
      }
      i += kLanes<A>;
    }
  }

  void apply(int64_t run, int64_t offset, int64_t length) const {
    const int64_t c = run % g.C;
    forward_span(span(run, offset), length, Base::shared_coefs(c, c), epilogue);
  }

  ForwardSpan<T> span(int64_t run, int64_t offset) const {
    return whole.moved(run * g.mask_run() + offset, run * mask_row_ + offset / 8);
  }
};

}  // namespace fastnorm::FASTNORM_CPU_CAPABILITY
