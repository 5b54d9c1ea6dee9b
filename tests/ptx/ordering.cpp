#include "ordering.h"

#include "decoding.h"
#include "machine.h"

namespace fastnorm::ptx {

namespace {

uint32_t own_group(const Warp& warp, Scope scope) {
  return group_of(scope, static_cast<uint32_t>(warp.block().index),
                  static_cast<uint32_t>(warp.machine().shape().cluster));
}

}  // namespace

std::optional<Scope> take_scope(Decoding& d) {
  const std::string_view scope = d.take_one_of({"cta", "cluster", "gpu", "sys"});
  if (scope.empty()) return std::nullopt;
  return scope == "cta" ? Scope::kBlock : scope == "cluster" ? Scope::kCluster : Scope::kDevice;
}

Order take_order(Decoding& d) {
  const std::string_view kind = d.take_one_of({"weak", "relaxed", "acquire", "release", "acq_rel", "volatile", "mmio"});
  Order order;
  order.strong = !kind.empty() && kind != "weak";
  order.acquire = kind == "acquire" || kind == "acq_rel";
  order.release = kind == "release" || kind == "acq_rel";
  order.scope = take_scope(d).value_or(Scope::kDevice);
  return order;
}

void after_strong_read(Warp& warp, int lane, uint64_t address, Order order) {
  Machine& machine = warp.machine();
  if (!machine.options().races) return;
  for_scopes_up_to(order.scope, [&](Scope scope) {
    const Clock*& learns = order.acquire ? warp.time(lane).clock : warp.seen(lane)[scope];
    learns = machine.releases.acquired(learns, machine.releases.at(address, scope, own_group(warp, scope)));
  });
}

void before_strong_write(Warp& warp, int lane, uint64_t address, Order order, bool modifies) {
  Machine& machine = warp.machine();
  if (!machine.options().races) return;
  if (!modifies) machine.releases.end(address);
  Clock released;
  if (order.release) released = warp.release_clock(lane);
  for_scopes_up_to(order.scope, [&](Scope scope) {
    const uint32_t group = own_group(warp, scope);
    machine.releases.add(address, scope, group, released);
    if (const Clock* const fenced = warp.fenced(lane)[scope]; fenced != nullptr) {
      machine.releases.add(address, scope, group, *fenced);
    }
  });
}

void fence(Warp& warp, Mask lanes, Scope scope) {
  Machine& machine = warp.machine();
  if (!machine.options().races) return;
  for (Mask left = lanes; left != 0; left &= left - 1) {
    const int lane = std::countr_zero(left);
    const Clock*& knows = warp.time(lane).clock;
    for_scopes_up_to(scope, [&](Scope s) { knows = machine.releases.joined(knows, warp.seen(lane)[s]); });
    const Clock* const released = machine.releases.keep(warp.release_clock(lane));
    for_scopes_up_to(scope, [&](Scope s) { warp.fenced(lane)[s] = released; });
  }
}

}  // namespace fastnorm::ptx
