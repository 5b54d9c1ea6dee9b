// The interface of the CPU kernels. There is one set of kernels for each instruction set; it is chosen at load time.
#pragma once

#include <string>
#include <vector>

#include "core/args.h"
#include "core/images.h"
#include "plan/cpu.h"

namespace fastnorm::cpu {

// The order in which a thread takes tasks that lie side by side: the second pass over data begins with what the first
// has left in the cache.
enum class Order { kForwards, kBackwards };

// The caller's thread pool. `run` calls body(context, task) for every task, on any thread. The threads divide equal
// numbers of tasks alike in every call, so that passes over the same data find it in their own caches.
struct Parallel {
  int threads;
  void (*run)(int64_t tasks, Order order, void (*body)(void*, int64_t), void* context);
};

struct ForwardCall : ForwardArgs {
  CpuPlan plan;
  Parallel parallel;
};
// The kernels write dweight and dbias in double; the caller rounds them to the parameters' types.
struct BackwardCall : BackwardArgs {
  CpuPlan plan;
  Parallel parallel;
  double *dweight, *dbias;  // [C]; instead of BackwardArgs' own
};

struct ImageCall : ImageArgs {
  Parallel parallel;
};

// There is one of these for each instruction set; csrc/cpu/dispatch.cpp picks one at load time.
struct Kernels {
  const char* name;
  void (*forward)(const ForwardCall&);
  void (*backward)(const BackwardCall&);
  void (*normalize_images)(const ImageCall&);
};
const Kernels& kernels();

// The sets of kernels that this build has and this processor can run, best first. It is never empty.
std::vector<const Kernels*> available_kernels();

}  // namespace fastnorm::cpu
