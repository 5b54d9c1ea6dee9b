// What launches have executed: instructions by their text's first word, and memory traffic.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace fastnorm::ptx {

struct InstructionCount {
  uint64_t issued = 0;   // by warps
  uint64_t threads = 0;  // lanes that came to it
  uint64_t enabled = 0;  // of those, lanes whose guard let it happen

  void operator+=(const InstructionCount& c) { issued += c.issued, threads += c.threads, enabled += c.enabled; }
};

// Of one kind of access: to global or shared memory, reading or writing. Copies past the registers count as both.
struct AccessCount {
  uint64_t warps = 0;         // instructions that warps issued
  uint64_t threads = 0;       // of lanes
  uint64_t bytes = 0;         // that lanes asked for
  uint64_t transactions = 0;  // global: sectors of 32 bytes; shared: rounds of the 32 banks

  void operator+=(const AccessCount& c) {
    warps += c.warps, threads += c.threads, bytes += c.bytes, transactions += c.transactions;
  }
};

struct Counters {
  std::map<std::string, InstructionCount> instructions;
  // By kernel: the opcode of each of its instructions, in their order, and how often warps have issued it.
  std::map<std::string, std::vector<std::pair<std::string, uint64_t>>> issued;
  AccessCount global_read, global_written, shared_read, shared_written;
};

}  // namespace fastnorm::ptx
