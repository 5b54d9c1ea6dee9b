#include "memory.h"

#include <algorithm>
#include <array>
#include <bit>

#include "machine.h"
#include "names.h"

namespace fastnorm::ptx {

namespace {

constexpr uint64_t kWindows = kSharedWindow | kLocalWindow | kParameterWindow;
constexpr uint64_t kOffsetMask = (uint64_t{1} << kBlockShift) - 1;

const char* verb_of(Use use) { return !is_write(use) ? "read" : use == Use::kCopyTo ? "copied to" : "written"; }

[[noreturn]] void report(const Warp& warp, int lane, const Conflict& conflict, const Access& access) {
  const std::string other = thread_name(conflict.other.block(), conflict.other.thread());
  const std::string what = std::to_string(access.bytes) + " bytes " + verb_of(access.use) + " that " + other +
                           (conflict.other_wrote ? " wrote" : " read");
  switch (conflict.kind) {
    case Conflict::kUnfinishedCopy:
    case Conflict::kSourceOfCopy:
      warp.fail(lane, std::string("an unfinished copy: its ") +
                          (conflict.kind == Conflict::kSourceOfCopy ? "source" : "memory") + " is " +
                          verb_of(access.use) + ", the copy of " + other + " is not waited for");
    case Conflict::kNotConstant:
      warp.fail(lane,
                "no constant: " + what + ", and one of the two is a read past the caches that writes reach (.nc)");
    case Conflict::kScope: warp.fail(lane, "a race: " + what + ", and the scope of one has not the other's thread");
    default: warp.fail(lane, "a race: " + what + " with no barrier between");
  }
}

// f(address, first byte, bytes) for every word of so many bytes of memory, or the part of it that they have.
template <class F>
void for_words(uint64_t address, int bytes, F f) {
  for (int left = bytes; left > 0;) {
    const auto first = static_cast<uint32_t>(address & 3);
    const int here = std::min<int>(left, 4 - static_cast<int>(first));
    f(address, first, static_cast<uint32_t>(here));
    address += static_cast<uint64_t>(here);
    left -= here;
  }
}

ShadowRoom::Now now_of(Warp& warp, int lane, Use use, Scope scope = Scope::kDevice) {
  return {use, scope, warp.stamp(lane), warp.time(lane)};
}

// Marks the access in the shadow words word(address).
template <class Word>
void mark(Warp& warp, int lane, const Access& access, ShadowRoom& room, Word word) {
  const ShadowRoom::Now now = now_of(warp, lane, access.use, access.scope);
  for_words(access.address, access.bytes, [&](uint64_t address, uint32_t first, uint32_t bytes) {
    const Conflict found = room.use(word(address), first, bytes, now);
    if (found.kind != Conflict::kNone) report(warp, lane, found, access);
  });
}

// Of the cluster, for a generic address of shared memory; null where it is no block that runs.
Block* block_of(Warp& warp, uint64_t address) {
  Block& own = warp.block();
  const auto index = static_cast<int64_t>((address ^ kSharedWindow) >> kBlockShift);
  if (index == own.index) return &own;
  const int64_t rank = index - (own.index - own.rank);
  const std::vector<Block*>& blocks = own.cluster->blocks;
  return rank < 0 || rank >= static_cast<int64_t>(blocks.size()) ? nullptr : blocks[static_cast<size_t>(rank)];
}

unsigned char* reach_shared(Warp& warp, int lane, const Access& access) {
  Block& own = warp.block();
  Block* const block = block_of(warp, access.address);
  if (block == nullptr) warp.fail(lane, "shared memory of a block that is not in the cluster");
  const auto offset = static_cast<int64_t>(access.address & kOffsetMask) - kSharedBegin;
  if (offset < 0 || offset + access.bytes > static_cast<int64_t>(block->shared.size())) {
    warp.fail(lane, "out of bounds: byte " + std::to_string(offset) + " of " + std::to_string(block->shared.size()) +
                        " bytes of shared memory, " + verb_of(access.use));
  }
  if (block != &own) {
    if (block->left())
      warp.fail(lane, "shared memory of block " + std::to_string(block->index) + ", which has returned");
    if (warp.cluster_waits[static_cast<size_t>(lane)] == 0) {
      warp.fail(lane, "shared memory of another block before the first barrier of the cluster: it may not have begun");
    }
    block->remote_used = true;
    block->remote_phase = std::max(block->remote_phase, warp.cluster_arrivals[static_cast<size_t>(lane)]);
  }
  if (warp.machine().options().races) {
    mark(warp, lane, access, warp.machine().shared_room,
         [&](uint64_t address) -> ShadowWord& { return block->shadow[((address & kOffsetMask) - kSharedBegin) / 4]; });
  }
  return block->shared.data() + offset;
}

void check_alignment(const Warp& warp, int lane, uint64_t address, int bytes, Use use) {
  if (address % static_cast<unsigned>(bytes) == 0) return;
  warp.fail(lane, "misaligned: " + std::to_string(bytes) + " bytes " + verb_of(use) + " at an address that is " +
                      std::to_string(address % 16) + " past a multiple of 16");
}

unsigned char* reach_global(Warp& warp, int lane, const Access& access) {
  Machine& machine = warp.machine();
  if ((access.address & kWindows) == kSharedWindow) {
    warp.fail(lane, "an address of shared memory, taken for one of global memory");
  }
  if (access.address < 4096) warp.fail(lane, "a null pointer " + std::string(verb_of(access.use)));
  if (!machine.memory.hold(access.address, static_cast<uint64_t>(access.bytes))) {
    warp.fail(lane, "out of bounds: " + std::to_string(access.bytes) + " bytes " + verb_of(access.use) +
                        " outside of the call's tensors, " + machine.memory.nearest(access.address));
  }
  if (machine.options().races) {
    mark(warp, lane, access, machine.global_room,
         [&](uint64_t at) -> ShadowWord& { return machine.global_shadow.word(at); });
  }
  return reinterpret_cast<unsigned char*>(access.address);
}

// Sectors of 32 bytes that the lanes touch.
uint64_t sectors(Mask lanes, const uint64_t* addresses) {
  std::array<uint64_t, 2 * kLanes> touched{};
  size_t count = 0;
  for (Mask left = lanes; left != 0; left &= left - 1) {
    touched[count++] = addresses[std::countr_zero(left)] / 32;
  }
  std::sort(touched.begin(), touched.begin() + count);  // an aligned access lies in one sector
  return static_cast<uint64_t>(std::unique(touched.begin(), touched.begin() + count) - touched.begin());
}

// How often the 32 banks of shared memory are needed: lanes of 8 bytes go in two halves, lanes of 16 in four quarters,
// and in a part as many rounds as one bank has different words to give.
uint64_t bank_rounds(Mask lanes, int bytes, const uint64_t* addresses) {
  const int parts = std::max(1, bytes / 4), lanes_in_part = kLanes / parts;
  uint64_t rounds = 0;
  for (int part = 0; part < parts; ++part) {
    std::array<std::array<uint64_t, kLanes>, kLanes> words;
    std::array<uint64_t, kLanes> of_bank{};
    for (int lane = part * lanes_in_part; lane < (part + 1) * lanes_in_part; ++lane) {
      if ((lanes >> lane & 1) == 0) continue;
      for (int at = 0; at < bytes; at += 4) {
        const uint64_t word = (addresses[lane] + static_cast<uint64_t>(at)) / 4, bank = word % kLanes;
        const auto begin = words[bank].begin(), end = begin + static_cast<std::ptrdiff_t>(of_bank[bank]);
        if (std::find(begin, end, word) == end) words[bank][of_bank[bank]++] = word;
      }
    }
    rounds += *std::max_element(of_bank.begin(), of_bank.end());
  }
  return rounds;
}

}  // namespace

uint64_t shared_address(const Warp& warp, uint64_t address) {
  if (address >= kParameterWindow) return address;
  const auto own = static_cast<uint64_t>(warp.block().index);
  const uint64_t rank = address >> kBlockShift, block = rank == 0 ? own : own - warp.block().rank + rank - 1;
  return kSharedWindow | block << kBlockShift | (address & kOffsetMask);
}

uint64_t address_of(Warp& warp, const Instruction& i, int lane) {
  const uint64_t address = warp.value(i.in[0], lane) + static_cast<uint64_t>(i.offset);
  return i.space == Space::kShared ? shared_address(warp, i.in[0].wide ? address : address & 0xffffffffu) : address;
}

unsigned char* reach(Warp& warp, int lane, Space space, const Access& access) {
  const uint64_t address = access.address;
  check_alignment(warp, lane, address, access.bytes, access.use);
  if (space == Space::kParameter || (address & kWindows) == kParameterWindow) {
    const uint64_t offset = address & ~kParameterWindow;
    if (is_write(access.use) ||
        offset + static_cast<uint64_t>(access.bytes) > static_cast<uint64_t>(warp.machine().kernel().parameter_bytes)) {
      warp.fail(lane, "out of bounds: of the parameters");
    }
    return const_cast<unsigned char*>(warp.machine().parameters()) + offset;
  }
  if (space == Space::kLocal || (address & kWindows) == kLocalWindow) {
    const uint64_t offset = address & ~kLocalWindow;
    if (offset + static_cast<uint64_t>(access.bytes) > static_cast<uint64_t>(warp.machine().kernel().local_bytes)) {
      warp.fail(lane, "out of bounds: of local memory");
    }
    return warp.local(lane) + offset;
  }
  if (space != Space::kGlobal && (address & kWindows) == kSharedWindow) return reach_shared(warp, lane, access);
  if (space == Space::kShared) warp.fail(lane, "an address that is not of shared memory");
  return reach_global(warp, lane, access);
}

void begin_copy(Warp& warp, int lane, const Copy& copy) {
  check_alignment(warp, lane, copy.from, copy.bytes, Use::kCopyFrom);
  if (copy.source_bytes > 0) reach_global(warp, lane, {copy.from, copy.source_bytes, Use::kCopyFrom});
  reach(warp, lane, Space::kShared, {shared_address(warp, copy.place + kSharedBegin), copy.bytes, Use::kCopyTo});
}

void end_copy(Warp& warp, int lane, const Copy& copy) {
  Machine& machine = warp.machine();
  if (!machine.options().races) return;
  for_words(copy.from, copy.source_bytes, [&](uint64_t address, uint32_t first, uint32_t bytes) {
    machine.global_room.end_copy_from(machine.global_shadow.word(address), first, bytes, copy.began,
                                      now_of(warp, lane, Use::kRead));
  });
  for (uint32_t at = copy.place; at < copy.place + copy.bytes; at += 4) {
    warp.block().shadow[at / 4] = {warp.stamp(lane), Stamp()};
  }
}

void count_access(Warp& warp, Mask lanes, Space space, Traffic traffic, int bytes, const uint64_t* addresses) {
  if (lanes == 0) return;
  Machine& machine = warp.machine();
  const uint64_t first = addresses[std::countr_zero(lanes)];
  if (space == Space::kParameter || space == Space::kLocal || (first & (kLocalWindow | kParameterWindow)) != 0) return;
  const bool shared = (first & kSharedWindow) != 0, read = traffic == Traffic::kRead;
  Counters& counters = machine.counters();
  AccessCount& count = shared ? (read ? counters.shared_read : counters.shared_written)
                              : (read ? counters.global_read : counters.global_written);
  const auto threads = static_cast<uint64_t>(std::popcount(lanes));
  count.warps += 1;
  count.threads += threads;
  count.bytes += threads * static_cast<uint64_t>(bytes);
  if (!machine.options().transactions) return;
  count.transactions += shared ? bank_rounds(lanes, bytes, addresses) : sectors(lanes, addresses);
}

}  // namespace fastnorm::ptx
