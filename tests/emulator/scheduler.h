// The choice of the next thread.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "machine.h"

namespace fastnorm::emulator {

class Random {
 public:
  void seed(uint64_t seed) { state_ = seed; }
  uint64_t next() {  // splitmix64
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
  }
  int below(int bound) { return static_cast<int>((next() >> 32) * static_cast<uint64_t>(bound) >> 32); }
  void shuffle(std::vector<int>& values) {
    for (int i = static_cast<int>(values.size()); i > 1; --i) std::swap(values[i - 1], values[below(i)]);
  }

 private:
  uint64_t state_ = 0;
};

// A set of small numbers that finds its least in a few instructions.
class NumberSet {
 public:
  void resize(int bound) {
    words_.assign(static_cast<size_t>(bound + 63) / 64, 0);
    summary_.assign((words_.size() + 63) / 64, 0);
  }
  void insert(int number) {
    words_[number >> 6] |= uint64_t{1} << (number & 63);
    summary_[number >> 12] |= uint64_t{1} << (number >> 6 & 63);
  }
  int take_least() {  // -1 where there is none
    for (size_t i = 0; i < summary_.size(); ++i) {
      if (summary_[i] == 0) continue;
      const size_t word = i * 64 + static_cast<size_t>(__builtin_ctzll(summary_[i]));
      const int number = static_cast<int>(word * 64) + __builtin_ctzll(words_[word]);
      words_[word] &= words_[word] - 1;
      if (words_[word] == 0) summary_[i] &= summary_[i] - 1;
      return number;
    }
    return -1;
  }

 private:
  std::vector<uint64_t> words_, summary_;
};

// The threads that can run.
class Scheduler {
 public:
  Scheduler(Order order, Random& random) : order_(order), random_(&random) {}

  // All threads of `blocks` can run.
  void begin(std::vector<Block>& blocks, int block_threads) {
    const int threads = static_cast<int>(blocks.size()) * block_threads;
    switch (order_) {
      case Order::kFifo:
      case Order::kLifo:
        list_ = {};
        for (int i = 0; i < threads; ++i) {
          const int slot = order_ == Order::kFifo ? i : threads - 1 - i;
          list_.append(blocks[0].threads + slot);
        }
        break;
      case Order::kRandom:
        pool_.clear();
        pool_.reserve(static_cast<size_t>(threads));  // no allocation later, in a fiber
        for (int slot = 0; slot < threads; ++slot) pool_.push_back(blocks[0].threads + slot);
        break;
      case Order::kPriority:
        by_rank_.resize(static_cast<size_t>(threads));
        ready_ranks_.resize(threads);
        shuffled(blocks_, static_cast<int>(blocks.size()));
        for (int i = 0; i < static_cast<int>(blocks.size()); ++i) {
          Block& block = blocks[static_cast<size_t>(blocks_[i])];
          block.first_rank = i * block_threads;
          rank_threads(block, block_threads);
        }
        for (int rank = 0; rank < threads; ++rank) ready_ranks_.insert(rank);
        break;
    }
  }

  // All of `waiting` can run again, and the list is empty.
  void wake(ThreadList& waiting) {
    switch (order_) {
      case Order::kFifo: list_.append(waiting); break;
      case Order::kLifo: list_.prepend(waiting); break;
      case Order::kRandom:
        while (Thread* thread = waiting.take_first()) pool_.push_back(thread);
        break;
      case Order::kPriority:
        while (Thread* thread = waiting.take_first()) ready_ranks_.insert(thread->rank);
        break;
    }
  }

  // Call when all threads of the block are about to wake up: sometimes they get new ranks, so that a thread that was
  // early in one phase may be late in the next.
  void before_block_wakes(Block& block, int block_threads) {
    if (order_ == Order::kPriority && random_->below(4) == 0) rank_threads(block, block_threads);
  }

  // Whether a copy that begins now lands at once, and not only when its thread waits.
  bool copies_at_once() { return order_ == Order::kLifo || (order_ != Order::kFifo && random_->below(2) == 0); }

  Thread* pick() {  // null where none can run
    switch (order_) {
      case Order::kFifo:
      case Order::kLifo: return list_.take_first();
      case Order::kRandom: {
        if (pool_.empty()) return nullptr;
        std::swap(pool_[static_cast<size_t>(random_->below(static_cast<int>(pool_.size())))], pool_.back());
        Thread* thread = pool_.back();
        pool_.pop_back();
        return thread;
      }
      default: {
        const int rank = ready_ranks_.take_least();
        return rank < 0 ? nullptr : by_rank_[static_cast<size_t>(rank)];
      }
    }
  }

 private:
  void shuffled(std::vector<int>& numbers, int count) {
    numbers.resize(static_cast<size_t>(count));
    for (int i = 0; i < count; ++i) numbers[static_cast<size_t>(i)] = i;
    random_->shuffle(numbers);
  }

  // Ranks by warp, then by lane, so that whole warps run ahead as well as single lanes.
  void rank_threads(Block& block, int block_threads) {
    shuffled(warps_, (block_threads + kWarp - 1) / kWarp);
    int rank = block.first_rank;
    for (const int warp : warps_) {
      shuffled(lanes_, std::min(kWarp, block_threads - warp * kWarp));
      for (const int lane : lanes_) {
        Thread* thread = block.threads + warp * kWarp + lane;
        thread->rank = rank;
        by_rank_[static_cast<size_t>(rank++)] = thread;
      }
    }
  }

  Order order_;
  Random* random_;
  ThreadList list_;               // fifo, lifo
  std::vector<Thread*> pool_;     // random
  std::vector<Thread*> by_rank_;  // priority, as all below
  NumberSet ready_ranks_;
  std::vector<int> blocks_, warps_, lanes_;
};

}  // namespace fastnorm::emulator
