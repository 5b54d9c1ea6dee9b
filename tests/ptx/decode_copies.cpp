// cp.async: copies from global to shared memory, past the registers. Each lands at once or when its thread waits, as
// the machine's seed decides; until the thread has waited its memory is poisoned and nobody may access it, and its
// source is being read and nobody may write there.
#include <array>
#include <bit>
#include <cstring>

#include "decoding.h"
#include "machine.h"
#include "memory.h"
#include "names.h"

namespace fastnorm::ptx {

namespace {

using enum Type;

constexpr int kPoison = 0xff;

void land(Warp& warp, const Copy& copy) {
  unsigned char* const place = warp.block().shared.data() + copy.place;
  std::memset(place, 0, copy.bytes);
  std::memcpy(place, reinterpret_cast<const void*>(copy.from), copy.source_bytes);
}

// in: the place, the source; mode: whether in[2] has the number of bytes to copy, the rest being zeros.
void begin(Warp& warp, const Instruction& i, Mask lanes) {
  std::array<uint64_t, kLanes> places, sources;
  for (Mask left = lanes; left != 0; left &= left - 1) {
    const int lane = std::countr_zero(left);
    const auto l = static_cast<size_t>(lane);
    places[l] = address_of(warp, i, lane);
    sources[l] = warp.value(i.in[1], lane) + static_cast<uint64_t>(i.source_offset);
    if (places[l] >> kBlockShift != shared_address(warp, 0) >> kBlockShift) {
      warp.fail(lane, "a copy to what is not the block's shared memory");
    }
    Copy copy{};
    copy.place = static_cast<uint32_t>(places[l] & ((1 << kBlockShift) - 1)) - kSharedBegin;
    copy.from = sources[l];
    copy.bytes = i.bytes;
    copy.source_bytes =
        i.mode != 0 ? static_cast<uint8_t>(std::min<uint64_t>(warp.value(i.in[2], lane), i.bytes)) : i.bytes;
    copy.began = warp.stamp(lane);
    begin_copy(warp, lane, copy);
    copy.landed = (warp.machine().random() & 1) != 0;
    if (copy.landed) {
      land(warp, copy);
    } else {
      std::memset(warp.block().shared.data() + copy.place, kPoison, copy.bytes);
    }
    warp.copies(lane).under_way.push_back(copy);
  }
  count_access(warp, lanes, Space::kGlobal, Traffic::kRead, i.bytes, sources.data());
  count_access(warp, lanes, Space::kShared, Traffic::kWritten, i.bytes, places.data());
}

void commit(Warp& warp, const Instruction&, Mask lanes) {
  for (Mask left = lanes; left != 0; left &= left - 1) {
    Copies& copies = warp.copies(std::countr_zero(left));
    copies.ends.push_back(copies.under_way.size());
  }
}

void finish(Warp& warp, int lane, size_t count) {
  Copies& copies = warp.copies(lane);
  for (size_t c = 0; c < count; ++c) {
    const Copy& copy = copies.under_way[c];
    if (!copy.landed) land(warp, copy);
    end_copy(warp, lane, copy);
  }
  copies.under_way.erase(copies.under_way.begin(), copies.under_way.begin() + static_cast<std::ptrdiff_t>(count));
}

// All groups but the last i.mode.
void wait_group(Warp& warp, const Instruction& i, Mask lanes) {
  for (Mask left = lanes; left != 0; left &= left - 1) {
    const int lane = std::countr_zero(left);
    std::vector<size_t>& ends = warp.copies(lane).ends;
    if (ends.size() <= i.mode) continue;
    const size_t ended = ends.size() - i.mode, count = ends[ended - 1];
    finish(warp, lane, count);
    ends.erase(ends.begin(), ends.begin() + static_cast<std::ptrdiff_t>(ended));
    for (size_t& end : ends) end -= count;
  }
}
void wait_all(Warp& warp, const Instruction&, Mask lanes) {
  for (Mask left = lanes; left != 0; left &= left - 1) {
    const int lane = std::countr_zero(left);
    finish(warp, lane, warp.copies(lane).under_way.size());
    warp.copies(lane).ends.clear();
  }
}

void decode_cp(Decoding& d) {
  if (!d.take("async")) d.fail("an instruction that is not known");
  if (d.take("commit_group")) {
    d.i.run = commit;
    return d.finish(0);
  }
  if (d.take("wait_all")) {
    d.i.run = wait_all;
    return d.finish(0);
  }
  if (d.take("wait_group")) {
    d.i.run = wait_group;
    d.i.mode = static_cast<uint8_t>(std::min<uint64_t>(d.number(0), 255));
    return d.finish(1);
  }
  const bool past_l1 = d.take("cg");
  d.take_cache_hints();
  if (d.take_one_of({"shared", "shared::cta"}).empty() || !d.take("global")) d.fail("an instruction that is not known");
  d.i.run = begin;
  d.i.space = Space::kShared;
  d.i.bytes = static_cast<uint8_t>(d.number(2));
  if (d.i.bytes != 16 && (past_l1 || (d.i.bytes != 4 && d.i.bytes != 8))) d.fail("a copy of that many bytes");
  d.address(1);
  d.i.in[1] = d.i.in[0];
  d.i.source_offset = d.i.offset;
  d.i.offset = 0;
  d.address(0);
  const bool hint = d.take("L2::cache_hint");
  const size_t used = d.operands() - hint;
  if (used == 4) {
    d.i.mode = 1;
    d.in(3, kU32, 2);
  }
  d.finish(3 + d.i.mode + hint);
}

}  // namespace

void add_copies(Decoders& decoders) { decoders["cp"] = decode_cp; }

}  // namespace fastnorm::ptx
