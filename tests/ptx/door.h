// The door through which launches come: kernels by name, and the record of what was launched. A process has one
// machine, and launches wait for each other.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "machine.h"

namespace fastnorm::ptx {

// A module's kernels take the place of those of the same names. A file has to stay as it is: parts of it are read when
// they are needed.
void load(const std::string& text);
void load_file(const std::string& path);

// cudaErrorLaunchFailure: what went wrong is in last_defect().
constexpr int kLaunchFailure = 719;

// While it lives, what its thread launches may access this memory and no other of the call.
class CallMemory {
 public:
  CallMemory();
  ~CallMemory();
  CallMemory(const CallMemory&) = delete;
  void add(uint64_t begin, uint64_t bytes) { memory_.add(begin, bytes); }
  void remove(uint64_t begin) { memory_.remove(begin); }

 private:
  Allocations memory_;
  const CallMemory* outer_;
  friend Allocations memory_of_call();
};
Allocations memory_of_call();

// Launches a kernel for the device that a test has configured. arguments: the address of every parameter. Returns 0 or
// CUDA's error.
int launch(const std::string& kernel, const LaunchShape& shape, void** arguments);
// For a launch that is a mistake of the host code. Returns kLaunchFailure.
int refuse(const std::string& why);
const char* last_defect();
// The kernels that were launched since the counters were reset, in their order.
std::vector<std::string> launched();

// Runs a kernel as it is, for tests of the interpreter. Throws Defect.
void run(const std::string& kernel, const LaunchShape& shape, const std::string& parameters, const Options& options);

// With the machine, while no launch runs.
void with_machine(const std::function<void(Machine&)>& use);
void look_for_races(bool on);
void count_transactions(bool on);

}  // namespace fastnorm::ptx
