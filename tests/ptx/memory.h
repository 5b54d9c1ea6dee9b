// Memory as a kernel addresses it: where an address lies, and whether the access is allowed.
#pragma once

#include <cstdint>

#include "instruction.h"
#include "shadow.h"

namespace fastnorm::ptx {

class Warp;
struct Copy;
struct AccessCount;

// An access of one lane. Fails the launch where the address is misaligned or outside of what the launch may access,
// where the memory's block has left, and where the access is a race.
struct Access {
  uint64_t address;
  int bytes;
  Use use;
  Scope scope = Scope::kDevice;  // of a strong one
};

// The host's memory for it.
unsigned char* reach(Warp& warp, int lane, Space space, const Access& access);

// The lane's address: of the instruction's operand, in generic form where it is one of shared memory.
uint64_t address_of(Warp& warp, const Instruction& i, int lane);
// The generic address of a place in the block's shared memory, given the address in 32 bits.
uint64_t shared_address(const Warp& warp, uint64_t address);

// A copy begins, or has ended: it reads its source and writes to the block's own shared memory until then.
void begin_copy(Warp& warp, int lane, const Copy& copy);
void end_copy(Warp& warp, int lane, const Copy& copy);

// Adds one instruction of these lanes to the machine's counters.
enum class Traffic : uint8_t { kRead, kWritten };
void count_access(Warp& warp, Mask lanes, Space space, Traffic traffic, int bytes, const uint64_t* addresses);

}  // namespace fastnorm::ptx
