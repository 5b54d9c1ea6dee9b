// Kernels with one deliberate mistake each, and their correct twins; those about copies and gangs have files of their
// own.
#include <memory>

#include "self_test.h"

namespace fastnorm::self_test {
namespace {

using namespace fastnorm::cuda;

// ---- barriers that are missing ----

float warp_sum(float v) {
  for (int lanes = 1; lanes < kWarp; lanes *= 2) v += shuffle_xor(v, lanes);
  return v;
}

// The two-level sum of a block.
float block_sum(float v, bool with_first, bool with_second) {
  float* scratch = shared_floats();
  const int warps = block_threads() / kWarp, warp = thread_index() / kWarp, lane = thread_index() % kWarp;
  v = warp_sum(v);
  if (lane == 0) scratch[warp] = v;  // LINE first_barrier
  if (with_first) sync_block();
  if (warp == 0) {
    v = warp_sum(lane < warps ? scratch[lane] : 0.f);
    if (lane == 0) scratch[warps] = v;  // LINE second_barrier
  }
  if (with_second) sync_block();
  return scratch[warps];
}

FASTNORM_KERNEL(128, 1) sums(bool with_first, bool with_second, float* out) {
  const float v = static_cast<float>(global_index() % 37);
  const float once = block_sum(v, with_first, with_second);
  out[global_index()] = once + block_sum(v * once, with_first, with_second);
}

Output first_barrier(bool broken) {
  Output out = zeros();
  run(sums, 64, !broken, true, out.data());
  return out;
}
Output second_barrier(bool broken) {
  Output out = zeros();
  run(sums, 64, true, !broken, out.data());
  return out;
}

FASTNORM_KERNEL(128, 1) neighbours(bool with_barrier, float* out) {
  float* mine = shared_floats() + thread_index() / kWarp * kWarp;
  const int lane = thread_index() % kWarp;
  mine[lane] = static_cast<float>(global_index());  // LINE warp_barrier
  if (with_barrier) sync_warp();
  out[global_index()] = mine[(lane + 1) % kWarp];
}
Output warp_barrier(bool broken) {
  Output out = zeros();
  run(neighbours, kThreads * 4, !broken, out.data());
  return out;
}

// ---- blocks that meddle with each other ----

FASTNORM_KERNEL(128, 1) write_last(bool to_one_place, float* out) {
  if (thread_index() == 7) {
    out[to_one_place ? 0 : block_index()] = static_cast<float>(block_index() + 1);  // LINE cross_block_race
  }
}
Output cross_block_race(bool broken) {
  Output out = zeros(kBlocks);
  run(write_last, 0, broken, out.data());
  return out;
}

// ---- barriers that not all reach ----

FASTNORM_KERNEL(128, 1) part(bool apart, float* out) {
  if (apart && thread_index() < 40) {
    sync_block();  // LINE divergent_barrier one
    out[global_index()] = 1;
  } else {
    sync_block();  // LINE divergent_barrier other
    out[global_index()] = 2;
  }
}
Output divergent_barrier(bool broken) {
  Output out = zeros();
  run(part, 0, broken, out.data());
  return out;
}

FASTNORM_KERNEL(128, 1) leave_early(bool early, float* out) {
  if (early && thread_index() >= 100) return;
  sync_block();  // LINE deadlock
  out[global_index()] = 1;
}
Output deadlock(bool broken) {
  Output out = zeros();
  run(leave_early, 0, broken, out.data());
  return out;
}

FASTNORM_KERNEL(128, 1) uneven_loop(bool uneven, float* out) {
  const int rounds = uneven && thread_index() == 3 ? 4 : 3;
  for (int round = 0; round < rounds; ++round) sync_block();  // LINE uneven_barriers
  out[global_index()] = 1;
}
Output uneven_barriers(bool broken) {
  Output out = zeros();
  run(uneven_loop, 0, broken, out.data());
  return out;
}

// ---- shuffles that not all lanes take part in ----

FASTNORM_KERNEL(128, 1) shuffle_some(bool some, float* out) {
  float v = static_cast<float>(thread_index());
  if (!some || thread_index() % kWarp < 16) v = shuffle_xor(v, 1);  // LINE half_warp_shuffle
  sync_block();                                                     // LINE half_warp_barrier
  out[global_index()] = v;
}
Output half_warp_shuffle(bool broken) {
  Output out = zeros();
  run(shuffle_some, 0, broken, out.data());
  return out;
}

FASTNORM_KERNEL(128, 1) shuffle_tail(int count, bool guarded, float* out) {
  float v = 1;
  if (guarded && global_index() >= count) return;
  v += shuffle_xor(v, 16);  // LINE shuffle_after_return
  if (global_index() < count) out[global_index()] = v;
}
Output shuffle_after_return(bool broken) {
  Output out = zeros();
  run(shuffle_tail, 0, 500, broken, out.data());
  return out;
}

FASTNORM_KERNEL(128, 1) shuffle_any(int lane, float* out) { out[global_index()] = shuffle(1.f, lane); }
Output partial_warp_shuffle(bool broken) {
  Output out = zeros();
  launch(shuffle_any, LaunchConfig{1, broken ? 48 : 64, 0, nullptr}, 5, out.data());
  return out;
}
Output shuffle_lane_outside(bool broken) {
  Output out = zeros();
  run(shuffle_any, 0, broken ? 32 : 31, out.data());
  return out;
}

// ---- memory ----

FASTNORM_KERNEL(128, 1) copy_all(const float* in, int64_t first, int64_t count, float* out) {
  for (int64_t i = first + global_index(); i < count; i += grid_blocks() * block_threads()) {
    out[i - first] = in[i];  // LINE global_out_of_bounds
  }
}
Output global_out_of_bounds(bool broken) {
  constexpr int kCount = 700;
  const std::unique_ptr<float[]> in(new float[kCount]);
  for (int i = 0; i < kCount; ++i) in[static_cast<size_t>(i)] = static_cast<float>(i);
  Output out = zeros(kCount + 1);
  run(copy_all, 0, static_cast<const float*>(in.get()), int64_t{0}, int64_t{broken ? kCount + 1 : kCount}, out.data());
  return out;
}

FASTNORM_KERNEL(128, 1) write_shared(int count, float* out) {
  float* shared = shared_floats();
  for (int i = thread_index(); i < count; i += block_threads()) {
    shared[i] = 1;  // LINE shared_write_outside
  }
  sync_block();
  out[global_index()] = shared[0];
}
Output shared_write_outside(bool broken) {
  Output out = zeros();
  run(write_shared, 200 * 4, broken ? 201 : 200, out.data());
  return out;
}

FASTNORM_KERNEL(128, 1) read_shared(int count, float* out) {
  float* shared = shared_floats();
  for (int i = thread_index(); i < 200; i += block_threads()) shared[i] = 1;
  sync_block();
  float sum = 0;
  for (int i = 0; i < count; ++i) sum += shared[i];  // LINE shared_read_outside
  out[global_index()] = sum;
}
Output shared_read_outside(bool broken) {
  Output out = zeros();
  run(read_shared, 200 * 4, broken ? 201 : 200, out.data());
  return out;
}

FASTNORM_KERNEL(128, 1) read_unwritten(int written, float* out) {
  float* shared = shared_floats();
  if (thread_index() < written) shared[thread_index()] = 1;
  sync_block();
  float sum = 0;
  for (int i = 0; i < block_threads(); ++i) sum += shared[i];
  out[global_index()] = sum;
}
Output unwritten_shared(bool broken) {
  Output out = zeros();
  run(read_unwritten, kThreads * 4, broken ? kThreads - 1 : kThreads, out.data());
  return out;
}

FASTNORM_KERNEL(128, 1) copy_packs(bool noted, const float* in, float* out) {
  const float* p = in + 4 * global_index();
  if (noted) note_read(p, sizeof(Four), Access::kStream);
  const Four four = *reinterpret_cast<const Four*>(p);  // LINE misaligned_unnoted
  out[global_index()] = four.lane[0] + four.lane[3];
}
Output packs(bool broken, bool noted) {
  std::vector<Four> in(kBlocks * kThreads + 1);
  for (size_t i = 0; i < in.size(); ++i) in[i] = {{static_cast<float>(i), 0, 0, 1}};
  Output out = zeros();
  run(copy_packs, 0, noted, static_cast<const float*>(in[0].lane) + (broken ? 2 : 0), out.data());
  return out;
}
Output misaligned_pack(bool broken) { return packs(broken, true); }
Output misaligned_unnoted(bool broken) { return packs(broken, false); }

FASTNORM_KERNEL(128, 1) look_outside(int rank, bool shared, float* out) {
  float* place = shared ? shared_floats() : out;
  if (thread_index() == 0) *cluster_shared(place, rank) = 1;
}
Output wrong_rank(bool broken) {
  Output out = zeros();
  run(look_outside, 16, broken ? 1 : 0, true, out.data());
  return out;
}
Output remote_global(bool broken) {
  Output out = zeros();
  run(look_outside, 16, 0, !broken, out.data());
  return out;
}

}  // namespace

std::vector<Mutant> mutants() {
  return {
      {"first_barrier", first_barrier},
      {"second_barrier", second_barrier},
      {"warp_barrier", warp_barrier},
      {"cross_block_race", cross_block_race, kBlocks},
      {"divergent_barrier", divergent_barrier},
      {"deadlock", deadlock},
      {"uneven_barriers", uneven_barriers},
      {"half_warp_shuffle", half_warp_shuffle},
      {"shuffle_after_return", shuffle_after_return},
      {"partial_warp_shuffle", partial_warp_shuffle},
      {"shuffle_lane_outside", shuffle_lane_outside},
      {"global_out_of_bounds", global_out_of_bounds},
      {"shared_write_outside", shared_write_outside},
      {"shared_read_outside", shared_read_outside},
      {"unwritten_shared", unwritten_shared},
      {"misaligned_pack", misaligned_pack},
      {"misaligned_unnoted", misaligned_unnoted},
      {"wrong_rank", wrong_rank},
      {"remote_global", remote_global},
  };
}

}  // namespace fastnorm::self_test
