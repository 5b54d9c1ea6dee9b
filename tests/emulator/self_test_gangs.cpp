// Blocks that wait for each other in clusters and grids: primitives and mutants.
#include "self_test.h"

namespace fastnorm::self_test {
namespace {

using namespace fastnorm::cuda;

// ---- primitives ----

// Sums over clusters, then over the grid, round after round.
FASTNORM_KERNEL(256, 1) sum_in_two_steps(int* of_clusters, int rounds) {
  int* mine = shared_ints();
  const int blocks = static_cast<int>(grid_blocks()), block = static_cast<int>(block_index());
  const int cluster = cluster_size(), clusters = blocks / cluster;
  for (int round = 0; round < rounds; ++round) {
    const int place = round % 2;
    if (thread_index() == 0) mine[place] = block + round;
    sync_cluster();
    if (cluster_rank() == 0 && thread_index() == 0) {
      int sum = 0;
      for (int rank = 0; rank < cluster; ++rank) sum += *cluster_shared(mine + place, rank);
      of_clusters[place * clusters + block / cluster] = sum;
    }
    sync_grid();
    int sum = 0;
    for (int i = 0; i < clusters; ++i) sum += of_clusters[place * clusters + i];
    check_equal(sum, blocks * (blocks - 1) / 2 + round * blocks, "sum of all blocks");
  }
}

void clusters_of_a_grid() {
  under_all_orders([] {
    for (const int cluster : {1, 2, 5, 16}) {
      std::vector<int> of_clusters(6);
      check_equal(launch(sum_in_two_steps, shape(3 * cluster, 32, 8, cluster, true), of_clusters.data(), 4), 0,
                  "launch");
    }
  });
}

void grid_of_a_whole_device() {
  if (emulator::kSanitizer) return;  // too many threads for them
  for (const emulator::Order order : {emulator::Order::kFifo, emulator::Order::kRandom}) {
    emulator::Settings settings;
    settings.order = order;
    emulator::configure(settings);
    const int blocks = 2 * settings.device.num_sms;
    std::vector<int> of_blocks(static_cast<size_t>(2 * blocks));
    launch(sum_in_two_steps, shape(blocks, 256, 100 << 10, 1, true), of_blocks.data(), 2);
  }
}

FASTNORM_KERNEL(32, 1) count_threads(int* count) { ++*count; }

void refused_gangs() {
  emulator::Settings settings;
  settings.refusals.kind = emulator::Refuses::kGangs;
  emulator::configure(settings);
  emulator::reset_counters();
  int count = 0;
  for (const LaunchConfig& config : {shape(4, 1, 0, 2), shape(4, 1, 0, 1, true), shape(4, 1, 0, 2, true)}) {
    check_equal(launch(count_threads, config, &count), kGangRefused + emulator::kCooperativeTooLarge, "a gang");
  }
  check_equal(count, 0, "threads that ran");
  check_equal(emulator::launch_count(), 0, "launches");
  check_equal(launch(count_threads, shape(4, 1), &count), 0, "blocks that do not wait for each other");
  check_equal(count, 4, "threads that ran");
  check_equal(emulator::launch_count(), 1, "launches");
  check(std::string(platform_error_string(emulator::kCooperativeTooLarge)).find("cooperative") != std::string::npos,
        "its text");
  check(thrown_by([] { launch(count_threads, shape(3, 1, 0, 2), nullptr); }).find("clusters of 2") != std::string::npos,
        "what no device takes is still a defect");
}

FASTNORM_KERNEL(32, 1) do_nothing() {}

void refused_combinations() {
  emulator::Settings settings;
  settings.device = emulator::device_named("tiny");
  settings.refusals.kind = emulator::Refuses::kCooperativeClusters;
  emulator::configure(settings);
  const auto launch_nothing = [](int cluster, bool cooperative) {
    return launch(do_nothing, shape(4, 1, 0, cluster, cooperative));
  };
  check_equal(launch_nothing(2, true), kGangRefused + emulator::kInvalidValue, "both");
  check_equal(launch_nothing(2, false), 0, "clusters");
  check_equal(launch_nothing(1, true), 0, "a cooperative grid");

  settings.refusals.kind = emulator::Refuses::kGangsInCapture;
  emulator::configure(settings);
  check_equal(launch_nothing(1, false), 0, "before the refusal");
  check(is_gang_refused(launch_nothing(2, false)), "a gang");
  check_equal(launch_nothing(1, false), emulator::kCaptureEnded, "after the refusal");
  emulator::configure({});
  check_equal(launch_nothing(1, false), 0, "after the capture");

  settings.refusals = {};
  settings.device.cooperative_clusters = false;
  emulator::configure(settings);
  const std::string defect = thrown_by([&] { launch_nothing(2, true); });
  check(defect.find("cooperative with clusters") != std::string::npos, "against the facts: a defect");
}

// ---- mutants ----

// Sums over a cluster through remote shared memory.
FASTNORM_KERNEL(128, 1) cluster_sums(bool with_first, bool with_last, float* out) {
  float* mine = shared_floats();
  if (thread_index() == 0) *mine = static_cast<float>(block_index() + 1);  // LINE cluster_barrier_before
  if (with_first) sync_cluster();
  if (cluster_rank() == 0) {
    float sum = 0;
    for (int rank = 0; rank < cluster_size(); ++rank) sum += *cluster_shared(mine, rank);  // LINE cluster_barrier_after
    out[global_index()] = sum;
  }
  if (with_last) sync_cluster();
}
Output cluster_output(bool with_first, bool with_last) {
  Output out = zeros();
  launch(cluster_sums, LaunchConfig{kBlocks, kThreads, 16, nullptr, 4}, with_first, with_last, out.data());
  return out;
}
Output cluster_barrier_before(bool broken) { return cluster_output(!broken, true); }
Output cluster_barrier_after(bool broken) { return cluster_output(true, !broken); }

FASTNORM_KERNEL(128, 1) grid_sums(bool with_barrier, float* partials, float* out) {
  if (thread_index() == 0) partials[block_index()] = static_cast<float>(block_index() + 1);  // LINE grid_barrier
  if (with_barrier) sync_grid();
  float sum = 0;
  for (int64_t block = 0; block < grid_blocks(); ++block) sum += partials[block];
  out[global_index()] = sum;
}
Output grid_output(bool with_barrier, bool cooperative) {
  Output out = zeros(), partials = zeros(kBlocks);
  launch(grid_sums, LaunchConfig{kBlocks, kThreads, 0, nullptr, 1, cooperative}, with_barrier, partials.data(),
         out.data());
  return out;
}
Output grid_barrier(bool broken) { return grid_output(!broken, true); }
Output grid_not_cooperative(bool broken) { return grid_output(true, !broken); }

// Waves of an exchange: every block publishes a number and adds up those of all blocks. With two places, for even and
// odd waves, one barrier per wave is enough: between a read of a place and the next write to it lies a barrier.
FASTNORM_KERNEL(128, 1) exchange_waves(bool in_cluster, int places, float* partials, float* out) {
  float* mine = shared_floats();
  float sum = 0;
  for (int wave = 0; wave < 4; ++wave) {
    const int place = wave % places;
    const auto of_block = [&](int block) {
      return in_cluster ? cluster_shared(mine + place, block) : partials + place * grid_blocks() + block;
    };
    const int block = static_cast<int>(block_index());
    if (thread_index() == 0) *of_block(block) = static_cast<float>((block + 1) * (wave + 1));
    in_cluster ? sync_cluster() : sync_grid();
    for (int peer = 0; peer < kBlocks; ++peer) sum += *of_block(peer);  // LINE one_place
  }
  out[global_index()] = sum;
  if (in_cluster) sync_cluster();
}
Output exchange_output(bool in_cluster, int places) {
  Output out = zeros(), partials = zeros(2 * kBlocks);
  launch(exchange_waves, shape(kBlocks, kThreads, 16, in_cluster ? kBlocks : 1, !in_cluster), in_cluster, places,
         partials.data(), out.data());
  return out;
}
Output cluster_in_one_place(bool broken) { return exchange_output(true, broken ? 1 : 2); }
Output grid_in_one_place(bool broken) { return exchange_output(false, broken ? 1 : 2); }

// More blocks than the device holds at a time would wait for each other for ever.
Output too_many_to_meet(bool broken) {
  emulator::Settings settings = emulator::settings();
  settings.device = emulator::device_named("tiny");
  emulator::configure(settings);
  const int64_t blocks = broken ? 9 : 8;
  Output out = zeros(blocks * kThreads), partials = zeros(blocks);
  launch(grid_sums, shape(blocks, kThreads, 7 << 10, 1, true), true, partials.data(), out.data());
  return out;
}

}  // namespace

std::vector<Primitive> gang_primitives() {
  return {{"clusters_of_a_grid", clusters_of_a_grid},
          {"grid_of_a_whole_device", grid_of_a_whole_device},
          {"refused_gangs", refused_gangs},
          {"refused_combinations", refused_combinations}};
}

std::vector<Mutant> gang_mutants() {
  return {
      {"cluster_barrier_before", cluster_barrier_before},
      {"cluster_barrier_after", cluster_barrier_after},
      {"grid_barrier", grid_barrier},
      {"grid_not_cooperative", grid_not_cooperative},
      {"cluster_in_one_place", cluster_in_one_place},
      {"grid_in_one_place", grid_in_one_place},
      {"too_many_to_meet", too_many_to_meet},
  };
}

}  // namespace fastnorm::self_test
