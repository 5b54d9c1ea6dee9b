// Cases of the emulator's own test program: primitives that are checked against a table, and mutants, kernels with one
// deliberate mistake and their correct twins. tests/test_emulator.py says what must catch each mutant; it finds
// the lines that reports must name by the comments "LINE name".
#pragma once

#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "cuda/platform.cuh"

namespace fastnorm::self_test {

#if defined(FASTNORM_SANITIZE_THREAD)
constexpr bool kSlow = true;  // a thread takes a millisecond to make
#else
constexpr bool kSlow = false;
#endif

struct Primitive {
  std::string name;
  std::function<void()> run;  // throws the defect
};

// The results of a kernel: their bits tell schedules apart.
using Output = std::vector<float>;

struct Mutant {
  std::string name;
  std::function<Output(bool broken)> run;
  int blocks_together = 1;
};

std::vector<Primitive> primitives();
std::vector<Primitive> conversions();
std::vector<Primitive> copy_primitives();
std::vector<Primitive> gang_primitives();
std::vector<Primitive> host_primitives();
std::vector<Mutant> mutants();
std::vector<Mutant> copy_mutants();
std::vector<Mutant> gang_mutants();

template <class A, class B>
void check_equal(const A& found, const B& expected, std::string_view what) {
  if (found == static_cast<A>(expected)) return;
  throw std::runtime_error(std::string(what) + ": " + std::to_string(found) + ", expected " + std::to_string(expected));
}
inline void check(bool right, std::string_view what) {
  if (!right) throw std::runtime_error(std::string(what));
}

// Runs f under several orders and seeds.
template <class F>
void under_all_orders(F f) {
  using emulator::Order;
  for (const Order order : {Order::kFifo, Order::kLifo, Order::kRandom, Order::kPriority}) {
    const bool seeded = order == Order::kRandom || order == Order::kPriority;
    for (uint64_t seed = 0; seed < (seeded && !kSlow ? 3 : 1); ++seed) {
      for (const int together : {1, 2}) {
        emulator::Settings settings;
        settings.order = order;
        settings.seed = seed;
        settings.blocks_together = together;
        emulator::configure(settings);
        f();
      }
    }
  }
}

// The text that the launch throws; empty where it throws nothing.
template <class F>
std::string thrown_by(F f) {
  try {
    f();
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return {};
}

// ---- helpers for the kernels of several files ----

constexpr int kThreads = 128, kBlocks = 4;  // of a mutant's launch

template <class... Parameters, class... Arguments>
void run(void (*kernel)(Parameters...), int64_t shared_bytes, Arguments... arguments) {
  cuda::launch(kernel, cuda::LaunchConfig{kBlocks, kThreads, shared_bytes, nullptr}, arguments...);
}
inline Output zeros(int64_t size = kBlocks * kThreads) { return Output(static_cast<size_t>(size)); }

inline cuda::LaunchConfig shape(int64_t blocks, int threads, int64_t shared_bytes = 0, int cluster = 1,
                                bool cooperative = false) {
  return {blocks, threads, shared_bytes, nullptr, cluster, cooperative};
}

inline float* shared_floats() { return reinterpret_cast<float*>(cuda::shared_memory()); }
inline int* shared_ints() { return reinterpret_cast<int*>(cuda::shared_memory()); }
inline int64_t global_index() { return cuda::block_index() * cuda::block_threads() + cuda::thread_index(); }

struct alignas(16) Four {
  float lane[4];
};

}  // namespace fastnorm::self_test
