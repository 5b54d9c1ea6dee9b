// The interpreter's controls for Python, by ctypes: see backend.py. They return the text of what went wrong, or null.
#include <string>

#include "door.h"

#define FASTNORM_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using namespace fastnorm;

template <class F>
const char* text_of_failure(F f) {
  static std::string text;
  try {
    f();
    return nullptr;
  } catch (const std::exception& error) {
    text = error.what();
    return text.c_str();
  }
}

}  // namespace

FASTNORM_EXPORT const char* fastnorm_ptx_load(const char* text) {
  return text_of_failure([&] { ptx::load(text); });
}

FASTNORM_EXPORT const char* fastnorm_ptx_load_file(const char* path) {
  return text_of_failure([&] { ptx::load_file(path); });
}

// memory: pairs of an address and a number of bytes, which the kernel may access.
FASTNORM_EXPORT const char* fastnorm_ptx_run(const char* kernel, int64_t blocks, int threads, int64_t shared_bytes,
                                             int cluster, bool cooperative, const char* parameters, int64_t bytes,
                                             const char* order, uint64_t seed, bool races, const uint64_t* memory,
                                             int64_t ranges) {
  return text_of_failure([&] {
    ptx::Allocations allowed;
    for (int64_t r = 0; r < ranges; ++r) allowed.add(memory[2 * r], memory[2 * r + 1]);
    ptx::run(kernel, {blocks, threads, shared_bytes, cluster, cooperative},
             std::string(parameters, static_cast<size_t>(bytes)),
             {emulator::order_named(order), seed, races, true, allowed});
  });
}

// A line each.
FASTNORM_EXPORT const char* fastnorm_ptx_launched() {
  static std::string text;
  text.clear();
  for (const std::string& name : ptx::launched()) text += name + "\n";
  return text.c_str();
}

// A line for each instruction of a kernel, in their order: "ld.global.f32 ISSUED"; none where it was not launched.
FASTNORM_EXPORT const char* fastnorm_ptx_issued(const char* kernel) {
  static std::string text;
  text.clear();
  ptx::with_machine([&](ptx::Machine& machine) {
    for (const auto& [opcode, count] : machine.counters().issued[kernel]) {
      text += opcode + " " + std::to_string(count) + "\n";
    }
  });
  return text.c_str();
}

FASTNORM_EXPORT void fastnorm_ptx_look_for_races(bool on) { ptx::look_for_races(on); }
FASTNORM_EXPORT void fastnorm_ptx_count_transactions(bool on) { ptx::count_transactions(on); }

// A line for every opcode: "ld.global.f32 ISSUED THREADS ENABLED"; and one for every kind of memory access:
// "global_read WARPS THREADS BYTES TRANSACTIONS".
FASTNORM_EXPORT const char* fastnorm_ptx_counters() {
  static std::string text;
  text.clear();
  ptx::with_machine([](ptx::Machine& machine) {
    const ptx::Counters& counters = machine.counters();
    const auto add = [](const std::string& name, std::initializer_list<uint64_t> numbers) {
      text += name;
      for (const uint64_t n : numbers) (text += ' ') += std::to_string(n);
      text += "\n";
    };
    for (const auto& [opcode, count] : counters.instructions) {
      add(opcode, {count.issued, count.threads, count.enabled});
    }
    const auto access = [&](const char* name, const ptx::AccessCount& c) {
      add(name, {c.warps, c.threads, c.bytes, c.transactions});
    };
    access("global_read", counters.global_read);
    access("global_written", counters.global_written);
    access("shared_read", counters.shared_read);
    access("shared_written", counters.shared_written);
  });
  return text.c_str();
}
FASTNORM_EXPORT void fastnorm_ptx_reset_counters() {
  ptx::with_machine([](ptx::Machine& machine) { machine.counters() = {}; });
}
