// A decoded instruction: what the interpreter reads in its loop.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "scope.h"
#include "types.h"

namespace fastnorm::ptx {

class Warp;
struct Instruction;

// A bit for every lane of a warp.
using Mask = uint32_t;
constexpr int kLanes = 32;
constexpr Mask kAllLanes = 0xffffffffu;

// Carries the instruction out for some lanes.
using Execute = void (*)(Warp& warp, const Instruction& instruction, Mask lanes);

// A value for every lane: 32 words of 32 or, where it is wide, 64 bits. A predicate is one Mask.
struct Operand {
  enum Bank : uint8_t { kRegister, kConstant, kSpecial, kPredicate, kNothing };

  Bank bank = kNothing;
  bool wide = false;
  bool negated = false;  // predicates
  uint32_t at = 0;       // words from the bank's beginning; of a register, its number until slots are given out

  bool is_nothing() const { return bank == kNothing; }
};

// What follows an instruction.
enum class Flow : uint8_t {
  kNext,           // the next instruction
  kBranch,         // `target`, in the lanes whose guard is true
  kIndexed,        // one of several targets, lane by lane
  kExit,           // nothing
  kTrap,           // the launch fails
  kMeeting,        // all lanes of the warp carry it out together
  kBlockBarrier,   // the next one, when all threads of the block have come
  kClusterArrive,  // the next one
  kClusterWait,    // the next one, when all threads of the cluster have arrived
  kYield,          // the next one; others should run first, because this one may be polled
};

enum class Space : uint8_t { kGeneric, kGlobal, kShared, kLocal, kParameter, kConstant };

// Bits of an access's order. A strong access takes part in no race with another strong one where the scope of each has
// the other's thread.
struct Order {
  bool strong = false, acquire = false, release = false;
  Scope scope = Scope::kDevice;
};

struct Instruction {
  Execute run = nullptr;
  Flow flow = Flow::kNext;
  bool begins_block = false;  // lanes may come here from elsewhere
  Operand guard;

  Operand out[2];
  Operand in[5];

  // Elements of a vector operand: so many of Kernel::elements, from the first on.
  uint32_t first_element = 0;
  uint8_t elements = 0;
  bool elements_written = false;
  uint32_t target = 0;  // of a branch; of an indexed one, its list in Kernel::targets

  Space space = Space::kGeneric;
  Order order;
  uint8_t mode = 0;           // a choice inside an instruction, as its decoder numbers them
  uint8_t bytes = 0;          // of an element in memory
  int64_t offset = 0;         // added to an address
  int64_t source_offset = 0;  // of a copy
  int rounding = 0;           // of <cfenv>
  Execute rounded = nullptr;

  uint32_t text = 0;  // in Kernel::texts
};

}  // namespace fastnorm::ptx
