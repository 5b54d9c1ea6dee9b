#include "machine.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <numeric>

namespace fastnorm::ptx {

namespace {

constexpr int kMostInstructions = 2000;  // that a warp runs before another may
constexpr int kUninitialized = 0xff;     // NaN

// "@%p1 ld.global.f32 %f1, [%rd1]" -> "ld.global.f32"
std::string opcode_of(const std::string& text) {
  std::string_view rest = text;
  if (rest.starts_with('@')) rest = trimmed(rest.substr(std::min(rest.find(' '), rest.size())));
  return std::string(rest.substr(0, rest.find(' ')));
}

}  // namespace

void Machine::run(const Kernel& kernel, const LaunchShape& shape, const unsigned char* parameters,
                  const Options& options) {
  if (shape.threads < 1 || shape.threads > kernel.most_threads) {
    throw Defect(std::to_string(shape.threads) + " threads a block: " + kernel.name + " is for " +
                 std::to_string(kernel.most_threads));
  }
  if (options.races && shape.blocks > Stamp::kMostBlocks)
    throw Defect("more blocks than the search for races can count");
  kernel_ = &kernel;
  shape_ = shape;
  parameters_ = parameters;
  options_ = options;
  random_.seed(options.seed);
  counts_.assign(kernel.code.size(), {});
  std::memset(grid_workspace_, 0, sizeof grid_workspace_);
  releases = {};
  global_shadow.clear();
  global_room.begin_launch(static_cast<uint32_t>(shape.cluster));
  memory = options.memory;
  memory.add(reinterpret_cast<uint64_t>(grid_workspace_), sizeof grid_workspace_);
  for (const auto& variable : kernel.variables) {
    memory.add(reinterpret_cast<uint64_t>(variable->data()), variable->size());
  }

  // Sets of blocks that run together, in a random order without a list of them: steps of a number that shares no factor
  // with the number of sets.
  const int64_t together = shape.cooperative ? shape.blocks : shape.cluster, sets = shape.blocks / together;
  int64_t set = 0, step = 1;
  if (options.order == emulator::Order::kLifo) {
    set = sets - 1, step = std::max<int64_t>(sets - 1, 1);
  } else if (options.order != emulator::Order::kFifo) {
    const auto drawn = [&] { return static_cast<int64_t>(random_() % static_cast<uint64_t>(sets)); };
    set = drawn();
    do step = 1 + drawn();
    while (std::gcd(step, sets) != 1);
  }
  for (int64_t i = 0; i < sets; ++i, set = (set + step) % sets) {
    begin_blocks(set * together, together);
    run_together();
  }
  add_counts();
}

void Machine::begin_blocks(int64_t first, int64_t count) {
  releases.forget_clocks();
  shared_room.begin_launch(static_cast<uint32_t>(shape_.cluster));
  while (static_cast<int64_t>(blocks_.size()) < count) blocks_.push_back(std::make_unique<Block>());
  clusters_.assign(static_cast<size_t>(count / shape_.cluster), {});
  ready_.clear();
  polls_ = 0;
  const auto shared = static_cast<size_t>((kernel_->static_shared_bytes + 15) / 16 * 16 + shape_.shared_bytes);
  const auto warps = static_cast<size_t>((shape_.threads + kLanes - 1) / kLanes);
  for (int64_t b = 0; b < count; ++b) {
    Block& block = *blocks_[static_cast<size_t>(b)];
    Cluster& cluster = clusters_[static_cast<size_t>(b / shape_.cluster)];
    cluster.blocks.push_back(&block);
    cluster.expected += shape_.threads;
    block.machine = this;
    block.index = first + b;
    block.cluster = &cluster;
    block.rank = static_cast<uint32_t>(b % shape_.cluster);
    block.threads = block.running = shape_.threads;
    block.shared.assign(shared, kUninitialized);
    block.shadow.assign(options_.races ? (shared + 3) / 4 : 0, {});
    block.arrived = 0;
    block.waited_phases = block.remote_phase = 0;
    block.remote_used = false;
    block.warps.resize(warps);
    for (size_t w = 0; w < warps; ++w) {
      Warp& warp = block.warps[w];
      warp.begin(block, static_cast<int>(w));
      warp.queued = false;
      warp.rank = static_cast<uint32_t>(random_() >> 34);  // below all that have waited in vain
      wake(warp);
    }
  }
}

void Machine::wake(Warp& warp) {
  if (warp.queued || !warp.can_run()) return;
  warp.queued = true;
  ready_.push_back(&warp);
}

// The place in ready_ of the warp that runs next.
size_t Machine::next_ready() {
  switch (options_.order) {
    case emulator::Order::kFifo: return 0;
    case emulator::Order::kLifo: return ready_.size() - 1;
    case emulator::Order::kRandom: return random_() % ready_.size();
    default: {
      const auto before = [](const Warp* a, const Warp* b) { return a->rank < b->rank; };
      return static_cast<size_t>(std::min_element(ready_.begin(), ready_.end(), before) - ready_.begin());
    }
  }
}

void Machine::run_together() {
  uint64_t polls_in_vain = 0;
  uint32_t last_rank = 1u << 30;
  while (!ready_.empty()) {
    const size_t place = next_ready();
    Warp& warp = *ready_[place];
    const uint64_t progress = progress_, polls = polls_;
    warp.run(1 + static_cast<int>(random_() % kMostInstructions));
    if (!warp.can_run()) {
      warp.queued = false;
      ready_.erase(ready_.begin() + static_cast<std::ptrdiff_t>(place));
    }
    if (polls == polls_) {
      polls_in_vain = 0;
      continue;
    }
    polls_in_vain = progress == progress_ ? polls_in_vain + 1 : 0;
    if (polls_in_vain > 200 * (ready_.size() + 1)) deadlock();
    if (!warp.queued) continue;
    // It polls: others first.
    warp.rank = last_rank++;
    ready_.erase(ready_.begin() + static_cast<std::ptrdiff_t>(place));
    ready_.insert(options_.order == emulator::Order::kLifo ? ready_.begin() : ready_.end(), &warp);
  }
  const auto left = [](const Cluster& cluster) {
    return std::all_of(cluster.blocks.begin(), cluster.blocks.end(), [](const Block* block) { return block->left(); });
  };
  if (!std::all_of(clusters_.begin(), clusters_.end(), left)) deadlock();
}

// One line for all lanes of a warp that wait at the same instruction.
void Machine::deadlock() const {
  constexpr int kLines = 20;
  std::string lines;
  int64_t running = 0, threads = 0;
  int count = 0;
  for (const Cluster& cluster : clusters_) {
    for (const Block* block : cluster.blocks) {
      running += block->running;
      threads += block->threads;
      for (const Warp& warp : block->warps) {
        for (const Warp::Waiting& waiting : warp.waiting()) {
          if (++count > kLines) continue;
          const int lane = std::countr_zero(waiting.group.lanes);
          lines += "\n  " + thread_name(block->index, warp.thread(lane)) + " and its like (" +
                   std::to_string(std::popcount(waiting.group.lanes)) + ") " + waiting.what + " at " +
                   kernel_->texts[kernel_->code[waiting.group.at].text];
        }
      }
    }
  }
  if (count > kLines) lines += "\n  and more";
  throw Defect("deadlock: of " + std::to_string(threads) + " threads " + std::to_string(threads - running) +
               " have returned and " + std::to_string(running) + " wait for ever, in " + kernel_->name + lines);
}

void Machine::add_counts() {
  auto& issued = counters_.issued[kernel_->name];
  issued.resize(counts_.size());
  for (size_t at = 0; at < counts_.size(); ++at) {
    std::string opcode = opcode_of(kernel_->texts[kernel_->code[at].text]);
    if (counts_[at].issued > 0) counters_.instructions[opcode] += counts_[at];
    issued[at] = {std::move(opcode), issued[at].second + counts_[at].issued};
  }
}

}  // namespace fastnorm::ptx
