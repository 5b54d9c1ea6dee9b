// Runs launches of kernels on one CPU thread. Every CUDA thread is a fiber that runs until it waits at a barrier; the
// scheduler picks the next. One block runs at a time, or the blocks of a cluster together, or those of a cooperative
// grid. A thread gets a stack only when it starts, and threads that never wait follow one another on the same stack:
// kernels without barriers cost no switch at all. A library or program has one emulator, and one launch at a time.
#include <numeric>

#include "cuda/platform.cuh"
#include "launch_check.h"
#include "report.h"
#include "state.h"

namespace fastnorm::emulator {

GridView grid;
ThreadView* current;
Traffic traffic;
std::unique_ptr<L2Model> l2;

namespace {

void fiber_entry();

Machine& machine() {
  static Machine& machine = *new Machine{};  // never destroyed: kernels may run while a process ends
  return machine;
}

// fail() throws this through the kernel.
struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

Thread* running_thread() { return static_cast<Thread*>(current); }

void Machine::make_fibers(size_t count) {
  while (fibers.size() < count) {
    fibers.push_back(std::make_unique<Fiber>(static_cast<int>(fibers.size()), fiber_entry));
    idle.push_back(fibers.back().get());
  }
}

// To ThreadSanitizer a fiber is a thread: there every slot has its own.
Fiber* Machine::fiber_for(int slot) {
  if (kThreadSanitizer) return fibers[static_cast<size_t>(slot)].get();
  if (idle.empty()) make_fibers(fibers.size() + 1);
  Fiber* fiber = idle.back();
  idle.pop_back();
  return fiber;
}

void Machine::resume(Thread* thread, Context& from) {
  if (thread->fiber == nullptr) thread->fiber = fiber_for(thread->slot);
  current = thread;
  switch_context(from, *thread->fiber);
}

// ---- the work of a fiber ----

void return_from_kernel(Machine& m) {
  Thread* self = running_thread();
  Block& block = *self->home;
  self->batches.clear();
  if (!self->copies.empty() && !m.wait_left_out) {
    fail("returned with copies to shared memory under way, " + std::to_string(self->copies.size()) + " of them");
  }
  release(m.leave_token);
  release(block.exit_token);
  if (block.running == 1) {
    acquire(block.exit_token);
    if (const int64_t at = block.arena->overrun(); at >= 0) {
      throw Failure("block " + std::to_string(block.index) + " wrote at byte " + std::to_string(at) + " of its " +
                    std::to_string(block.arena->bytes()) + " bytes of shared memory");
    }
    if (grid.cluster > 1) block.arena->block_left();
  }
  --block.running;
  --m.running;
  self->done = true;
  self->fiber = nullptr;
}

void run_thread(Machine& m) {
  acquire(m.enter_token);
  try {
    m.body(m.context);
    return_from_kernel(m);
    return;
  } catch (const Failure& failure) {
    const Unseen unseen;
    m.failure = failure.what();
  } catch (const std::exception& error) {
    const Unseen unseen;
    m.failure = std::string("the kernel threw: ") + error.what() + ", in " + text_of(*running_thread());
  }
  m.leave(*running_thread()->fiber);
}

Thread* next_thread(Machine& m) {
  const Unseen unseen;
  return m.scheduler.pick();
}

// Runs one thread after the other, for ever.
void fiber_entry() {
  Machine& m = machine();
  Fiber* self = running_thread()->fiber;
  self->arrive();
  for (;;) {
    run_thread(m);
    Thread* next = next_thread(m);
    if (!kThreadSanitizer && next != nullptr && next->fiber == nullptr) {
      next->fiber = self;
      current = next;
      continue;
    }
    if (!kThreadSanitizer) m.idle.push_back(self);
    next != nullptr ? m.resume(next, *self) : m.leave(*self);
  }
}

// One more thread waits. Returns the thread that runs next, null where none can.
Thread* join(Barrier& barrier, Thread* self, Wait wait, Site site, char* token) {
  const Unseen unseen;
  Machine& m = machine();
  self->wait = wait;
  self->site = site;
  if (barrier.arrived > 0) {
    const Thread& first = *barrier.waiting.first;
    if (first.wait != wait || !same_site(first.site, site)) {
      fail("divergent barrier: at " + text_of(wait, site) + " while " + text_of(first) + " waits at " +
           text_of(first.wait, first.site));
    }
  }
  if (wait != Wait::kShuffle) release(token);  // a shuffle orders no memory
  barrier.waiting.append(self);
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.passed;
    if (wait == Wait::kBlock) m.scheduler.before_block_wakes(*self->home, grid.threads);
    m.scheduler.wake(barrier.waiting);
  }
  return m.scheduler.pick();
}

// The running thread waits until all have arrived.
void arrive(Barrier& barrier, Wait wait, Site site) {
  Thread* self = running_thread();
  char* token = barrier.tokens + (barrier.passed & 1);
  Thread* next = join(barrier, self, wait, site, token);
  if (next == nullptr) {
    machine().leave(*self->fiber);  // which reports the deadlock
  } else if (next != self) {
    machine().resume(next, *self->fiber);
  }
  if (wait != Wait::kShuffle) acquire(token);
}

bool left_out(Site site, int pending = -1) {
  return machine().settings.leaves_out(site.file_name(), site.line(), pending);
}

// ---- a launch ----

// A fresh address as a name for ThreadSanitizer. An old one would order new events after those it named before.
char* fresh_tokens() {
  static char ring[1 << 14];
  static size_t used = 0;
  used = (used + 2) % sizeof ring;
  return ring + used;
}

}  // namespace

