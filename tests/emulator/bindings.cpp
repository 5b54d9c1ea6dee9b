// The emulator's controls for Python, by ctypes: see backend.py. Part of fastnorm_emulated.so, beside the ops.
#include <algorithm>
#include <iterator>
#include <sstream>
#include <stdexcept>
#include <string>

#include "runtime.h"
#include "torch/gang_refusals.h"
#include "torch/plan_cache.h"

#define FASTNORM_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using namespace fastnorm;

// Runs f. Returns the text of what it throws, null on success.
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

// A struct of numbers as text and back: "capability=90 num_sms=132 ...". Fields go by name, so that no order has to be
// kept on both sides.
template <class Struct>
std::string text_of_fields(const Struct& s) {
  std::ostringstream text;
  for_each_field(
      s, [&](std::string_view name, const auto& value) { text << name << '=' << static_cast<int64_t>(value) << ' '; });
  return text.str();
}
template <class Struct>
Struct fields_of_text(const std::string& text) {
  Struct s{};
  std::istringstream words(text);
  size_t found = 0;
  for (std::string word; words >> word; ++found) {
    const size_t at = word.find('=');
    bool known = false;
    for_each_field(s, [&](std::string_view name, auto& value) {
      if (name != std::string_view(word).substr(0, at)) return;
      value = static_cast<std::decay_t<decltype(value)>>(std::stoll(word.substr(at + 1)));
      known = true;
    });
    if (!known) throw std::runtime_error("emulator: " + word + " names no field");
  }
  if (found != std::tuple_size_v<decltype(fields(s))>) throw std::runtime_error("emulator: not all fields: " + text);
  return s;
}

}  // namespace

FASTNORM_EXPORT const char* fastnorm_emulator_device(const char* name, const char** facts) {
  return text_of_failure([&] {
    static std::string text;
    text = text_of_fields(emulator::device_named(name));
    *facts = text.c_str();
  });
}

FASTNORM_EXPORT const char* fastnorm_emulator_configure(const char* order, uint64_t seed, int blocks_together,
                                                        const char* facts, const char* refuses, int free_sms,
                                                        const char* forced) {
  return text_of_failure([&] {
    emulator::Settings settings;
    settings.order = emulator::order_named(order);
    settings.seed = seed;
    settings.blocks_together = blocks_together;
    settings.device = fields_of_text<DeviceInfo>(facts);
    settings.refusals.kind = emulator::refuses_named(refuses);
    emulator::configure(settings);
    ops::shared_options().set({free_sms, fields_of_text<Forced>(forced)});
  });
}

FASTNORM_EXPORT int64_t fastnorm_emulator_refused_gangs() { return ops::refused_gangs(); }

FASTNORM_EXPORT void fastnorm_emulator_reset_counters() { emulator::reset_counters(); }

FASTNORM_EXPORT void fastnorm_emulator_traffic(uint64_t* read_stream, uint64_t* read_parameter,
                                               uint64_t* written_stream, uint64_t* written_parameter) {
  *read_stream = emulator::traffic.read[0];
  *read_parameter = emulator::traffic.read[1];
  *written_stream = emulator::traffic.written[0];
  *written_parameter = emulator::traffic.written[1];
}

FASTNORM_EXPORT int64_t fastnorm_emulator_launch_count() { return emulator::launch_count(); }

// From now on models an empty L2 of the device's size, or none.
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
