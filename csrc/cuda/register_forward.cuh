// Forward over rows in registers.
//
// What: as fused_forward_rows, for rows of one set with a weight for every element (LayerNorm).
// Who: a team takes a row (register_rows.cuh); the blocks are all on the device and take rows in strides.
// Traffic: reads x (and residual) once, writes y (and a bit per element) once: the least there is. A block reads
//   weights and biases once.
// Needs: rows of at most kResidentThreads * kForwardElements elements, packs of 16 bytes.
// Numerics: the mean from a sum of all elements; then the deviations from it, whose sum of squares is taken of numbers
//   as small as the spread. The sum is scaled by a power of two, so that it does not overflow where the mean does not.
//   Rounding leaves the deviations a mean of their own, `rest`, which the statistics take in:
//     16-bit storage  the sum has lost nothing but its last digit, and rest follows from it
//     float32         rest is the mean of the deviations, which are exact where the mean is large
#pragma once

#include "forward.cuh"
#include "register_rows.cuh"

namespace fastnorm::cuda {

// a / b, from b's inverse. Infinite quotients stay infinite.
FASTNORM_DEVICE float divide(float a, float b, float inverse) {
  const float quotient = rounded_product(a, inverse), rest = std::fma(-quotient, b, a);
  return rest - rest == 0 ? std::fma(rest, inverse, quotient) : quotient;
}

// What the teams of a launch do with their rows.
template <Activation kAct, class Team, class T>
FASTNORM_DEVICE void forward_rows_in_registers(const ForwardTensors<T>& t, const RegisterRowsShape& shape,
                                               const Team& team, unsigned char* memory) {
  using A = Accum<T>;
  constexpr int W = Team::W, kPacks = Team::kPacks;
  constexpr bool kSharesBytes = kLanesPerByte<W> > 1;  // of the mask
  // Packs of the residual: more of float32's would spill.
  constexpr int kAhead = sizeof(T) == 4 ? kPacks / (is_smooth(kAct) ? 4 : 2) : kPacks;
  const int step = team.row_step * shape.length;  // elements
  const int64_t begin = team.first_row * shape.length;
  const SharedNumbers<Team> weights(team, t.weight, A(1), memory + shape.ring_bytes);
  const SharedNumbers<Team> biases(team, t.bias, A(0),
                                   memory + shape.ring_bytes + block_threads() * SharedNumbers<Team>::kBytes);
  RowRing<Team> ring(shape, memory, 1);
  const T* next = t.x + begin;
  const auto load_row = [&](int i) {
    if (i < team.rows) ring.load(team, 0, next);
    ring.advance();
    next += step;
  };
  for (int i = 0; i < shape.stages; ++i) load_row(i);
  T* y = t.y + begin;
  for (int i = 0; i < team.block_rows; ++i, y += step) {
    const bool valid = i < team.rows;  // else what follows is of no row, and is not stored
    RowNumbers<Team> x;
    A total[1] = {};
    ring.wait();
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      if (!team.has(k)) continue;
      widen<A>(ring.take(0, k), x.pack[k]);
      keep_in_registers(x.pack[k]);
      total[0] += tree_sum(x.pack[k]);
    }
    load_row(i + shape.stages);
    Pack<T, W> residual[kAhead];
    const bool has_residual = t.residual != nullptr && valid;
    const auto load_residual = [&](int k) {
      if (has_residual && team.has(k)) residual[k % kAhead] = load<W>(t.residual + (y - t.y) + team.element(k));
    };
#pragma unroll
    for (int k = 0; k < kAhead; ++k) load_residual(k);  // on their way while the sums are taken
    total[0] *= shape.scale;
    team.sum(total, 0);
    const A mean = rounded_product(total[0], shape.inverse_scaled);

    constexpr bool kSumsRest = sizeof(T) == 4;
    constexpr int kNumbers = kSumsRest ? 2 : 1;
    A sums[kNumbers] = {};
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      if (!team.has(k)) continue;
#pragma unroll
      for (int w = 0; w < W; ++w) x.pack[k][w] -= mean;
      keep_in_registers(x.pack[k]);
      sums[0] += product_sum(x.pack[k], x.pack[k]);
      if constexpr (kSumsRest) sums[1] += tree_sum(x.pack[k]);
    }
    team.sum(sums, 1);
    A rest = kSumsRest ? sums[kNumbers - 1] * shape.inverse_length
                       : std::fma(-mean, shape.scaled_length, total[0]) * shape.inverse_scaled;
    if (!(rest - rest == A(0))) rest = 0;  // infinite means stay infinite
    const A var = std::fma(-rest, rest, divide(sums[0], static_cast<A>(shape.length), shape.inverse_length));
    const SetStats<A> stats = finish_stats(rest, var, mean, t.eps);
    const int64_t row = team.row(i);
    if (valid && team.lane == 0) store_stats(t.stats, t.sets, row, stats, var);
    if (t.y == nullptr || (!valid && !kSharesBytes)) continue;
    const A shift = -rest * stats.rstd;
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const bool in = valid && team.has(k);
      if (!in && !kSharesBytes) continue;  // lanes whose bits share a byte stay together
      A z[W], weight[W], bias[W];
      weights.read(k, weight);
      biases.read(k, bias);
#pragma unroll
      for (int w = 0; w < W; ++w) z[w] = std::fma(std::fma(x.pack[k][w], stats.rstd, shift), weight[w], bias[w]);
      if (t.residual != nullptr && in) add_residual(residual[k % kAhead], z);
      if (k + kAhead < kPacks) load_residual(k + kAhead);
      if constexpr (is_two_sided(kAct)) {
        if (t.mask != nullptr) {
          store_mask<W>(t.mask + row * shape.mask_row_bytes + team.element(k) / 8, upper_side<kAct>(z), in);
        }
      }
      activate_pack<kAct, T>(t.epilogue.param, z);
      if (in) store(y + team.element(k), narrow<T>(z));
    }
  }
}

template <class T, bool kSmooth>
FASTNORM_KERNEL(kResidentThreads, 1)
register_forward(ForwardTensors<T> t, RegisterRowsShape shape) {
  with_row_team<T, kForwardElements, kSmooth>(shape, shared_memory(), [&](const auto& team) {
    dispatch_activation<kSmooth>(t.epilogue.activation, [&](auto act) {
      forward_rows_in_registers<act.value>(t, shape, team, shared_memory() + kRegisterLadderBytes);
    });
  });
}

}  // namespace fastnorm::cuda
