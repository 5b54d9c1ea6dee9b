// Forward with given statistics: the running ones (evaluation), or those of several ranks.
//
// What: y = act((x - mean) * rstd * w + b + residual). There is nothing to reduce, so it walks through memory once, in
//   its own order.
// Who: a task takes about kTaskElements elements: whole positions or runs, or a part of one long run.
// Traffic: reads x and the residual once, writes y once.
// Numerics: rstd is computed in double, everything else in A.
#pragma once

#include "short_runs.h"

namespace fastnorm::FASTNORM_CPU_CAPABILITY {

template <class T>
class EvalForward : Call<T, ForwardCall> {
  using Base = Call<T, ForwardCall>;
  using A = Accum<T>;
  using Base::args, Base::whole, Base::g, Base::stats, Base::epilogue;
  // Without statistics to take, walking memory in its own order is worth more than whole packs, except for tiny runs:
  // 7x7 bfloat16 took 18 cycles a pack run by run and 7 as columns, 7x7 float32 17 and 20. A mask is in the order that
  // backward reads it in.
  static constexpr int64_t kTinyRunBytes = 128;
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
    const Strided layout = position_rows<T>(g, args.plan, mask_row_);
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

  void apply(int64_t run, int64_t offset, int64_t length) const {
    const int64_t c = run % g.C;
    forward_span(span(run, offset), length, Base::shared_coefs(c, c), epilogue);
  }

  ForwardSpan<T> span(int64_t run, int64_t offset) const {
    return whole.moved(run * g.mask_run() + offset, run * mask_row_ + offset / 8);
  }
};

}  // namespace fastnorm::FASTNORM_CPU_CAPABILITY
