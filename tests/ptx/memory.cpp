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

bool is_read(Use use) { return use == Use::kRead || use == Use::kStrongRead; }
const char* verb_of(Use use) { return is_read(use) ? "read" : use == Use::kCopyTo ? "copied to" : "written"; }

[[noreturn]] void report(const Warp& warp, int lane, const Conflict& conflict, const Access& access) {
  const std::string other = thread_name(conflict.other.block(), conflict.other.thread());
  if (conflict.kind == Conflict::kUnfinishedCopy) {
    warp.fail(lane, "an unfinished copy: its memory is " + std::string(verb_of(access.use)) + ", the copy of " + other +
                        " is not waited for");
  }
  warp.fail(lane, "a race: " + std::to_string(access.bytes) + " bytes " + verb_of(access.use) + " that " + other +
                      (conflict.other_wrote ? " wrote" : " read") + " with no barrier between");
}

// Marks the access in the shadow words from word(0) on.
template <class Word>
void mark(Warp& warp, int lane, const Access& access, ShadowRoom& room, Word word) {
  uint64_t address = access.address;
  for (int left = access.bytes; left > 0;) {
    const auto first = static_cast<uint32_t>(address & 3);
    const int bytes = std::min<int>(left, 4 - static_cast<int>(first));
    ShadowWord* const at = word(address);
    if (at == nullptr) warp.fail(lane, "an address outside of all memory, " + std::string(verb_of(access.use)));
    const Conflict found =
        room.use(*at, first, static_cast<uint32_t>(bytes), access.use, warp.stamp(lane), warp.time(lane));
    if (found.kind != Conflict::kNone) report(warp, lane, found, access);
    address += static_cast<uint64_t>(bytes);
    left -= bytes;
  }
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
         [&](uint64_t address) { return &block->shadow[((address & kOffsetMask) - kSharedBegin) / 4]; });
  }
  return block->shared.data() + offset;
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
  if (address % static_cast<unsigned>(access.bytes) != 0) {
    warp.fail(lane, "misaligned: " + std::to_string(access.bytes) + " bytes " + verb_of(access.use) +
                        " at an address that is " + std::to_string(address % 16) + " past a multiple of 16");
  }
  if (space == Space::kParameter || (address & kWindows) == kParameterWindow) {
    const uint64_t offset = address & ~kParameterWindow;
    if (!is_read(access.use) ||
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
  if ((address & kWindows) == kSharedWindow) {
    if (space == Space::kGlobal) warp.fail(lane, "an address of shared memory, taken for one of global memory");
    return reach_shared(warp, lane, access);
  }
  if (space == Space::kShared) warp.fail(lane, "an address that is not of shared memory");
  if (address < 4096) warp.fail(lane, "a null pointer " + std::string(verb_of(access.use)));
  if (warp.machine().options().races) {
    Machine& machine = warp.machine();
    mark(warp, lane, access, machine.global_room, [&](uint64_t at) { return machine.global_shadow.word(at); });
  }
  return reinterpret_cast<unsigned char*>(address);
}

void begin_copy_to(Warp& warp, int lane, uint32_t place, int bytes) {
  reach(warp, lane, Space::kShared, {shared_address(warp, place + kSharedBegin), bytes, Use::kCopyTo});
}

void end_copy_to(Warp& warp, int lane, uint32_t place, int bytes) {
  if (!warp.machine().options().races) return;
  for (uint32_t at = place; at < place + static_cast<uint32_t>(bytes); at += 4) {
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
