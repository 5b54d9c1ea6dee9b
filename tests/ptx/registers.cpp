// Liveness of registers, and a place for each: linear scan over the instructions in their order.
#include <algorithm>
#include <bit>
#include <cstdint>
#include <vector>

#include "compile.h"
#include "names.h"

namespace fastnorm::ptx {

namespace {

// Registers first, then predicates, by one number each.
class Bits {
 public:
  explicit Bits(size_t size) : words_((size + 63) / 64) {}
  void set(uint32_t bit) { words_[bit / 64] |= uint64_t{1} << bit % 64; }
  bool has(uint32_t bit) const { return (words_[bit / 64] >> bit % 64 & 1) != 0; }
  // Adds what `other` has and `without` has not. Returns whether that was something new.
  bool add(const Bits& other, const Bits* without = nullptr) {
    bool grew = false;
    for (size_t w = 0; w < words_.size(); ++w) {
      const uint64_t more = words_[w] | (without == nullptr ? other.words_[w] : other.words_[w] & ~without->words_[w]);
      grew |= more != words_[w];
      words_[w] = more;
    }
    return grew;
  }
  template <class F>
  void for_each(F f) const {
    for (size_t w = 0; w < words_.size(); ++w) {
      for (uint64_t left = words_[w]; left != 0; left &= left - 1) {
        f(static_cast<uint32_t>(w * 64) + static_cast<uint32_t>(std::countr_zero(left)));
      }
    }
  }

 private:
  std::vector<uint64_t> words_;
};

struct BasicBlock {
  uint32_t first, last;  // instructions
  std::vector<uint32_t> next;
  Bits used, written, live_in, live_out;
};

// From its first write to its last use, in half instructions: an instruction reads before it writes.
struct Interval {
  uint32_t id;
  uint32_t first = UINT32_MAX, last = 0;

  void cover(uint32_t at) {
    first = std::min(first, at);
    last = std::max(last, at);
  }
};

class Assignment {
 public:
  Assignment(Kernel& kernel, const Names& names) : kernel_(kernel), names_(names), registers_(names.registers()) {}

  void run() {
    find_blocks();
    find_live();
    assign();
    for (Instruction& i : kernel_.code) {
      replace(i.guard);
      for (Operand& o : i.out) replace(o);
      for (Operand& o : i.in) replace(o);
    }
    for (Operand& o : kernel_.elements) replace(o);
  }

 private:
  size_t count() const { return registers_ + names_.predicates(); }
  bool is_one(const Operand& o) const { return o.bank == Operand::kRegister || o.bank == Operand::kPredicate; }
  uint32_t id_of(const Operand& o) const { return o.bank == Operand::kPredicate ? registers_ + o.at : o.at; }

  // A write under a guard leaves some lanes as they were: the register is used too.
  template <class Use, class Write>
  void visit(const Instruction& i, Use use, Write write) const {
    const auto reads = [&](const Operand& o) {
      if (is_one(o)) use(id_of(o));
    };
    const auto writes = [&](const Operand& o) {
      if (!is_one(o)) return;
      if (!i.guard.is_nothing()) use(id_of(o));
      write(id_of(o));
    };
    reads(i.guard);
    for (const Operand& o : i.in) reads(o);
    for (uint32_t e = i.first_element; e < i.first_element + i.elements; ++e) {
      if (!i.elements_written) reads(kernel_.elements[e]);
    }
    for (const Operand& o : i.out) writes(o);
    for (uint32_t e = i.first_element; e < i.first_element + i.elements; ++e) {
      if (i.elements_written) writes(kernel_.elements[e]);
    }
  }

