// Acquire and release at an address, by one lane.
#pragma once

#include <cstdint>
#include <optional>

#include "instruction.h"

namespace fastnorm::ptx {

class Warp;
class Decoding;

// Takes .weak, .relaxed, .acquire, .release, .acq_rel, .volatile and the scope from the opcode.
Order take_order(Decoding& d);
// Nothing where the opcode has none.
std::optional<Scope> take_scope(Decoding& d);

void after_strong_read(Warp& warp, int lane, uint64_t address, Order order);
// modifies: the write continues what lies there, as that of a read-modify-write instruction does.
void before_strong_write(Warp& warp, int lane, uint64_t address, Order order, bool modifies);
// fence.acq_rel: acquires what the lane has read since the last one, and lets its writes from now on release; both
// among the threads of its scope.
void fence(Warp& warp, Mask lanes, Scope scope);

}  // namespace fastnorm::ptx
