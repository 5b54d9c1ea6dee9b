// Each primitive of platform.cuh against a table of its right results.
#include <algorithm>
#include <array>
#include <cmath>
#include <memory>

#include "self_test.h"

namespace fastnorm::self_test {
namespace {

using namespace fastnorm::cuda;

// ---- indices ----

FASTNORM_KERNEL(1024, 1) visit(int* visits, int64_t blocks, int threads) {
  check(grid_blocks() == blocks && block_threads() == threads, "the launch's shape");
  ++visits[block_index() * threads + thread_index()];
}

void indices() {
  under_all_orders([] {
    for (const int threads : {1, 31, 32, 33, 256, 1024}) {
      if (kSlow && threads > 256) continue;
      for (const int64_t blocks : {1, 2, 7}) {
        std::vector<int> visits(static_cast<size_t>(blocks * threads));
        check_equal(launch(visit, shape(blocks, threads), visits.data(), blocks, threads), 0, "launch");
        for (const int count : visits) check_equal(count, 1, "visits of a thread");
      }
    }
  });
}

// ---- shuffles ----

template <int kWords>
struct Words {
  uint32_t word[kWords];
};
// A value that tells warp, lane, word and round apart.
uint32_t mark(int thread, int word, int round) {
  return static_cast<uint32_t>(thread * 1000003 + word * 7919 + round * 104729);
}

template <int kWords>
FASTNORM_KERNEL(128, 1)
shuffle_all() {
  const int thread = thread_index(), lane = thread % kWarp, warp = thread - lane;
  for (int round = 0; round < kWarp; ++round) {
    Words<kWords> mine;
    for (int w = 0; w < kWords; ++w) mine.word[w] = mark(thread, w, round);
    const Words<kWords> other = shuffle_xor(mine, round), same = shuffle(mine, round);
    const Words<kWords> turned = shuffle(mine, (lane + round) % kWarp);
    for (int w = 0; w < kWords; ++w) {
      check_equal(other.word[w], mark(warp + (lane ^ round), w, round), "shuffle_xor");
      check_equal(same.word[w], mark(warp + round, w, round), "shuffle, one lane for all");
      check_equal(turned.word[w], mark(warp + (lane + round) % kWarp, w, round), "shuffle, a lane for each");
    }
  }
}

void shuffles() {
  under_all_orders([] {
    launch(shuffle_all<1>, shape(2, 96));
    launch(shuffle_all<2>, shape(1, 64));
    launch(shuffle_all<3>, shape(1, 64));
    launch(shuffle_all<4>, shape(1, 64));
    launch(shuffle_all<5>, shape(1, 64));
    launch(shuffle_all<6>, shape(1, 64));
    launch(shuffle_all<7>, shape(1, 64));
    launch(shuffle_all<8>, shape(1, 64));
  });
}

// ---- barriers: no thread is a phase ahead ----

enum class Scope { kWarp, kBlock, kCluster, kGrid };

// `phases`: how many barriers each thread of the launch has passed, published before a barrier and read after it.
FASTNORM_KERNEL(256, 1) march(Scope scope, int* phases, int team, int rounds) {
  const int64_t me = block_index() * block_threads() + thread_index(), first = me / team * team;
  for (int round = 1; round <= rounds; ++round) {
    phases[me] = round;
    const auto meet = [&] {
      switch (scope) {
        case Scope::kWarp: return sync_warp();
        case Scope::kBlock: return sync_block();
        case Scope::kCluster: return sync_cluster();
        case Scope::kGrid: return sync_grid();
      }
    };
    meet();
    for (int64_t peer = first; peer < first + team; ++peer) check_equal(phases[peer], round, "phase of a peer");
    meet();
  }
}

void barriers() {
  under_all_orders([] {
    std::vector<int> phases(32 * 32);
    const auto run = [&](Scope scope, const LaunchConfig& config, int team) {
      std::fill(phases.begin(), phases.end(), 0);
      launch(march, config, scope, phases.data(), team, 3);
    };
    run(Scope::kWarp, shape(2, 64), 32);
    run(Scope::kWarp, shape(2, 16), 16);
    run(Scope::kBlock, shape(3, 48), 48);
    run(Scope::kBlock, shape(2, 1), 1);
    for (const int cluster : {1, 2, 5, 8, 16}) {
      run(Scope::kCluster, shape(2 * cluster, 32, 0, cluster), 32 * cluster);
    }
    run(Scope::kGrid, shape(8, 32, 0, 1, true), 8 * 32);
    run(Scope::kGrid, shape(8, 32, 0, 4, true), 8 * 32);
  });
}

// ---- shared memory ----

FASTNORM_KERNEL(64, 1) fill_shared(int64_t bytes) {
  unsigned char* shared = shared_memory();
  check(reinterpret_cast<uintptr_t>(shared) % 16 == 0, "shared memory is aligned");
  for (int64_t i = thread_index(); i < bytes; i += block_threads()) check_equal(shared[i], 0xff, "a first byte");
  sync_block();
  const int own = static_cast<int>(block_index() % 200);
  for (int64_t i = thread_index(); i < bytes; i += block_threads()) {
    shared[i] = static_cast<unsigned char>(own + i % 50);
  }
  sync_block();
  for (int64_t i = block_threads() - 1 - thread_index(); i < bytes; i += block_threads()) {
    check_equal(shared[i], own + i % 50, "a byte another thread wrote");
  }
}

void shared() {
  under_all_orders([] {
    for (const int64_t bytes : {0, 1, 16, 100, 4096, 227 << 10}) launch(fill_shared, shape(3, 64, bytes), bytes);
  });
}

// ---- clusters ----

FASTNORM_KERNEL(32, 1) pass_round(int cluster, int* seen) {
  const int rank = cluster_rank();
  check_equal(cluster_size(), cluster, "cluster_size");
  check_equal(rank, block_index() % cluster, "cluster_rank");
  int* mine = shared_ints();
  mine[thread_index()] = static_cast<int>(block_index()) * 100 + thread_index();
  sync_cluster();
  for (int peer = 0; peer < cluster; ++peer) {
    const int block = static_cast<int>(block_index()) - rank + peer;
    check_equal(cluster_shared(mine, peer)[thread_index()], block * 100 + thread_index(), "what a peer wrote");
    check_equal(*cluster_shared(mine + 5, peer), block * 100 + 5, "what a peer wrote, further on");
  }
  check(cluster_shared(mine, rank) == mine, "its own is at its own address");
  sync_cluster();
  if (thread_index() == 31) *cluster_shared(mine, (rank + 1) % cluster) = rank;
  sync_cluster();
  if (thread_index() == 0) seen[block_index()] = mine[0];
}

void clusters() {
  under_all_orders([] {
    for (const int cluster : {1, 2, 5, 8, 16}) {
      std::vector<int> seen(static_cast<size_t>(3 * cluster));
      launch(pass_round, shape(3 * cluster, 32, 128, cluster), cluster, seen.data());
      for (int block = 0; block < 3 * cluster; ++block) {
        check_equal(seen[static_cast<size_t>(block)], (block + cluster - 1) % cluster, "written by the neighbour");
      }
    }
  });
}

// ---- order of threads ----

struct Log {
  std::vector<int> entries = std::vector<int>(1000);
  int count = 0;
  // A race by intent.
  FASTNORM_UNSEEN void add(int* place, int entry) { place[count++] = entry; }
};

FASTNORM_KERNEL(64, 1) log_order(Log* log, int* place) {
  const int me = static_cast<int>(block_index()) * 1000 + thread_index();
  log->add(place, me);
  sync_block();
  log->add(place, me);
}

std::vector<int> order_under(emulator::Order order, uint64_t seed, int blocks_together = 1) {
  emulator::Settings settings;
  settings.order = order;
  settings.seed = seed;
  settings.blocks_together = blocks_together;
  emulator::configure(settings);
  Log log;
  launch(log_order, shape(3, 64), &log, log.entries.data());
  launch(log_order, shape(2, 64), &log, log.entries.data());
  log.entries.resize(static_cast<size_t>(log.count));
  return log.entries;
}

void orders() {
  using emulator::Order;
  std::vector<int> ascending;
  for (const int blocks : {3, 2}) {
    for (int block = 0; block < blocks; ++block) {
      for (int twice = 0; twice < 2; ++twice) {
        for (int thread = 0; thread < 64; ++thread) ascending.push_back(block * 1000 + thread);
      }
    }
  }
  check(order_under(Order::kFifo, 0) == ascending, "fifo is ascending");
  check_equal(order_under(Order::kLifo, 0)[0], 2063, "lifo begins at the end");
  for (const Order order : {Order::kRandom, Order::kPriority}) {
    std::vector<std::vector<int>> logs;
    for (uint64_t seed = 0; seed < 5; ++seed) {
      logs.push_back(order_under(order, seed));
      check(order_under(order, seed) == logs.back(), "the same seed gives the same order");
      check(logs.back() != ascending, "no order at all");
      std::vector<int> sorted = logs.back(), expected = ascending;
      std::sort(sorted.begin(), sorted.end());
      std::sort(expected.begin(), expected.end());
      check(sorted == expected, "every thread runs once");
    }
    for (size_t i = 1; i < logs.size(); ++i) check(logs[i] != logs[i - 1], "another seed gives another order");
  }
  const std::vector<int> mixed = order_under(Order::kRandom, 0, 3);
  check(mixed[0] / 1000 != mixed[1] / 1000 || mixed[0] / 1000 != mixed[2] / 1000, "blocks run side by side");
}

// ---- traffic, launches, device ----

FASTNORM_KERNEL(32, 1) access(const unsigned char* p) {
  note_read(p, 16, Access::kStream);
  note_read(p + 2, 2, Access::kParameter);
  note_read(p + 3, 0, Access::kStream);
  note_write(p + 8, 8, Access::kStream);
  note_write(p + 4, 12, Access::kParameter);  // three words
}

void counters() {
  emulator::configure({});
  emulator::reset_counters();
  alignas(16) const unsigned char bytes[16] = {};
  launch(access, shape(2, 32), bytes);
  launch(access, shape(4, 32, 64, 2), bytes);
  check_equal(emulator::launch_count(), 2, "launches");
  for (const int64_t number : {0, 1}) {
    const emulator::LaunchRecord& record = emulator::launch_record(number);
    const uint64_t threads = number == 0 ? 64 : 128;
    check_equal(record.blocks, number == 0 ? 2 : 4, "blocks");
    check_equal(record.threads, 32, "threads");
    check_equal(record.shared_bytes, number == 0 ? 0 : 64, "shared_bytes");
    check_equal(record.cluster, number == 0 ? 1 : 2, "cluster");
    check_equal(record.traffic.read[0], 16 * threads, "stream read");
    check_equal(record.traffic.read[1], 2 * threads, "parameter read");
    check_equal(record.traffic.written[0], 8 * threads, "stream written");
    check_equal(record.traffic.written[1], 12 * threads, "parameter written");
  }
  check_equal(emulator::traffic.read[0], 16 * 192, "all of it");
  emulator::reset_counters();
  check_equal(emulator::traffic.read[0] + emulator::traffic.written[0], 0, "after a reset");
  check_equal(emulator::launch_count(), 0, "launches after a reset");
}

void devices() {
  for (const char* name : {"tiny", "few", "alone", "small", "wide", "h200"}) {
    emulator::Settings settings;
    settings.device = emulator::device_named(name);
    emulator::configure(settings);
    DeviceInfo info{};
    check_equal(query_device(0, nullptr, &info), 0, "query_device");
    check_equal(info.num_sms, settings.device.num_sms, "num_sms");
    check_equal(info.shared_per_block, settings.device.shared_per_block, "shared_per_block");
    check(info.shared_per_block <= info.shared_per_sm && info.l2_bytes > 0, "facts that fit together");
    check(info.bytes_per_us > 0, "facts that fit together");
    check(info.largest_cluster == 1 ? info.cluster_sms == 0 : info.cluster_sms % info.largest_cluster == 0,
          "clusters that fit together");
    check(!info.cooperative_clusters || (info.cooperative && info.largest_cluster > 1), "both kinds of gangs");
  }
}

// ---- launches that are refused ----

FASTNORM_KERNEL(1024, 1) nothing() {}

void refusals() {
  emulator::configure({});
  const std::vector<std::pair<LaunchConfig, std::string>> table = {
      {shape(1, 0), "0 threads"},
      {shape(1, 1025), "1025 threads"},
      {shape(0, 32), "0 blocks"},
      {shape(int64_t{1} << 31, 32), "2147483648 blocks"},
      {shape(1, 32, (227 << 10) + 1), "shared memory"},
      {shape(1, 32, -1), "shared memory"},
      {shape(3, 32, 0, 2), "clusters of 2"},
      {shape(17, 32, 0, 17), "at most 16"},
      {shape(2 * 132 + 1, 1024, 0, 1, true), "264 are resident"},
      {shape(133, 32, 200 << 10, 1, true), "132 are resident"},
      {shape(144, 32, 200 << 10, 16, true), "128 are resident"},
      {shape(130, 32, 200 << 10, 5, true), "120 are resident"},  // three in the place of sixteen SMs
      {shape(272, 32, 100 << 10, 16, true), "256 are resident"},
  };
  for (const auto& [config, part] : table) {
    const std::string text = thrown_by([&, &config = config] { launch(nothing, config); });
    check(text.find(part) != std::string::npos, "expected '" + part + "' in '" + text + "'");
  }
  emulator::Settings settings;
  settings.device = emulator::device_named("small");
  emulator::configure(settings);
  const std::string text = thrown_by([&] { launch(nothing, shape(4, 32, 0, 2)); });
  check(text.find("at most 1") != std::string::npos, "no clusters below sm_90: '" + text + "'");
  settings.device.cooperative = false;
  emulator::configure(settings);
  check(thrown_by([&] { launch(nothing, shape(1, 32, 0, 1, true)); }).find("without cooperative launches") !=
            std::string::npos,
        "no cooperative launches");
  check(thrown_by([] { emulator::device_named("huge"); }).find("huge") != std::string::npos, "no such device");
  check(thrown_by([] { emulator::order_named("best"); }).find("best") != std::string::npos, "no such order");
}

// ---- after a failure ----

FASTNORM_KERNEL(64, 1) part_ways(bool throws) {
  if (throws && thread_index() == 40) throw std::runtime_error("out of luck");
  if (thread_index() < 50) sync_block();
}

void recovery() {
  under_all_orders([] {
    for (int times = 0; times < (kSlow ? 1 : 3); ++times) {
      check(thrown_by([] { launch(part_ways, shape(2, 64), false); }).find("deadlock") != std::string::npos,
            "deadlock");
      const std::string text = thrown_by([] { launch(part_ways, shape(2, 64), true); });
      check(text.find("out of luck") != std::string::npos && text.find("thread 40") != std::string::npos, text);
      launch(fill_shared, shape(2, 64, 100), int64_t{100});
    }
  });
}

// By value, by reference to a pointer, with conversions: as a CUDA launch takes them.
struct Large {
  std::array<double, 40> values;
};
FASTNORM_KERNEL(32, 1) take(Large large, int64_t i, const float* in, float* out) {
  large.values[static_cast<size_t>(thread_index())] += 1;  // a thread's own copy
  if (thread_index() == 0) *out = static_cast<float>(large.values[static_cast<size_t>(i)]) + *in;
}

void arguments() {
  under_all_orders([] {
    Large large{};
    for (size_t i = 0; i < large.values.size(); ++i) large.values[i] = static_cast<double>(i);
    float in = 0.5f, out = 0;
    launch(take, shape(1, 32), large, 7, &in, &out);
    check_equal(out, 7.5f, "sum of the arguments");
    check_equal(large.values[0], 0.0, "the caller's copy");
  });
}

}  // namespace

std::vector<Primitive> primitives() {
  return {
      {"indices", indices},   {"shuffles", shuffles}, {"barriers", barriers},   {"shared", shared},
      {"clusters", clusters}, {"orders", orders},     {"counters", counters},   {"devices", devices},
      {"refusals", refusals}, {"recovery", recovery}, {"arguments", arguments},
  };
}

}  // namespace fastnorm::self_test
