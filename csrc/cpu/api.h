// The interface of the CPU kernels: one set of them for each instruction set, chosen at load time.
#pragma once

#include <string>
#include <vector>

#include "core/args.h"
#include "plan/cpu.h"

namespace fastnorm::cpu {

// How the caller's thread pool is reached: runs body(context, task) for every task, in any order, on any thread.
struct Parallel {
  int threads;
  void (*run)(int64_t tasks, void (*body)(void*, int64_t), void* context);
};

struct ForwardCall : ForwardArgs {
  CpuPlan plan;
  Parallel parallel;
};
// The sums stay double: the caller rounds them to the parameters' types.
struct BackwardCall : BackwardArgs {
  CpuPlan plan;
  Parallel parallel;
  double *dweight, *dbias;  // [C]; instead of BackwardArgs' own
};

// One per instruction set; csrc/cpu/dispatch.cpp picks at load time.
struct Kernels {
  const char* name;
  void (*forward)(const ForwardCall&);
  void (*backward)(const BackwardCall&);
};
const Kernels& kernels();

// The sets that this build and this processor can run, best first; never empty.
std::vector<const Kernels*> available_kernels();

}  // namespace fastnorm::cpu
