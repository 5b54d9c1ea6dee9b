// A shadow of memory, in which a launch finds its races: for every word of 4 bytes the last weak write, and the other
// accesses since. A word that is accessed in parts has a shadow for every byte.
//
// An access is a race with an earlier one, of which at least one writes, unless it happens after it, or both are strong
// and the scope of each has the other's thread. Accesses since the last write are kept as one stamp where a single
// thread has read; else as a list, with an entry for every warp. What happens before a newer entry needs none.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <deque>
#include <memory>
#include <unordered_map>
#include <vector>

#include "happens_before.h"

namespace fastnorm::ptx {

// kCopyTo, kCopyFrom: until the copy's thread has waited for it. kConstant: a read of what no thread of the launch may
// write, at any time.
enum class Use : uint8_t { kRead, kCopyFrom, kConstant, kStrongRead, kStrongWrite, kWrite, kCopyTo };
constexpr bool is_write(Use use) { return use >= Use::kStrongWrite; }
constexpr bool is_strong(Use use) { return use == Use::kStrongRead || use == Use::kStrongWrite; }

// Why an access is wrong, and the access that it meets.
struct Conflict {
  enum Kind { kNone, kRace, kScope, kUnfinishedCopy, kSourceOfCopy, kNotConstant } kind = kNone;
  Stamp other;
  bool other_wrote = false;
};

// Of write: the last weak one; a copy that is under way; its parts. Of read: a thread; a copy that is under way; one
// that takes the memory for constant; a list.
class ShadowWord {
 public:
  Stamp write, read;
};

// The words' parts and lists, which need more room than a word has.
class ShadowRoom {
 public:
  // An access of a thread now.
  struct Now {
    Use use;
    Scope scope;  // of a strong one
    Stamp me;
    const ThreadTime& time;
  };

  Conflict use(ShadowWord& word, uint32_t first_byte, uint32_t bytes, const Now& now) {
    return for_parts(word, first_byte, bytes, [&](ShadowWord& part) { return check(part, now); });
  }
  // A copy that began at a time has read its source.
  void end_copy_from(ShadowWord& word, uint32_t first_byte, uint32_t bytes, Stamp began, const Now& now) {
    for_parts(word, first_byte, bytes, [&](ShadowWord& part) {
      end_copy(part, began, now);
      return Conflict{};
    });
  }
  void begin_launch(uint32_t blocks_in_cluster) {
    blocks_in_cluster_ = blocks_in_cluster;
    split_.clear();
    lists_.clear();
    free_.clear();
  }

 private:
  // Lanes of a warp that have accessed the memory alike, `last` being the latest time.
  struct Accessors {
    Stamp last;
    uint32_t lanes;
    Use use;
    Scope scope;
  };
  struct List {
    std::vector<Accessors> all;
    size_t latest = 0;
    bool written = false;
  };

  template <class F>
  Conflict for_parts(ShadowWord& word, uint32_t first_byte, uint32_t bytes, F f) {
    if (word.write.kind() != Stamp::kElsewhere) {
      if (bytes == 4) return f(word);
      split(word);
    }
    std::array<ShadowWord, 4>& parts = split_[word.write.index()];
    for (uint32_t b = first_byte; b < first_byte + bytes; ++b) {
      const Conflict found = f(parts[b]);
      if (found.kind != Conflict::kNone) return found;
    }
    return {};
  }

  void split(ShadowWord& word) {
    split_.push_back({word, word, word, word});
    if (word.read.kind() == Stamp::kElsewhere) {
      for (size_t b = 1; b < 4; ++b) split_.back()[b].read = new_list(List(lists_[word.read.index()]));
    }
    word.write = Stamp::elsewhere(static_cast<uint32_t>(split_.size() - 1));
  }
  Stamp new_list(List list) {
    if (free_.empty()) {
      lists_.push_back(std::move(list));
      return Stamp::elsewhere(static_cast<uint32_t>(lists_.size() - 1));
    }
    const uint32_t index = free_.back();
    free_.pop_back();
    lists_[index] = std::move(list);
    return Stamp::elsewhere(index);
  }
  void forget(Stamp& read) {
    if (read.kind() == Stamp::kElsewhere) free_.push_back(read.index());
    read = Stamp();
  }

  static Accessors entry_of(const Now& now) {
    return {now.me.as(Stamp::kPlain), 1u << now.me.thread() % 32, now.use, now.scope};
  }
  static Accessors entry_of(Stamp read) {
    const Use use = read.kind() == Stamp::kCopying    ? Use::kCopyFrom
                    : read.kind() == Stamp::kConstant ? Use::kConstant
                                                      : Use::kRead;
    return {read.as(Stamp::kPlain), 1u << read.thread() % 32, use, Scope::kDevice};
  }
  static bool knows(const Now& now, const Accessors& a) { return now.time.knows_lanes(a.last, a.lanes, now.me); }

