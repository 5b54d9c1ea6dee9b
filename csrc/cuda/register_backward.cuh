// Backward over rows in registers.
//
// What: as fused_backward_rows, for rows of one set with a weight for every element (LayerNorm): dx, dresidual, and the
//   sums of dweight and dbias.
// Who: as register_forward.cuh. A thread adds up the sums of its channels over all rows that it sees; at the end the
//   teams of a block add theirs together, and the block stores them. With grid_sync the blocks wait for each other and
//   then fold those, too.
// Traffic: reads dy, x (and residual or mask) once, writes dx (and dresidual) once: the least there is. A block writes
//   8 bytes for each channel.
// Needs: as register_forward.cuh, with kBackwardElements.
// Numerics: float32 sums: packs as trees, a row as a tree; of a channel, one row after the other.
#pragma once

#include "fused_backward.cuh"
#include "register_rows.cuh"

namespace fastnorm::cuda {

// The numbers that backward reads of a row besides its packs, one row ahead.
template <class A>
struct RowFacts {
  SetStats<A> stats;
  unsigned bits;  // of the mask, W for each pack
};
template <class T, class Team>
FASTNORM_DEVICE RowFacts<Accum<T>> load_facts(const BackwardTensors<T>& t, const RegisterRowsShape& shape,
                                              const Team& team, int64_t row) {
  constexpr int W = Team::W;
  RowFacts<Accum<T>> facts{load_stats(t.stats, t.sets, row), 0};
  if (t.mask == nullptr) return facts;
#pragma unroll
  for (int k = 0; k < Team::kPacks; ++k) {
    if (!team.has(k)) continue;
    const unsigned bits = load_mask<W>(t.mask + row * shape.mask_row_bytes, team.element(k));
    facts.bits |= (bits & ((1u << W) - 1)) << k * W;
  }
  return facts;
}

// The sums of a thread's channels over the rows that it sees.
template <class Team>
struct ChannelSums {
  RowNumbers<Team> d, d_xhat;
};

// What the teams of a launch do with their rows.
template <Activation kAct, class Team, class T>
FASTNORM_DEVICE void backward_rows_in_registers(const BackwardTensors<T>& t, const RegisterRowsShape& shape,
                                                const Team& team, unsigned char* memory, ChannelSums<Team>& channels) {
  using A = Accum<T>;
  constexpr int W = Team::W, kPacks = Team::kPacks;
  const int step = team.row_step * shape.length;  // elements
  const SharedNumbers<Team> weights(team, t.weight, A(1), memory + shape.ring_bytes);
  RowRing<Team> ring(shape, memory, t.residual != nullptr ? 3 : 2);
  int64_t here = team.first_row * shape.length;
  const auto load_row = [&](int i, int64_t begin) {
    if (i < team.rows) {
      ring.load(team, 0, t.x + begin);
      ring.load(team, 1, t.dy + begin);
      if (t.residual != nullptr) ring.load(team, 2, t.residual + begin);
    }
    ring.advance();
  };
  for (int i = 0; i < shape.stages; ++i) load_row(i, here + int64_t(i) * step);
  RowFacts<A> facts{};
  if (team.rows > 0) facts = load_facts(t, shape, team, team.row(0));
  for (int i = 0; i < team.block_rows; ++i, here += step) {
    const bool valid = i < team.rows;
    const SetStats<A> stats = facts.stats;
    const A shift = -stats.low * stats.rstd;
    RowNumbers<Team> xhat, weighted;
    // Else those of packs that the team has not are kept from row to row, and there are too few registers for that.
    if constexpr (kCopiesThroughRegisters) xhat = {}, weighted = {};
    A sums[2] = {};
    ring.wait();
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      if (!valid || !team.has(k)) continue;
      A d[W], weight[W];
      widen<A>(ring.take(0, k), xhat.pack[k]);
      widen<A>(ring.take(1, k), d);
      weights.read(k, weight);
#pragma unroll
      for (int w = 0; w < W; ++w) xhat.pack[k][w] = std::fma(xhat.pack[k][w] - stats.mean, stats.rstd, shift);
      keep_in_registers(xhat.pack[k]);
      if constexpr (kAct != Activation::kNone) {
        if (is_two_sided(kAct) && t.mask != nullptr) {
          multiply_slope_bits<kAct>(t.epilogue.param, facts.bits >> k * W, d);
        } else {
          A z[W], bias[W];
          load_params<T>(t.bias, team.element(k), A(0), bias);
#pragma unroll
          for (int w = 0; w < W; ++w) z[w] = std::fma(xhat.pack[k][w], weight[w], bias[w]);
          if (t.residual != nullptr) add_residual(ring.take(2, k), z);
          multiply_slope<kAct, T>(t.epilogue.param, z, d);
        }
        if (t.dresidual != nullptr) store(t.dresidual + here + team.element(k), narrow<T>(d));
      }
#pragma unroll
      for (int w = 0; w < W; ++w) {
        channels.d.pack[k][w] += d[w];
        channels.d_xhat.pack[k][w] = std::fma(d[w], xhat.pack[k][w], channels.d_xhat.pack[k][w]);
        weighted.pack[k][w] = d[w] * weight[w];
      }
      sums[0] += tree_sum(weighted.pack[k]);
      sums[1] += product_sum(weighted.pack[k], xhat.pack[k]);
    }
    load_row(i + shape.stages, here + int64_t(shape.stages) * step);
    if (i + 1 < team.rows) facts = load_facts(t, shape, team, team.row(i + 1));
    team.sum(sums, i & 1);
    if (t.dx == nullptr || !valid) continue;
    const A scale = -stats.rstd * shape.inverse_length, offset = sums[0] * scale, slope = sums[1] * scale;
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      if (!team.has(k)) continue;
      A dx[W];
#pragma unroll
      for (int w = 0; w < W; ++w) {
        dx[w] = std::fma(xhat.pack[k][w], slope, std::fma(weighted.pack[k][w], stats.rstd, offset));
      }
      store(t.dx + here + team.element(k), narrow<T>(dx));
    }
  }
}

