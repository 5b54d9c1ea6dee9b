// Fused backward over rows.
#pragma once

#include "backward_rows.cuh"
#include "fused_backward.cuh"

namespace fastnorm::cuda {

// The index among [outer, parts of a cell, C] of the sums of a piece's first cell.
template <int W>
FASTNORM_DEVICE int64_t cell_sums_of(const RowsPiece<W>& piece) {
  const RowsShape& shape = piece.shape;
  const int64_t part = shape.run_pieces == 1 ? 0 : piece.span.piece % shape.run_pieces;
  return (piece.span.set / shape.groups * shape.run_pieces + part) * shape.groups * shape.set_channels + piece.channel;
}

// The sums of a piece of several cells, each cell's times its weight. Units reduce the cells.
template <bool kSmooth, int W, class T, class A>
FASTNORM_DEVICE GradSums<A> sums_by_cells(const BackwardTensors<T>& t, const FusedBackward<A>& f,
                                          const RowsPiece<W>& piece, const Team& team, bool valid,
                                          const SetStats<A>& stats, const Staged<T, W>& staged,
                                          GradSums<A>* unit_sums) {
  const int cells = piece.span.runs, cell_packs = piece.span.packs, units = cells * f.segments;
  const int slots = team.width / f.unit_threads, slot = team.lane / f.unit_threads;
  const bool masks = masks_once<kSmooth>(t);
  for (int first = 0; first < units; first += slots) {
    const int unit = first + slot, cell = unit / f.segments, begin = (unit - cell * f.segments) * f.unit_length;
    const int steps = valid && unit < units ? std::min(f.unit_length, cell_packs - begin) : 0;
    const ThreadSteps range{cell * cell_packs + begin, steps, f.unit_length, team.lane % f.unit_threads,
                            f.unit_threads};
    GradSums<A> mine{};
    accumulate_sums<kSmooth, 1>(
        t, piece, range, stats, [&](const Step& step) { return staged_gradient<kSmooth>(t, piece, staged, step); },
        [&](const Step& step, const A(&)[W], const A(&d)[W]) {
          if (masks) staged.dy[piece.slot(step, t.dy)] = narrow<T>(d);
        },
        mine);
    mine = reduce_lanes(mine, f.unit_threads);
    if (unit < units && team.lane % f.unit_threads == 0) unit_sums[unit] = mine;
  }
  team.sync();
  GradSums<A> weighted{};
  for (int cell = team.lane; cell < cells; cell += team.width) {
    GradSums<A> sums = unit_sums[cell * f.segments];
    for (int s = 1; s < f.segments; ++s) sums.merge(unit_sums[cell * f.segments + s]);
    if (!valid) continue;
    if (f.sums != nullptr) store_one(f.sums + cell_sums_of(piece) + cell, sums);
    const A weight = load_param_of<T>(t.weight, piece.channel + cell, A(1));
    weighted.merge({weight * sums.d, weight * sums.d_centered});
  }
  return weighted;
}

// This thread's part of the sums of a piece of one cell, or of a piece whose weights change with every element. In the
// second case the sums are times rstd, and the thread's part of the weights' gradients is added up in `gathered`, in
// shared memory, where no two threads have the same place.
template <bool kSmooth, int W, class T, class A, class Ready>
FASTNORM_DEVICE GradSums<A> sums_of_piece(const BackwardTensors<T>& t, const RowsPiece<W>& piece, const Team& team,
                                          bool valid, const SetStats<A>& stats, const Staged<T, W>& staged,
                                          GradSums<A>* gathered, Ready ready) {
  const bool masks = masks_once<kSmooth>(t);
  GradSums<A> total{};
  for_landed(piece, team, valid, ready, [&](const ThreadSteps& range) {
    accumulate_sums<kSmooth, 1>(
        t, piece, range, stats, [&](const Step& step) { return staged_gradient<kSmooth>(t, piece, staged, step); },
        [&](const Step& step, const A(&x)[W], const A(&d)[W]) {
          if (masks) staged.dy[piece.slot(step, t.dy)] = narrow<T>(d);
          if (gathered == nullptr) return;
#pragma unroll
          for (int w = 0; w < W; ++w) {
            const A xhat = (x[w] - stats.mean) * stats.rstd - stats.low * stats.rstd;
            gathered[w * piece.span.packs + step.pack].merge({d[w], d[w] * xhat});
          }
        },
        total);
  });
  return total;
}

// Stores what the teams of a block have gathered over their rows, or a block of a gang over its piece of them. Lane w
// of pack p is at w * packs + p.
template <int W, class A>
FASTNORM_DEVICE void store_gathered(const FusedBackward<A>& f, const RowsShape& shape, const GradSums<A>* gathered,
                                    int teams) {
  sync_block();
  const Span span(shape, block_index() % f.shape.pieces);
  const int step = f.shape.team_bytes / static_cast<int>(sizeof(GradSums<A>));
  GradSums<A>* const out = f.gathered + block_index() / f.shape.pieces * shape.set_size + span.first_pack * W;
  for (int c = thread_index(); c < span.packs * W; c += block_threads()) {
    const int at = c % W * span.packs + c / W;
    GradSums<A> total = gathered[at];
    for (int i = 1; i < teams; ++i) total.merge(gathered[i * step + at]);
    store_one(out + c, total);
  }
}

template <class T, int W, bool kSmooth>
FASTNORM_KERNEL(kBlockThreads, 2)
fused_backward_rows(BackwardTensors<T> t, FusedBackward<Accum<T>> f, RowsShape shape) {
  using A = Accum<T>;
  const Team team(shape.team);
  const int teams = block_threads() / team.width, streams = t.residual != nullptr ? 3 : 2;
  const int stage_bytes = streams * f.shape.stream_bytes;
  unsigned char* const mine = shared_memory() + team.index * f.shape.team_bytes;
  auto* const extra = reinterpret_cast<GradSums<A>*>(mine + f.shape.stages * stage_bytes);  // of units, or gathered
  unsigned char* const scratch = shared_memory() + teams * f.shape.team_bytes;
  const GangPartials<GradSums<A>> gang(f.shape, scratch + ladder_bytes(block_threads(), sizeof(A)), 1);
  if (f.gathered != nullptr) {
    for (int i = team.lane; i < shape.piece_length * W; i += team.width) extra[i] = {};
    team.sync();
  }
  const auto memory_of = [&](int stage) { return Staged<T, W>(mine + stage * stage_bytes, f.shape.stream_bytes); };
  const auto load_group = [&](int64_t item, int stage, int copy_group) {
    const RowsPiece<W> piece(shape, item);
    const Staged<T, W> staged = memory_of(stage);
    stage_rows(piece, team, copy_group, t.x, staged.x);
    stage_rows(piece, team, copy_group, t.dy, staged.dy);
    if (t.residual != nullptr) stage_rows(piece, team, copy_group, t.residual, staged.residual);
  };
  const auto use_wave = [&](int64_t item, int stage, int parity, auto ready) {
    const bool valid = item < shape.items, by_units = f.unit_threads > 0;
    const RowsPiece<W> piece(shape, valid ? item : 0);
    const Staged<T, W> staged = memory_of(stage);
    const SetStats<A> stats = load_stats(t.stats, t.sets, piece.span.set);
    GradSums<A> sums;
    if (by_units) {
      ready(kCopyGroups - 1);
      team.sync();  // other threads staged it
      sums = sums_by_cells<kSmooth>(t, f, piece, team, valid, stats, staged, extra);
    } else {
      sums =
          sums_of_piece<kSmooth>(t, piece, team, valid, stats, staged, f.gathered != nullptr ? extra : nullptr, ready);
    }
    sums = reduce_team(team, sums, scratch);
    if (!by_units && !f.batch && !shape.per_element) {  // a piece of one cell
      if (f.sums != nullptr && valid && team.lane == 0) store_one(f.sums + cell_sums_of(piece), sums);
      const A weight = load_param_of<T>(t.weight, piece.channel, A(1));
      sums = {weight * sums.d, weight * sums.d_centered};
    }
    sums = gang.exchange(parity, sums);
    A scale = (shape.per_element ? A(1) : stats.rstd) / static_cast<A>(shape.set_size);
    if (f.batch) {
      if (valid && team.lane == 0 && piece.span.piece == 0) store_param_gradients(f, piece.span.set, sums, stats);
      scale *= load_param_of<T>(t.weight, piece.span.set, A(1));
    }
    const InputTerms<A> terms =
        t.frozen ? InputTerms<A>{} : InputTerms<A>(set_terms<A>(sums, stats.rstd, stats.low, scale), stats.rstd);
    const BackwardTensors<T> rest = without_mask<kSmooth>(t);
    apply_gradient_rows<kSmooth, false, 1>(rest, piece, piece.whole(team, valid), stats, terms, [&](const Step& step) {
      return staged_gradient<kSmooth>(rest, piece, staged, step);
    });
    release_staged<W>(team);
  };
  for_waves(f.shape, shape.items, grid_blocks() * teams, block_index() * teams + team.index, load_group, use_wave);
  if (f.gathered != nullptr) {
    store_gathered<W>(f, shape, reinterpret_cast<const GradSums<A>*>(shared_memory() + f.shape.stages * stage_bytes),
                      teams);
  }
  finish_fused(f, gang);
}

}  // namespace fastnorm::cuda
