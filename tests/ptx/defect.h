// What the interpreter finds wrong. The launch ends, and says it together with the thread and the instruction.
#pragma once

#include <stdexcept>
#include <string>

namespace fastnorm::ptx {

struct Defect : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A thread of a launch, in words.
inline std::string thread_name(int64_t block, int64_t thread) {
  return "block " + std::to_string(block) + " thread " + std::to_string(thread);
}

}  // namespace fastnorm::ptx
