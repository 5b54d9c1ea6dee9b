// Asynchronous copies to shared memory: primitives and mutants.
#include <algorithm>
#include <memory>
#include <numeric>

#include "self_test.h"

namespace fastnorm::self_test {
namespace {

using namespace fastnorm::cuda;

// ---- primitives ----

void wait_all() {
  commit_copies();
  wait_copies(0);
}

// Through two stages: the next copy disturbs nothing.
template <int kBytes>
FASTNORM_KERNEL(64, 1)
copy_rounds(const unsigned char* in, int rounds) {
  unsigned char* const stages = shared_memory() + 2 * kBytes * thread_index();
  const int64_t threads = grid_blocks() * block_threads();
  const auto begin = [&](int round) {
    copy_async<kBytes>(stages + round % 2 * kBytes, in + (round * threads + global_index()) * kBytes);
  };
  begin(0);
  for (int round = 0; round < rounds; ++round) {
    wait_all();
    if (round + 1 < rounds) begin(round + 1);
    for (int i = 0; i < kBytes; ++i) {
      const int64_t at = (round * threads + global_index()) * kBytes + i;
      check_equal(stages[round % 2 * kBytes + i], in[at], "a byte that was copied");
    }
  }
}

void copies() {
  static constexpr int kRounds = 5;
  alignas(16) static unsigned char in[kRounds * 2 * 64 * 16];
  for (size_t i = 0; i < sizeof in; ++i) in[i] = static_cast<unsigned char>(i * 37 + i / 256);
  under_all_orders([] {
    launch(copy_rounds<4>, shape(2, 64, 2 * 64 * 4), in, kRounds);
    launch(copy_rounds<8>, shape(2, 64, 2 * 64 * 8), in, kRounds);
    launch(copy_rounds<16>, shape(2, 64, 2 * 64 * 16), in, kRounds);
  });
}

FASTNORM_KERNEL(64, 1) look_early(const int* in, int* early) {
  int* mine = shared_ints() + thread_index();
  copy_async<4>(mine, in + thread_index());
  early[thread_index()] = *mine == in[thread_index()];
  wait_all();
  check_equal(*mine, in[thread_index()], "what was waited for");
}

void when_copies_land() {
  using emulator::Order;
  std::vector<int> in(64);
  std::iota(in.begin(), in.end(), 0);
  const auto early_under = [&](Order order, uint64_t seed) {
    emulator::Settings settings;
    settings.order = order;
    settings.seed = seed;
    emulator::configure(settings);
    std::vector<int> early(64);
    launch(look_early, shape(1, 64, 64 * 4), in.data(), early.data());
    return early;
  };
  const auto number = [](const std::vector<int>& early) { return std::accumulate(early.begin(), early.end(), 0); };
  if (emulator::kSanitizer) {
    check_equal(number(early_under(Order::kFifo, 0)), 64, "at once, and again");
    return;
  }
  check_equal(number(early_under(Order::kFifo, 0)), 0, "fifo: all at the wait");
  check_equal(number(early_under(Order::kLifo, 0)), 64, "lifo: all at once");
  for (const Order order : {Order::kRandom, Order::kPriority}) {
    const std::vector<int> early = early_under(order, 1);
    check(number(early) > 0 && number(early) < 64, "some at once");
    check(early_under(order, 1) == early, "the same seed, the same copies");
    check(early_under(order, 2) != early, "another seed, other copies");
  }
}

// ---- mutants: reads and copies that come too early ----

std::vector<Four> fours(int64_t size) {
  std::vector<Four> in(static_cast<size_t>(size));
  for (size_t i = 0; i < in.size(); ++i) in[i] = {{static_cast<float>(i), 0, 0, 1}};
  return in;
}

FASTNORM_KERNEL(128, 1) copy_own(bool waits_first, bool waits, const Four* in, float* out) {
  Four* mine = reinterpret_cast<Four*>(shared_memory()) + thread_index();
  copy_async<16>(mine, in + global_index());
  if (waits_first) wait_all();
  out[global_index()] = mine->lane[0] + mine->lane[3];
  if (waits && !waits_first) wait_all();
}
Output copy_own_output(bool waits_first, bool waits) {
  Output out = zeros();
  const std::vector<Four> in = fours(kBlocks * kThreads);
  run(copy_own, kThreads * 16, waits_first, waits, in.data(), out.data());
  return out;
}
Output copy_not_waited_for(bool broken) { return copy_own_output(!broken, true); }
Output copy_under_way_at_return(bool broken) { return copy_own_output(!broken, false); }

enum class Meeting { kWaitThenMeet, kWait, kMeetThenWait };

FASTNORM_KERNEL(128, 1) copy_for_others(Meeting meeting, const float* in, float* out) {
  float* shared = shared_floats();
  copy_async<4>(shared + thread_index(), in + global_index());
  if (meeting != Meeting::kMeetThenWait) wait_all();
  if (meeting != Meeting::kWait) sync_block();
  if (meeting == Meeting::kMeetThenWait) wait_all();
  out[global_index()] = shared[(thread_index() + 40) % block_threads()];  // LINE copy_for_others
}
Output copy_for_others_output(Meeting meeting) {
  Output out = zeros(), in = zeros();
  std::iota(in.begin(), in.end(), 1.f);
  run(copy_for_others, kThreads * 4, meeting, static_cast<const float*>(in.data()), out.data());
  return out;
}
Output copy_without_barrier(bool broken) {
  return copy_for_others_output(broken ? Meeting::kWait : Meeting::kWaitThenMeet);
}
Output barrier_before_wait(bool broken) {
  return copy_for_others_output(broken ? Meeting::kMeetThenWait : Meeting::kWaitThenMeet);
}

// Waves through one stage, or through two, of which the second is filled meanwhile. Then the barrier has to come before
// the copies begin, because other threads still read that stage.
FASTNORM_KERNEL(128, 1) copy_waves(int stages, bool right, const float* in, float* out) {
  constexpr int kWaves = 4;
  const int64_t threads = grid_blocks() * block_threads();
  const auto buffer = [&](int wave) { return shared_floats() + wave % stages * block_threads(); };
  const auto begin = [&](int wave) {
    if (wave < kWaves) copy_async<4>(buffer(wave) + thread_index(), in + wave * threads + global_index());
  };
  float sum = 0;
  if (stages == 2) begin(0);
  for (int wave = 0; wave < kWaves; ++wave) {
    if (stages == 1) begin(wave);
    wait_all();
    if (stages == 2 && !right) begin(wave + 1);
    sync_block();
    if (stages == 2 && right) begin(wave + 1);
    sum += buffer(wave)[(thread_index() + 40) % block_threads()];  // LINE copy_over_readers
    if (stages == 1 && right) sync_block();
  }
  out[global_index()] = sum;
}
Output copy_waves_output(int stages, bool right) {
  Output out = zeros(), in = zeros(4 * kBlocks * kThreads);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<float>(i * i % 1009);
  run(copy_waves, 2 * kThreads * 4, stages, right, static_cast<const float*>(in.data()), out.data());
  return out;
}
Output copy_over_readers(bool broken) { return copy_waves_output(1, !broken); }
Output copy_ahead_of_barrier(bool broken) { return copy_waves_output(2, !broken); }

// Two groups. The second may be under way while the first is read.
FASTNORM_KERNEL(128, 1) copy_batches(int pending, const float* in, float* out) {
  float* mine = shared_floats() + 2 * thread_index();
  for (int batch = 0; batch < 2; ++batch) {
    copy_async<4>(mine + batch, in + batch * grid_blocks() * block_threads() + global_index());
    commit_copies();
  }
  wait_copies(1);
  const float first = mine[0];
  wait_copies(pending);
  out[global_index()] = first - 3 * mine[1];
  wait_copies(0);
}
Output copy_of_pending_batch(bool broken) {
  Output out = zeros(), in = zeros(2 * kBlocks * kThreads);
  std::iota(in.begin(), in.end(), 1.f);
  run(copy_batches, 2 * kThreads * 4, broken ? 1 : 0, static_cast<const float*>(in.data()), out.data());
  return out;
}

// ---- mutants: addresses ----

FASTNORM_KERNEL(128, 1) copy_anywhere(const float* in, int place, float* other, float* out) {
  float* mine = other != nullptr ? other : shared_floats() + place + 4 * thread_index();
  copy_async<16>(mine, in + 4 * global_index());  // LINE copy_out_of_bounds
  wait_all();
  out[global_index()] = mine[0];
}
Output copy_anywhere_output(int64_t size, int offset, int place, bool to_global) {
  const std::unique_ptr<Four[]> in(new Four[static_cast<size_t>(size)]);
  const std::vector<Four> values = fours(size);
  std::copy(values.begin(), values.end(), in.get());
  Output out = zeros();
  Four global{};
  run(copy_anywhere, kThreads * 16, static_cast<const float*>(in[0].lane) + offset, place,
      to_global ? global.lane : nullptr, out.data());
  return out;
}
constexpr int64_t kAll = kBlocks * kThreads;
Output copy_misaligned_source(bool broken) { return copy_anywhere_output(kAll + 1, broken ? 2 : 0, 0, false); }
Output copy_misaligned_place(bool broken) { return copy_anywhere_output(kAll, 0, broken ? 1 : 0, false); }
Output copy_past_shared(bool broken) { return copy_anywhere_output(kAll, 0, broken ? 4 : 0, false); }
Output copy_to_global(bool broken) { return copy_anywhere_output(kAll, 0, 0, broken); }
Output copy_out_of_bounds(bool broken) { return copy_anywhere_output(kAll, broken ? 4 : 0, 0, false); }

}  // namespace

std::vector<Primitive> copy_primitives() { return {{"copies", copies}, {"when_copies_land", when_copies_land}}; }

std::vector<Mutant> copy_mutants() {
  return {
      {"copy_not_waited_for", copy_not_waited_for},
      {"copy_under_way_at_return", copy_under_way_at_return},
      {"copy_without_barrier", copy_without_barrier},
      {"barrier_before_wait", barrier_before_wait},
      {"copy_of_pending_batch", copy_of_pending_batch},
      {"copy_over_readers", copy_over_readers},
      {"copy_ahead_of_barrier", copy_ahead_of_barrier},
      {"copy_misaligned_source", copy_misaligned_source},
      {"copy_misaligned_place", copy_misaligned_place},
      {"copy_past_shared", copy_past_shared},
      {"copy_to_global", copy_to_global},
      {"copy_out_of_bounds", copy_out_of_bounds},
  };
}

}  // namespace fastnorm::self_test