void Barrier::reset(int threads) { *this = {threads, 0, 0, {}, fresh_tokens()}; }

namespace {

// Threads, warps and blocks find each other; done once a launch.
void Machine::arrange(const cuda::LaunchConfig& config, int blocks_together) {
  const int block_warps = (config.threads + kWarp - 1) / kWarp;
  blocks.resize(static_cast<size_t>(blocks_together));
  clusters.resize(static_cast<size_t>(blocks_together / config.cluster));
  threads.resize(static_cast<size_t>(blocks_together) * static_cast<size_t>(config.threads));
  warps.resize(static_cast<size_t>(blocks_together) * static_cast<size_t>(block_warps));
  while (arenas.size() < blocks.size()) arenas.push_back(std::make_unique<SharedArena>());
  for (size_t b = 0; b < blocks.size(); ++b) {
    Block& block = blocks[b];
    Cluster& cluster = clusters[b / static_cast<size_t>(config.cluster)];
    block.cluster_rank = static_cast<int>(b) % config.cluster;
    if (block.cluster_rank == 0) cluster.blocks = &block;
    block.cluster = &cluster;
    block.arena = arenas[b].get();
    block.shared = block.arena->base();
    block.threads = &threads[b * static_cast<size_t>(config.threads)];
    block.warps = &warps[b * static_cast<size_t>(block_warps)];
    for (int w = 0; w < block_warps; ++w) block.warps[w].lanes = std::min(kWarp, config.threads - w * kWarp);
    for (int t = 0; t < config.threads; ++t) {
      Thread& thread = block.threads[t];
      thread.index = t;
      thread.block = thread.home = &block;
      thread.warp = block.warps + t / kWarp;
      thread.lane = t % kWarp;
      thread.slot = static_cast<int>(b) * config.threads + t;
      thread.fiber = nullptr;
    }
  }
}

void Machine::begin_blocks(const cuda::LaunchConfig& config, int64_t first_block) {
  for (size_t b = 0; b < blocks.size(); ++b) {
    blocks[b].index = first_block + static_cast<int64_t>(b);
    blocks[b].arena->begin_block(config.shared_bytes);
    blocks[b].barrier.reset(config.threads);
    blocks[b].running = config.threads;
    blocks[b].exit_token = fresh_tokens();
  }
  for (Cluster& cluster : clusters) cluster.barrier.reset(config.cluster * config.threads);
  grid_barrier.reset(static_cast<int>(threads.size()));
  blocks_barriers.clear();
  for (Warp& warp : warps) warp.barrier.reset(warp.lanes);
  for (Thread& thread : threads) {
    thread.done = false;
    thread.copies.clear();
    thread.batches.clear();
  }
  running = static_cast<int>(threads.size());
}

void Machine::run_together(const cuda::LaunchConfig& config, int64_t first_block) {
  begin_blocks(config, first_block);
  if (kThreadSanitizer)
    make_fibers(threads.size());  // here, because ThreadSanitizer orders a thread after its creation
  scheduler.begin(blocks, config.threads);
  resume(scheduler.pick(), launcher);
  if (failure.empty() && running > 0) failure = deadlock_report(threads);
  if (failure.empty()) return;
  idle.clear();
  for (auto& fiber : fibers) {
    fiber->restart(launcher, leave_token);
    idle.push_back(fiber.get());
  }
  std::string text;
  text.swap(failure);
  throw std::runtime_error("emulator: " + text);
}

void Machine::run(const cuda::LaunchConfig& config) {
  random.seed(settings.seed * 0x9e3779b97f4a7c15u + launches++);
  scheduler = Scheduler(settings.order, random);
  wait_left_out = false;
  launcher.tsan_thread = tsan_current();
  enter_token = fresh_tokens();
  leave_token = fresh_tokens();
  release(enter_token);

  // Sets of blocks that run together. All have the same size except the last.
  const int64_t wanted = config.cooperative ? config.blocks : std::max(settings.blocks_together, config.cluster);
  const int64_t together = std::min(config.blocks, wanted / config.cluster * config.cluster);
  if (together * config.threads > kMostThreads) {
    throw std::runtime_error("emulator: " + std::to_string(together) + " blocks of " + std::to_string(config.threads) +
                             " threads would run together; " + std::to_string(kMostThreads) + " threads can");
  }
  const int64_t sets = (config.blocks + together - 1) / together;
  // A random order of sets without a list of them: steps of a number that shares no factor with the number of sets.
  int64_t first = 0, step = 1;
  if (settings.order == Order::kLifo) {
    first = sets - 1, step = sets > 1 ? sets - 1 : 1;
  } else if (settings.order != Order::kFifo) {
    const int bound = static_cast<int>(sets);
    first = random.below(bound);
    do step = 1 + random.below(bound);
    while (std::gcd(step, sets) != 1);
  }
  int arranged = 0;
  for (int64_t i = 0, set = first; i < sets; ++i, set = (set + step) % sets) {
    const int here = static_cast<int>(std::min(together, config.blocks - set * together));
    if (here != arranged) arrange(config, arranged = here);
    run_together(config, set * together);
  }
  acquire(leave_token);
}

}  // namespace