  Conflict check(ShadowWord& word, const Now& now) {
    if (!word.write.is_never()) {
      if (word.write.kind() == Stamp::kCopying) return {Conflict::kUnfinishedCopy, word.write, true};
      if (now.use == Use::kConstant) return {Conflict::kNotConstant, word.write, true};
      if (!now.time.knows(word.write, now.me)) return {Conflict::kRace, word.write, true};
    }
    if (word.read.kind() == Stamp::kElsewhere) {
      const List& list = lists_[word.read.index()];
      if (list.written || is_write(now.use)) {
        for (const Accessors& a : list.all) {
          if (const Conflict found = meet(a, now); found.kind != Conflict::kNone) return found;
        }
      }
    } else if (is_write(now.use) && !word.read.is_never()) {
      if (const Conflict found = meet(entry_of(word.read), now); found.kind != Conflict::kNone) return found;
    }
    if (now.use == Use::kWrite || now.use == Use::kCopyTo) {
      word.write = now.use == Use::kCopyTo ? now.me.as(Stamp::kCopying) : now.me;
      forget(word.read);  // who may follow this write may follow those
    } else {
      add(word.read, now);
    }
    return {};
  }

  Conflict meet(const Accessors& a, const Now& now) const {
    const bool wrote = is_write(a.use);
    if (!wrote && !is_write(now.use)) return {};
    if (a.use == Use::kCopyFrom) return {Conflict::kSourceOfCopy, a.last, false};
    if (a.use == Use::kConstant || now.use == Use::kConstant) return {Conflict::kNotConstant, a.last, wrote};
    if (knows(now, a)) return {};
    if (!is_strong(a.use) || !is_strong(now.use)) return {Conflict::kRace, a.last, wrote};
    const Scope common = common_scope(a.last.block(), now.me.block(), blocks_in_cluster_);
    if (std::min(a.scope, now.scope) < common) return {Conflict::kScope, a.last, wrote};
    return {};
  }

  // Accesses other than weak writes.
  void add(Stamp& read, const Now& now) {
    if (read.kind() == Stamp::kConstant) return;  // nobody may write: nothing is needed to find who does
    if (now.use == Use::kConstant) {
      forget(read);
      read = now.me.as(Stamp::kConstant);
      return;
    }
    if (read.kind() == Stamp::kElsewhere) return add(lists_[read.index()], now);
    if (!is_strong(now.use) && (read.is_never() || (read.kind() == Stamp::kPlain && now.time.knows(read, now.me)))) {
      read = now.use == Use::kCopyFrom ? now.me.as(Stamp::kCopying) : now.me;
      return;
    }
    List list;
    if (!read.is_never()) list.all.push_back(entry_of(read));
    add(list, now);
    read = new_list(std::move(list));
  }

  void add(List& list, const Now& now) {
    list.written |= is_write(now.use);
    const Accessors mine = entry_of(now);
    const auto alike = [&](const Accessors& a) { return a.use == mine.use && a.scope == mine.scope; };
    const auto of_warp = [&](const Accessors& a) { return alike(a) && a.last.same_warp(now.me); };
    const auto no_longer_needed = [&](const Accessors& a) {
      return alike(a) && (!is_strong(a.use) || a.last.block() == now.me.block()) && knows(now, a);
    };
    std::vector<Accessors>& all = list.all;
    auto place = all.end();
    if (now.use != Use::kCopyFrom) {
      if (list.latest < all.size() && of_warp(all[list.latest])) {
        place = all.begin() + static_cast<std::ptrdiff_t>(list.latest);
      } else {
        place = std::find_if(all.begin(), all.end(), of_warp);
      }
      if (place != all.end() && !knows(now, *place)) {
        const Stamp last = place->last;
        const uint32_t epoch = std::max(last.epoch(), now.me.epoch()), step = std::max(last.step(), now.me.step());
        *place = {Stamp(now.me.block(), now.me.thread(), epoch, step), place->lanes | mine.lanes, now.use, now.scope};
        list.latest = static_cast<size_t>(place - all.begin());
        return;
      }
      if (place == all.end()) place = std::find_if(all.begin(), all.end(), no_longer_needed);
    }
    if (place == all.end()) place = all.insert(place, mine);
    *place = mine;
    list.latest = static_cast<size_t>(place - all.begin());
  }

  void end_copy(ShadowWord& word, Stamp began, const Now& now) {
    if (word.read.kind() == Stamp::kElsewhere) {
      List& list = lists_[word.read.index()];
      const auto copy = std::find_if(list.all.begin(), list.all.end(), [&](const Accessors& a) {
        return a.use == Use::kCopyFrom && a.last.bits() == began.bits();
      });
      if (copy == list.all.end()) return;
      list.all.erase(copy);
      add(list, now);
    } else if (word.read.bits() == began.as(Stamp::kCopying).bits()) {
      word.read = now.me;
    }
  }

  uint32_t blocks_in_cluster_ = 1;
  std::deque<std::array<ShadowWord, 4>> split_;
  std::deque<List> lists_;
  std::vector<uint32_t> free_;
};

// The shadow of global memory, page by page where it is accessed.
class GlobalShadow {
 public:
  ShadowWord& word(uint64_t address) {
    const uint64_t page = address / kPageBytes;
    Cached& cached = cache_[page % cache_.size()];
    if (cached.page != page) cached = {page, page_of(page)};
    return (*cached.words)[address % kPageBytes / 4];
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
