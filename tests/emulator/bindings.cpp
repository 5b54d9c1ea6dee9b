// The emulator's controls for Python, by ctypes: see backend.py. Part of fastnorm_emulated.so, beside the ops.
#include <algorithm>
#include <iterator>
#include <string>

#include "runtime.h"
#include "torch/plan_options.h"

#define FASTNORM_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using namespace fastnorm;

// Runs f; what it throws comes back as text, null is success.
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

FASTNORM_EXPORT const char* fastnorm_emulator_device(const char* name, int64_t* facts) {
  return text_of_failure([&] {
    const auto values = facts_of(emulator::device_named(name));
    std::copy(values.begin(), values.end(), facts);
  });
}

// forced: PlanOptions::forced, in its order.
FASTNORM_EXPORT const char* fastnorm_emulator_configure(const char* order, uint64_t seed, int blocks_together,
                                                        const int64_t* facts, bool refuse_gangs, int free_sms,
                                                        const int* forced) {
  return text_of_failure([&] {
    emulator::Settings settings;
    settings.order = emulator::order_named(order);
    settings.seed = seed;
    settings.blocks_together = blocks_together;
    settings.device = {static_cast<int>(facts[0]),
                       static_cast<int>(facts[1]),
                       static_cast<int>(facts[2]),
                       facts[3],
                       facts[4],
                       facts[5],
                       facts[6],
                       static_cast<int>(facts[7]),
                       static_cast<int>(facts[8]),
                       facts[9] != 0};
    settings.refuse_gangs = refuse_gangs;
    emulator::configure(settings);
    plan_options() = {free_sms, {forced[0], forced[1], forced[2], forced[3], forced[4], forced[5]}};
  });
}

FASTNORM_EXPORT void fastnorm_emulator_reset_counters() { emulator::reset_counters(); }

FASTNORM_EXPORT void fastnorm_emulator_traffic(uint64_t* read_stream, uint64_t* read_parameter,
                                               uint64_t* written_stream, uint64_t* written_parameter) {
  *read_stream = emulator::traffic.read[0];
  *read_parameter = emulator::traffic.read[1];
  *written_stream = emulator::traffic.written[0];
  *written_parameter = emulator::traffic.written[1];
}

FASTNORM_EXPORT int64_t fastnorm_emulator_launch_count() { return emulator::launch_count(); }

// An empty L2 of the device's size from now on, or none.
FASTNORM_EXPORT void fastnorm_emulator_model_l2(bool on) {
  emulator::l2 = on ? std::make_unique<emulator::L2Model>(emulator::settings().device.l2_bytes) : nullptr;
}

// Five sizes and five numbers of bytes, as LaunchRecord and Traffic have them.
FASTNORM_EXPORT const char* fastnorm_emulator_launch(int64_t number, int64_t* values) {
  return text_of_failure([&] {
    const emulator::LaunchRecord& r = emulator::launch_record(number);
    const int64_t found[] = {r.blocks, r.threads, r.shared_bytes, r.cluster, r.cooperative};
    std::copy(std::begin(found), std::end(found), values);
    const uint64_t bytes[] = {r.traffic.read[0], r.traffic.read[1], r.traffic.written[0], r.traffic.written[1],
                              r.missed};
    std::copy(std::begin(bytes), std::end(bytes), values + std::size(found));
  });
}