// ---- runtime.h ----

void sync_block(Site site) {
  if (!left_out(site)) arrive(running_thread()->home->barrier, Wait::kBlock, site);
}
void sync_warp(Site site) {
  if (!left_out(site)) arrive(running_thread()->warp->barrier, Wait::kWarp, site);
}
void sync_cluster(Site site) {
  if (!left_out(site)) arrive(running_thread()->home->cluster->barrier, Wait::kCluster, site);
}
void sync_grid(Site site) {
  if (!machine().cooperative) fail("sync_grid in a launch that is not cooperative");
  if (!left_out(site)) arrive(machine().grid_barrier, Wait::kGrid, site);
}

void sync_blocks(const unsigned* arrivals, int blocks, Site site) {
  if (!machine().cooperative) fail("sync_blocks in a launch that is not cooperative");
  if (*arrivals != 0) fail("sync_blocks by a counter that does not begin with 0");
  const auto [at, is_new] = machine().blocks_barriers.try_emplace(arrivals);
  if (is_new) at->second.reset(blocks * running_thread()->home->barrier.expected);
  if (!left_out(site)) arrive(at->second, Wait::kBlocks, site);
}

bool begin_copy(void (*land)(void*, const void*), void* place, const void* from, int bytes) {
  const Unseen unseen;
  const Block& block = *running_thread()->home;
  const int64_t offset = static_cast<unsigned char*>(place) - block.shared;
  if (offset < 0 || offset + bytes > block.arena->bytes()) fail("copy_async to what is not the block's shared memory");
  const bool at_once = machine().scheduler.copies_at_once();
  current->copies.push_back({land, place, from, at_once});
  return at_once;
}
bool waits_here(Site site, int pending) {
  if (!left_out(site, pending)) return true;
  machine().wait_left_out = true;
  return false;
}

