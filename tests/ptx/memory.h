// Memory as a kernel addresses it: where an address lies, and whether the access is allowed.
#pragma once

#include <cstdint>

#include "instruction.h"
#include "shadow.h"

namespace fastnorm::ptx {

class Warp;
struct AccessCount;

// An access of one lane. Fails the launch where the address is misaligned or outside, where the memory's block has
// left, and where the access is a race.
struct Access {
  uint64_t address;
  int bytes;
  Use use;
};

// The host's memory for it.
unsigned char* reach(Warp& warp, int lane, Space space, const Access& access);

// The lane's address: of the instruction's operand, in generic form where it is one of shared memory.
uint64_t address_of(Warp& warp, const Instruction& i, int lane);
// The generic address of a place in the block's shared memory, given the address in 32 bits.
uint64_t shared_address(const Warp& warp, uint64_t address);

// A copy begins to write to, or has written, the block's own shared memory.
void begin_copy_to(Warp& warp, int lane, uint32_t place, int bytes);
void end_copy_to(Warp& warp, int lane, uint32_t place, int bytes);

// Adds one instruction of these lanes to the machine's counters.
enum class Traffic : uint8_t { kRead, kWritten };
void count_access(Warp& warp, Mask lanes, Space space, Traffic traffic, int bytes, const uint64_t* addresses);

}  // namespace fastnorm::ptx