// Adds up what the teams of a block have gathered, pack by pack, and stores it.
template <class Team, class A>
FASTNORM_DEVICE void store_channel_sums(const Team& team, const RegisterRowsShape& shape,
                                        const ChannelSums<Team>& channels, GradSums<A>* memory, GradSums<A>* gathered) {
  constexpr int W = Team::W;
  GradSums<A>* const out = gathered + block_index() * shape.length;
#pragma unroll
  for (int k = 0; k < Team::kPacks; ++k) {
    sync_block();  // the ring, or the sums of the pack before, have been read
#pragma unroll
    for (int w = 0; w < W; ++w) {
      memory[w * block_threads() + thread_index()] = {channels.d.pack[k][w], channels.d_xhat.pack[k][w]};
    }
    sync_block();
    const int first = k * team.width * W, count = std::min(team.width * W, shape.length - first);
    for (int c = thread_index(); c < count; c += block_threads()) {
      const GradSums<A>* const of_teams = memory + c % W * block_threads() + c / W;
      GradSums<A> total = of_teams[0];
      for (int i = 1; i < shape.teams; ++i) total.merge(of_teams[i * team.width]);
      store_one(out + first + c, total);
    }
  }
}

template <class T, bool kSmooth>
FASTNORM_KERNEL(kResidentThreads, 1)
register_backward(BackwardTensors<T> t, FusedBackward<Accum<T>> f, RegisterRowsShape shape) {
  unsigned char* const memory = shared_memory() + kRegisterLadderBytes;
  with_row_team<T, kBackwardElements, kSmooth>(shape, shared_memory(), [&](const auto& team) {
    ChannelSums<std::decay_t<decltype(team)>> channels{};
    dispatch_activation<kSmooth>(t.epilogue.activation, [&](auto act) {
      backward_rows_in_registers<act.value>(t, shape, team, memory, channels);
    });
    if (f.gathered != nullptr) {
      store_channel_sums(team, shape, channels, reinterpret_cast<GradSums<Accum<T>>*>(memory), f.gathered);
    }
  });
  if (!f.grid_sync) return;
  sync_grid();
  fold_params(f.fold, all_blocks());
}

}  // namespace fastnorm::cuda
