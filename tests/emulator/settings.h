// A test's choices: the order in which threads run, and the device.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "device.h"

namespace fastnorm::emulator {

enum class Order {
  kFifo,      // blocks and threads ascending, all to the next barrier before one goes on
  kLifo,      // descending; who passes a barrier last runs on first
  kRandom,    // any block next; at every switch any thread that can run
  kPriority,  // any block next; blocks, warps and lanes have random ranks, and the highest that can run always does
};

inline Order order_named(const std::string& name) {
  if (name == "fifo") return Order::kFifo;
  if (name == "lifo") return Order::kLifo;
  if (name == "random") return Order::kRandom;
  if (name == "priority") return Order::kPriority;
  throw std::runtime_error("emulator: no order named " + name + "; there are fifo, lifo, random, priority");
}

// CUDA's codes of the errors that the emulator answers with.
constexpr int kInvalidValue = 1, kCooperativeTooLarge = 720, kCaptureEnded = 901;

// The launches that a device refuses although its facts allow them.
enum class Refuses {
  kNothing,
  kGangs,                // in clusters or a cooperative grid, as one that is shared or partitioned
  kGangsInCapture,       // and the refusal ends a stream capture: every launch after it fails
  kCooperativeClusters,  // as a driver that does not know the two together
};

inline Refuses refuses_named(const std::string& name) {
  if (name == "nothing") return Refuses::kNothing;
  if (name == "gangs") return Refuses::kGangs;
  if (name == "gangs in a capture") return Refuses::kGangsInCapture;
  if (name == "cooperative clusters") return Refuses::kCooperativeClusters;
  throw std::runtime_error("emulator: a device does not refuse " + name +
                           "; there are nothing, gangs, gangs in a capture, cooperative clusters");
}

struct Refusals {
  Refuses kind = Refuses::kNothing;
  bool capture_ended = false;
};

struct Settings {
  Order order = Order::kFifo;
  uint64_t seed = 0;
  // Blocks that run side by side where a launch asks for no more. One after the other is fastest; ThreadSanitizer sees
  // a race between two blocks only while they do.
  int blocks_together = 1;
  DeviceInfo device = device_named("h200");
  Refusals refusals;
  // Leaves out a barrier or a wait for copies, such as "fold.cuh:57", to see whether that is noticed. Of the waits on a
  // line, "gang.cuh:57 pending 1" leaves out those after which one group may be under way.
  std::string without;
  bool leaves_out(const std::string& file, unsigned line, int pending) const {
    if (without.empty()) return false;
    const std::string place = file + ":" + std::to_string(line), wait = place + " pending " + std::to_string(pending);
    return place.ends_with("/" + without) || wait.ends_with("/" + without);
  }
};

}  // namespace fastnorm::emulator
