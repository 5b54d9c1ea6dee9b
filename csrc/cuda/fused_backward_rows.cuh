// Fused backward over rows.
#pragma once

#include "backward_rows.cuh"
#include "fused_backward.cuh"
#include "rows_staging.cuh"

namespace fastnorm::cuda {

// The index among [outer, parts of a cell, C] of the sums of a piece's first cell.
template <int W>
FASTNORM_DEVICE int64_t cell_sums_of(const RowsPiece<W>& piece) {
  const RowsShape& shape = piece.shape;
  const int64_t part = shape.run_pieces == 1 ? 0 : piece.span.piece % shape.run_pieces;
  return (piece.span.set / shape.groups * shape.run_pieces + part) * shape.groups * shape.set_channels + piece.channel;
}

// A wave's tensors in shared memory, as the steps of a walk see them.
template <class T, int W>
class StagedRows {
 public:
  FASTNORM_DEVICE StagedRows(const BackwardTensors<T>& t, const RowsPiece<W>& piece, const Staged<T, W>& staged)
      : piece_(piece),
        staged_(staged),
        x_(piece, t.x),
        dy_(piece, W > 1 ? t.x : t.dy),
        residual_(piece, W > 1 ? t.x : t.residual) {}

  // The mask's bits are in global memory, and come from a reader of the range that the step is of. Narrower packs take
  // theirs one by one: to find a place twice costs them more than the wait.
  FASTNORM_DEVICE auto mask_reader(const uint8_t* mask, const ThreadSteps& range) const {
    if constexpr (W == 8) {
      const auto bits_at = [=, &piece = piece_](int index) { return piece.mask_bits(mask, piece.step_at(index)); };
      const int end = mask != nullptr && range.valid ? range.begin + range.count : 0;
      auto reader = MaskReader(range.begin + range.lane, range.shift, end, bits_at);
      return [=](const Step& step) mutable { return reader(step.index); };
    } else {
      return [=, &piece = piece_](const Step& step) { return piece.mask_bits(mask, step); };
    }
  }
  template <bool kSmooth, class Tensors, class Mask>
  FASTNORM_DEVICE GradientPacks<T, W> read(const Tensors& t, const Step& step, Mask& mask) const {
    GradientPacks<T, W> packs{staged_.x[x_(step)], staged_.dy[dy_(step)], {}, 0};
    if (t.residual != nullptr) packs.residual = staged_.residual[residual_(step)];
    if (!kSmooth && t.mask != nullptr) packs.bits = mask(step);
    return packs;
  }
  template <class A>
  FASTNORM_DEVICE void replace_dy(const Step& step, const A (&d)[W]) const {
    staged_.dy[dy_(step)] = narrow<T>(d);
  }

