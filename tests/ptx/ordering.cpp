#include "ordering.h"

#include "decoding.h"
#include "machine.h"

namespace fastnorm::ptx {

Order take_order(Decoding& d) {
  const std::string_view kind = d.take_one_of({"weak", "relaxed", "acquire", "release", "acq_rel", "volatile", "mmio"});
  const std::string_view scope = d.take_one_of({"cta", "cluster", "gpu", "sys"});
  Order order;
  order.strong = !kind.empty() && kind != "weak";
  order.acquire = kind == "acquire" || kind == "acq_rel";
  order.release = kind == "release" || kind == "acq_rel";
  // Among the threads of a block barriers make the order; see happens_before.h.
  if (scope == "cta" && (order.acquire || order.release)) d.fail("acquire and release within a block are not known");
  return order;
}

void after_strong_read(Warp& warp, int lane, uint64_t address, Order order) {
  Machine& machine = warp.machine();
  if (!machine.options().races) return;
  const Clock* const there = machine.releases.at(address);
  const Clock*& learns = order.acquire ? warp.time(lane).clock : warp.seen(lane);
  learns = machine.releases.acquired(learns, there);
}

void before_strong_write(Warp& warp, int lane, uint64_t address, Order order, bool modifies) {
  Machine& machine = warp.machine();
  if (!machine.options().races) return;
  Clock released;
  if (order.release) released = warp.release_clock(lane);
  if (const Clock* const fenced = warp.fenced(lane); fenced != nullptr) released.join(*fenced);
  if (modifies) {
    machine.releases.add(address, released);
  } else {
    machine.releases.replace(address, released.is_empty() ? nullptr : &released);
  }
}

void fence(Warp& warp, Mask lanes) {
  Machine& machine = warp.machine();
  if (!machine.options().races) return;
  for (Mask left = lanes; left != 0; left &= left - 1) {
    const int lane = std::countr_zero(left);
    const Clock*& knows = warp.time(lane).clock;
    knows = machine.releases.joined(knows, warp.seen(lane));
    warp.fenced(lane) = machine.releases.keep(warp.release_clock(lane));
  }
}

}  // namespace fastnorm::ptx