  void find_blocks() {
    const std::vector<Instruction>& code = kernel_.code;
    std::vector<uint32_t> block_at(code.size());
    for (uint32_t at = 0; at < code.size(); ++at) {
      if (at == 0 || code[at].begins_block) {
        blocks_.push_back({at, at, {}, Bits(count()), Bits(count()), Bits(count()), Bits(count())});
      }
      blocks_.back().last = at;
      block_at[at] = static_cast<uint32_t>(blocks_.size() - 1);
    }
    for (BasicBlock& block : blocks_) {
      for (uint32_t at = block.first; at <= block.last; ++at) {
        visit(
            code[at],
            [&](uint32_t id) {
              if (!block.written.has(id)) block.used.set(id);
            },
            [&](uint32_t id) { block.written.set(id); });
      }
      const Instruction& end = code[block.last];
      const bool always = end.guard.is_nothing();
      const bool goes_on =
          !always || (end.flow != Flow::kBranch && end.flow != Flow::kIndexed && end.flow != Flow::kExit);
      if (goes_on && block.last + 1 < code.size()) block.next.push_back(block_at[block.last + 1]);
      if (end.flow == Flow::kBranch) block.next.push_back(block_at[end.target]);
      if (end.flow == Flow::kIndexed) {
        for (const uint32_t target : kernel_.targets[end.target]) block.next.push_back(block_at[target]);
      }
    }
  }

  void find_live() {
    for (bool grew = true; grew;) {
      grew = false;
      for (size_t b = blocks_.size(); b-- > 0;) {
        BasicBlock& block = blocks_[b];
        for (const uint32_t next : block.next) grew |= block.live_out.add(blocks_[next].live_in);
        block.live_in.add(block.used);
        grew |= block.live_in.add(block.live_out, &block.written);
      }
    }
  }

  void assign() {
    std::vector<Interval> intervals(count());
    for (uint32_t id = 0; id < count(); ++id) intervals[id].id = id;
    for (const BasicBlock& block : blocks_) {
      block.live_in.for_each([&](uint32_t id) { intervals[id].cover(2 * block.first); });
      block.live_out.for_each([&](uint32_t id) { intervals[id].cover(2 * block.last + 1); });
      for (uint32_t at = block.first; at <= block.last; ++at) {
        visit(
            kernel_.code[at], [&](uint32_t id) { intervals[id].cover(2 * at); },
            [&](uint32_t id) { intervals[id].cover(2 * at + 1); });
      }
    }
    std::erase_if(intervals, [](const Interval& interval) { return interval.first == UINT32_MAX; });
    std::sort(intervals.begin(), intervals.end(),
              [](const Interval& a, const Interval& b) { return a.first < b.first; });

    place_.assign(count(), 0);
    std::vector<std::pair<uint32_t, uint32_t>> ends;  // (last, id): the ones in use
    for (const Interval& interval : intervals) {
      std::erase_if(ends, [&](const auto& end) {
        if (end.first >= interval.first) return false;
        pool_of(end.second).free.push_back(place_[end.second]);
        return true;
      });
      Pool& pool = pool_of(interval.id);
      if (pool.free.empty()) {
        place_[interval.id] = pool.size++;
      } else {
        place_[interval.id] = pool.free.back();
        pool.free.pop_back();
      }
      ends.push_back({interval.last, interval.id});
    }
    kernel_.predicates = predicates_.size;
    kernel_.register_words = (narrow_.size + 2 * wide_.size) * kLanes;
  }

  void replace(Operand& o) const {
    if (!is_one(o)) return;
    const uint32_t place = place_[id_of(o)];
    o.at = o.bank == Operand::kPredicate ? place : o.wide ? (narrow_.size + 2 * place) * kLanes : place * kLanes;
  }

  // Registers of 32 and of 64 bits never share a place: see Kept.
  struct Pool {
    uint32_t size = 0;
    std::vector<uint32_t> free;
  };
  Pool& pool_of(uint32_t id) { return id >= registers_ ? predicates_ : names_.is_wide(id) ? wide_ : narrow_; }

  Kernel& kernel_;
  const Names& names_;
  uint32_t registers_;
  std::vector<BasicBlock> blocks_;
  std::vector<uint32_t> place_;
  Pool narrow_, wide_, predicates_;
};

}  // namespace

void assign_registers(Kernel& kernel, const Names& names) { Assignment(kernel, names).run(); }

}  // namespace fastnorm::ptx
