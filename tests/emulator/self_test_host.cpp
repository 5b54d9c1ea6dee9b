// The host's half of a launch, which the emulator has no part in: limits that are raised once, plans that are kept.
#include <atomic>
#include <thread>

#include "cuda/once_per_kernel.h"
#include "self_test.h"
#include "torch/plan_cache.h"

namespace fastnorm::self_test {
namespace {

using cuda::OncePerKernel;
using PlanKey = ops::PlanKey<ForwardNeeds>;

constexpr int kKernels = 3, kDevices = 2, kHostThreads = 4, kLaunches = 1000;
constexpr int kMost = 227 << 10, kAtFirst = 48 << 10;  // bytes of shared memory

// A driver that keeps a limit for every kernel and device, as CUDA does, and counts who sets it.
struct Driver {
  struct Function {
    std::atomic<int> limit{kAtFirst}, calls{0};
  };
  Function functions[kDevices][kKernels];

  const void* address(int kernel) const { return &functions[0][kernel]; }
  int set_limit(int device, int kernel, int bytes) {
    Function& f = functions[device][kernel];
    ++f.calls;
    f.limit = bytes;
    return 0;
  }
};

// Host threads launch the same kernels with much shared memory and with little.
void limits_of_two_threads() {
  Driver driver;
  OncePerKernel limits;
  std::atomic<int> refused{0};
  const auto launch_all = [&](int wanted) {
    for (int i = 0; i < kLaunches; ++i) {
      const int kernel = i % kKernels, device = i / kKernels % kDevices;
      const auto raise = [&] { return driver.set_limit(device, kernel, kMost); };
      refused += limits.run(driver.address(kernel), device, raise) != 0;
      refused += wanted > driver.functions[device][kernel].limit;  // what cudaLaunchKernel checks
    }
  };
  std::vector<std::thread> threads;
  for (int i = 0; i < kHostThreads; ++i) threads.emplace_back(launch_all, i % 2 == 0 ? kMost : kAtFirst + 1);
  for (std::thread& thread : threads) thread.join();
  check_equal(refused.load(), 0, "refused launches");
  for (const auto& device : driver.functions) {
    for (const Driver::Function& f : device) check_equal(f.calls.load(), 1, "calls of the driver");
  }
}

// What the driver refused is asked for again.
void limits_of_a_failing_driver() {
  OncePerKernel limits;
  int calls = 0;
  const int kernel = 0;
  const auto run = [&](int error) { return limits.run(&kernel, 0, [&] { return ++calls, error; }); };
  check_equal(run(7), 7, "the driver's error");
  check_equal(run(0), 0, "the second attempt");
  check_equal(run(7), 0, "the limit that is raised");
  check_equal(calls, 2, "calls of the driver");
}

// Two GPUs with the same facts: the one that is shared goes by a lesser plan, its twin by the best one.
void plans_of_twins() {
  ops::PlanCache<int, ForwardNeeds> cache;
  PlanKey shared{}, twin{};
  twin.device_index = 1;
  const auto best = [](const PlanKey&) { return 1; };
  check_equal(cache.get(shared, best) + cache.get(twin, best), 2, "plans of both");
  cache.put(shared, 2);
  check_equal(cache.get(shared, best), 2, "the plan of the shared one");
  check_equal(cache.get(twin, best), 1, "the plan of its twin");
}

}  // namespace

std::vector<Primitive> host_primitives() {
  return {{"limits_of_two_threads", limits_of_two_threads},
          {"limits_of_a_failing_driver", limits_of_a_failing_driver},
          {"plans_of_twins", plans_of_twins}};
}

}  // namespace fastnorm::self_test
