// A shadow of memory, in which a launch finds its races: for every word of 4 bytes the last write and the reads since.
// A word that is accessed in parts has a shadow for every byte.
//
// An access is a race unless it happens after the last write and, where it writes, after all reads since. Reads are
// kept as one stamp where that loses nothing: of the last reader; of the warp whose lanes read in the same step; of the
// block whose warps read in the same epoch. Where several blocks read they are kept one by one.
#pragma once

#include <sys/mman.h>

#include <array>
#include <cerrno>
#include <cstdint>
#include <deque>
#include <memory>
#include <unordered_map>
#include <vector>

#include "happens_before.h"

namespace fastnorm::ptx {

enum class Use : uint8_t { kRead, kWrite, kStrongRead, kStrongWrite, kCopyTo };

// Why an access is wrong, and the access that it meets.
struct Conflict {
  enum Kind { kNone, kRace, kUnfinishedCopy } kind = kNone;
  Stamp other;
  bool other_wrote = false;
};

class ShadowWord {
 public:
  Stamp write, read;
};

// The words' parts and readers that need more room than a word has.
class ShadowRoom {
 public:
  Conflict use(ShadowWord& word, uint32_t first_byte, uint32_t bytes, Use use, Stamp me, const ThreadTime& time) {
    if (bytes == 4 && word.write.kind() != Stamp::kElsewhere) return check(word, use, me, time);
    if (word.write.kind() != Stamp::kElsewhere) split(word);
    std::array<ShadowWord, 4>& parts = split_[word.write.index()];
    for (uint32_t b = first_byte; b < first_byte + bytes; ++b) {
      const Conflict found = check(parts[b], use, me, time);
      if (found.kind != Conflict::kNone) return found;
    }
    return {};
  }
  void clear() {
    split_.clear();
    readers_.clear();
  }

 private:
  // What Stamp::kind() means of reads: one thread, several lanes, several warps, an entry of readers_.
  static constexpr Stamp::Kind kThread = Stamp::kPlain, kWarp = Stamp::kStrong, kBlock = Stamp::kCopying;

  void split(ShadowWord& word) {
    split_.push_back({word, word, word, word});
    if (word.read.kind() == Stamp::kElsewhere) {
      for (ShadowWord& part : split_.back()) {
        readers_.push_back(readers_[word.read.index()]);
        part.read = Stamp::elsewhere(static_cast<uint32_t>(readers_.size() - 1));
      }
    }
    word.write = Stamp::elsewhere(static_cast<uint32_t>(split_.size() - 1));
  }

  Conflict check(ShadowWord& word, Use use, Stamp me, const ThreadTime& time) {
    const bool strong = use == Use::kStrongRead || use == Use::kStrongWrite;
    const bool writes = use != Use::kRead && use != Use::kStrongRead;
    if (!word.write.is_never()) {
      if (word.write.kind() == Stamp::kCopying) return {Conflict::kUnfinishedCopy, word.write, true};
      const bool both_strong = strong && word.write.kind() == Stamp::kStrong;
      if (!both_strong && !time.knows(word.write, me)) return {Conflict::kRace, word.write, true};
    }
    if (!writes) {
      if (!strong) add_reader(word.read, me, time);
      return {};
    }
    if (const Stamp reader = reader_not_before(word.read, me, time); !reader.is_never()) {
      return {Conflict::kRace, reader, false};
    }
    word.write = use == Use::kCopyTo ? me.as(Stamp::kCopying) : strong ? me.as(Stamp::kStrong) : me;
    if (!strong) word.read = Stamp();  // who may follow this write may follow those reads
    return {};
  }

  // A reader that this thread may not follow with a write; never where there is none.
  Stamp reader_not_before(Stamp read, Stamp me, const ThreadTime& time) const {
    if (read.is_never()) return read;
    switch (static_cast<int>(read.kind())) {
      case kThread: return time.knows(read, me) ? Stamp() : read;
      case kWarp: {
        const bool mine = read.same_warp(me) && read.step() < time.known_step;
        const bool known = time.clock != nullptr && read.step() < time.clock->of_part(Clock::warp_of(read));
        return mine || known || time.knows_epoch(read, me) ? Stamp() : read;
      }
      case kBlock: return time.knows_epoch(read, me) ? Stamp() : read;
      default:
        for (const Stamp one : readers_[read.index()]) {
          if (const Stamp found = reader_not_before(one, me, time); !found.is_never()) return found;
        }
        return Stamp();
    }
  }

  void add_reader(Stamp& read, Stamp me, const ThreadTime& time) {
    if (read.bits() == me.bits()) return;
    if (read.kind() == Stamp::kElsewhere) {
      for (Stamp& one : readers_[read.index()]) {
        if (one.block() == me.block()) return add_reader(one, me, time);
      }
      readers_[read.index()].push_back(me);
    } else if (read.is_never() || reader_not_before(read, me, time).is_never()) {
      read = me;
    } else if (read.block() != me.block()) {
      readers_.push_back({read, me});
      read = Stamp::elsewhere(static_cast<uint32_t>(readers_.size() - 1));
    } else {
      const Stamp::Kind kind = read.same_warp(me) && read.kind() != kBlock ? kWarp : kBlock;
      const uint32_t epoch = std::max(read.epoch(), me.epoch()), step = std::max(read.step(), me.step());
      read = Stamp(me.block(), me.thread(), epoch, step).as(kind);
    }
  }

  std::deque<std::array<ShadowWord, 4>> split_;
  std::deque<std::vector<Stamp>> readers_;
};

// The shadow of global memory, page by page where it is accessed.
class GlobalShadow {
 public:
  // Null where the process has no memory.
  ShadowWord* word(uint64_t address) {
    const uint64_t page = address / kPageBytes;
    Cached& cached = cache_[page % cache_.size()];
    if (cached.page != page) {
      Page* const words = page_of(page);
      if (words == nullptr) return nullptr;
      cached = {page, words};
    }
    return &(*cached.words)[address % kPageBytes / 4];
  }
  void clear() {
    used_.clear();
    cache_.fill({});
    for (auto& page : pages_) free_.push_back(std::move(page));
    pages_.clear();
  }

 private:
  static constexpr uint64_t kPageBytes = 4096;
  using Page = std::array<ShadowWord, kPageBytes / 4>;
  struct Cached {
    uint64_t page = ~uint64_t{0};
    Page* words = nullptr;
  };

  Page* page_of(uint64_t page) {
    Page*& words = used_[page];
    if (words == nullptr) {
      unsigned char resident = 0;
      if (mincore(reinterpret_cast<void*>(page * kPageBytes), kPageBytes, &resident) != 0 && errno == ENOMEM)
        return nullptr;
      if (free_.empty()) {
        pages_.push_back(std::make_unique<Page>());
      } else {
        pages_.push_back(std::move(free_.back()));
        free_.pop_back();
        pages_.back()->fill({});
      }
      words = pages_.back().get();
    }
    return words;
  }

  std::array<Cached, 256> cache_;
  std::unordered_map<uint64_t, Page*> used_;
  std::vector<std::unique_ptr<Page>> pages_, free_;
};

}  // namespace fastnorm::ptx
