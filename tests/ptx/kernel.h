// A kernel, ready to run, and what a launch needs to know of it.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "instruction.h"

namespace fastnorm::ptx {

struct Parameter {
  std::string name;
  int64_t offset, bytes;
};

struct Kernel {
  std::string name;
  std::vector<Instruction> code;
  std::vector<Operand> elements;               // of vector operands
  std::vector<std::vector<uint32_t>> targets;  // of indexed branches
  std::vector<std::string> texts;              // of instructions, as the module has them
  std::vector<Parameter> parameters;
  int64_t parameter_bytes = 0;
  int64_t static_shared_bytes = 0;
  int64_t local_bytes = 0;                                             // of a thread
  std::vector<std::shared_ptr<std::vector<unsigned char>>> variables;  // of the module, in global memory
  int most_threads = 1024;

  // Constants as lanes have them; words of all registers; predicates.
  std::vector<uint32_t> constants;
  uint32_t register_words = 0;
  uint32_t predicates = 0;
};

}  // namespace fastnorm::ptx