 private:
  const RowsPiece<W>& piece_;
  Staged<T, W> staged_;
  Slots<W> x_, dy_, residual_;
};

// The steps of unit `unit` of a team, of which this thread is lane `lane`.
template <int W, class A>
FASTNORM_DEVICE ThreadSteps steps_of_unit(const FusedBackward<A>& f, const RowsPiece<W>& piece, bool valid, int unit,
                                          int lane) {
  const int cell = f.segments == 1 ? unit : unit / f.segments, begin = (unit - cell * f.segments) * f.unit_length;
  const int threads = 1 << f.unit_shift, packs = piece.span.packs;
  return {cell * packs + begin, std::min(f.unit_length, packs - begin), valid && cell < piece.span.runs, lane, threads,
          f.unit_shift};
}

// The sums of a piece of several cells, each cell's times its weight, from those of its units.
template <int W, class T, class A>
FASTNORM_DEVICE GradSums<A> sum_of_cells(const BackwardTensors<T>& t, const FusedBackward<A>& f,
                                         const RowsPiece<W>& piece, const Team& team, bool valid,
                                         const GradSums<A>* unit_sums) {
  GradSums<A> weighted{};
  for (int cell = team.lane; valid && cell < piece.span.runs; cell += team.width) {
    GradSums<A> sums = unit_sums[cell * f.segments];
    for (int s = 1; s < f.segments; ++s) sums.merge(unit_sums[cell * f.segments + s]);
    if (f.sums != nullptr) store_one(f.sums + cell_sums_of(piece) + cell, sums);
    const A weight = load_param_of<T>(t.weight, piece.channel + cell, A(1));
    weighted.merge({weight * sums.d, weight * sums.d_centered});
  }
  return weighted;
}

// This thread's part of the sums of a staged piece: of one cell; of several cells, by units, whose sums go to `extra`;
// or of a piece whose weights change with every element. In the last case the sums are times rstd, and the thread's
// part of the weights' gradients may be gathered in `extra`, where no two threads have the same place.
template <bool kSmooth, int W, class T, class A, class Ready>
FASTNORM_DEVICE GradSums<A> sums_of_piece(const BackwardTensors<T>& t, const FusedBackward<A>& f,
                                          const RowsPiece<W>& piece, const Team& team, bool valid,
                                          const SetStats<A>& stats, const ChannelParams<A>& first,
                                          const StagedRows<T, W>& staged, GradSums<A>* extra, Ready ready) {
  const bool by_units = f.unit_length > 0, gathers = f.gathered != nullptr;
  const int slots = team.width >> f.unit_shift, units = piece.span.runs * f.segments;
  const int slot = team.lane >> f.unit_shift, lane = team.lane & ((1 << f.unit_shift) - 1);
  const int length = piece.group_length();
  if (by_units || W == 1) {
    ready(kCopyGroups - 1);
    team.sync();  // other threads staged it
  }
  GradSums<A> total{};
  with_sums<true, kSmooth>(t, piece, stats, first, [&](const auto& sums) {
    using Sums = std::remove_cvref_t<decltype(sums)>;
    int unit = slot;
    ThreadSteps range = by_units ? steps_of_unit(f, piece, valid, unit, lane) : piece.first_group(team, valid, length);
#pragma unroll 1
    for (int group = 0; by_units ? unit - slot < units : range.count > 0; ++group) {
      auto mask = staged.mask_reader(sums.t.mask, range);
      if (!by_units && W > 1) ready(group);
      piece.for_steps(range, [&](const Step& step) {
        const auto packs = staged.template read<kSmooth>(sums.t, step, mask);
        const auto keep = [&](const Step&, const A(&centered)[W], const A(&d)[W]) {
          if constexpr (Sums::kAct == Activation::kRelu) staged.replace_dy(step, d);
          if constexpr (Sums::kByElement) {
            if (!gathers) return;
#pragma unroll
            for (int w = 0; w < W; ++w) {
              const A xhat = centered[w] * stats.rstd - stats.low * stats.rstd;
              extra[w * piece.span.packs + step.pack].merge({d[w], d[w] * xhat});
            }
          }
        };
        sums.add(step, packs, keep, total);
      });
      if (by_units) {
        A unit_sums[2] = {total.d, total.d_centered};
        total = {};
        sum_lanes(unit_sums, 1 << f.unit_shift);
        if (lane == 0 && unit < units) extra[unit] = {unit_sums[0], unit_sums[1]};
        unit += slots;
        range = steps_of_unit(f, piece, valid, unit, lane);
      } else {
        piece.move_to_next_group(range, length);
      }
    }
  });
  if (!by_units) return total;
  team.sync();
  return sum_of_cells(t, f, piece, team, valid, extra);
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
FASTNORM_KERNEL(kResidentThreads, 1)
fused_backward_rows(BackwardTensors<T> t, FusedBackward<Accum<T>> f, RowsShape shape) {
  using A = Accum<T>;
  const Team team(shape.team_shift);
  const int teams = block_threads() >> shape.team_shift, streams = t.residual != nullptr ? 3 : 2;
  const int stage_bytes = streams * f.shape.stream_bytes;
  unsigned char* const mine = shared_memory() + team.index * f.shape.team_bytes;
  auto* const extra = reinterpret_cast<GradSums<A>*>(mine + f.shape.stages * stage_bytes);  // of units, or gathered
  unsigned char* const scratch = shared_memory() + teams * f.shape.team_bytes;
  GangPartials<GradSums<A>, A> gang(f.shape, scratch + ladder_bytes(block_threads(), sizeof(A)), 1);
  if (f.gathered != nullptr) {
    for (int i = team.lane; i < shape.piece_length * W; i += team.width) extra[i] = {};
    team.sync();
  }
  const auto memory_of = [&](int stage) { return Staged<T, W>(mine + stage * stage_bytes, f.shape.stream_bytes); };
  struct Prepared {
    SetStats<A> stats;
    ChannelParams<A> first;
  };
  const auto prepare = [&](int64_t item) {
    const RowsPiece<W> piece(shape, item < shape.items ? item : 0);
    return Prepared{load_stats(t.stats, t.sets, piece.span.set), channel_params<T>(piece, t.weight, t.bias)};
  };
  const auto load_piece = [&](int64_t item, int stage) {
    const bool valid = item < shape.items;
    const RowsPiece<W> piece(shape, valid ? item : 0);
    const Staged<T, W> staged = memory_of(stage);
    stage_rows<T, W>(piece, team, valid, {{t.x, staged.x}, {t.dy, staged.dy}, {t.residual, staged.residual}});
  };
  const auto use_wave = [&](int64_t item, const Prepared& prepared, int stage, int parity, auto ready) {
    const bool valid = item < shape.items, by_units = f.unit_length > 0;
    const RowsPiece<W> piece(shape, valid ? item : 0);
    const StagedRows<T, W> staged(t, piece, memory_of(stage));
    const SetStats<A>& stats = prepared.stats;
    const ChannelParams<A>& first = prepared.first;
    GradSums<A> sums = sums_of_piece<kSmooth>(t, f, piece, team, valid, stats, first, staged, extra, ready);
    sums = sum_team(team, sums, scratch);
    if (!by_units && !f.batch && !shape.per_element) {  // a piece of one cell
      if (f.sums != nullptr && valid && team.lane == 0) store_one(f.sums + cell_sums_of(piece), sums);
      sums = {first.weight * sums.d, first.weight * sums.d_centered};
    }
    sums = gang.exchange(parity, sums, NoCount{});
    A scale = (shape.per_element ? A(1) : stats.rstd) / static_cast<A>(shape.set_size);
    if (f.batch) {
      if (valid && team.lane == 0 && piece.span.piece == 0) store_param_gradients(f, piece.span.set, sums, stats);
      scale *= first.weight;
    }
    const InputTerms<A> terms =
        t.frozen ? InputTerms<A>{} : InputTerms<A>(set_terms<A>(sums, stats.rstd, stats.low, scale), stats.rstd);
    const BackwardTensors<T> rest = second_half<kSmooth>(t);
    with_gradients<true, kSmooth>(rest, piece, stats, first, terms, [&](const auto& tensors, auto use) {
      const ThreadSteps whole = piece.whole(team, valid);
      auto mask = staged.mask_reader(tensors.mask, whole);
      piece.for_steps(whole, [&](const Step& step) { use(step, staged.template read<kSmooth>(tensors, step, mask)); });
    });
    release_staged<W>(team);
  };
  for_waves(
      f.shape, shape.items, grid_blocks() * teams, block_index() * teams + team.index, prepare, load_piece,
      [&] { gang.begin(); }, use_wave);
  if (f.gathered != nullptr) {
    store_gathered<W>(f, shape, reinterpret_cast<const GradSums<A>*>(shared_memory() + f.shape.stages * stage_bytes),
                      teams);
  }
  finish_fused(f, gang);
}

}  // namespace fastnorm::cuda