Parcel* outgoing() {
  const Thread* self = running_thread();
  return &self->warp->parcels[self->warp->barrier.passed & 1][self->lane];
}
const Parcel* exchange(int from, Site site) {
  Warp& warp = *running_thread()->warp;
  if (warp.lanes != kWarp) fail("shuffle in a warp of " + std::to_string(warp.lanes) + " threads");
  if (from < 0 || from >= kWarp) fail("shuffle with lane " + std::to_string(from));
  const Parcel* parcels = warp.parcels[warp.barrier.passed & 1];
  arrive(warp.barrier, Wait::kShuffle, site);
  return parcels + from;
}

void* remote_shared(void* place, int rank) {
  const Block& block = *running_thread()->home;
  const int64_t offset = static_cast<unsigned char*>(place) - block.shared;
  if (rank < 0 || rank >= grid.cluster) fail("cluster_shared with rank " + std::to_string(rank) + "");
  if (offset < 0 || offset >= block.arena->bytes()) fail("cluster_shared of what is not the block's shared memory");
  return block.cluster->blocks[rank].shared + offset;
}

void fail(const std::string& text) {
  if (current == nullptr) throw std::runtime_error("emulator: " + text);
  throw Failure(text + ", in " + text_of(*running_thread()));
}

int launch(const cuda::LaunchConfig& config, void (*body)(void*), void* context) {
  Machine& m = machine();
  const std::lock_guard<std::mutex> lock(m.one_launch);
  const Unseen unseen;
  check_launch(config, m.settings.device);
  if (const int error = answer_of(m.settings.refusals, config)) return error;
  grid = {config.blocks, config.threads, config.cluster};
  m.body = body;
  m.context = context;
  m.cooperative = config.cooperative;
  const Traffic before = traffic;
  const uint64_t missed = l2 ? l2->missed() : 0;
  m.run(config);
  m.log.push_back({config.blocks, config.threads, config.shared_bytes, config.cluster, config.cooperative,
                   traffic - before, l2 ? l2->missed() - missed : 0});
  return 0;
}

void configure(const Settings& settings) {
  Machine& m = machine();
  const std::lock_guard<std::mutex> lock(m.one_launch);
  if (settings.device.shared_per_block > SharedArena::kLargest) {
    throw std::runtime_error("emulator: a block has at most " + std::to_string(SharedArena::kLargest) +
                             " bytes of shared memory");
  }
  if (settings.blocks_together < 1) throw std::runtime_error("emulator: at least one block runs");
  m.settings = settings;
  m.launches = 0;
}
const Settings& settings() { return machine().settings; }

int64_t launch_count() { return static_cast<int64_t>(machine().log.size()); }
const LaunchRecord& launch_record(int64_t number) { return machine().log.at(static_cast<size_t>(number)); }
void reset_counters() {
  Machine& m = machine();
  const std::lock_guard<std::mutex> lock(m.one_launch);
  m.log.clear();
  traffic = {};
}

}  // namespace fastnorm::emulator
