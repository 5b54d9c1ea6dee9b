// The emulator's own test program, which tests/test_emulator.py runs:
//
//   self_test list                              names, one "primitive NAME" or "mutant NAME" a line
//   self_test primitive NAME                    exit status 1 and a text where it fails
//   self_test broken NAME ORDER FIRST LAST      for every seed "NAME bits HASH" or "NAME defect TEXT"
//   self_test correct NAME|all ORDER FIRST LAST the same of its correct twin
#include "self_test.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

using namespace fastnorm;
using namespace fastnorm::self_test;

template <class T>
std::vector<T> joined(std::initializer_list<std::vector<T>> lists) {
  std::vector<T> all;
  for (const std::vector<T>& list : lists) all.insert(all.end(), list.begin(), list.end());
  return all;
}
std::vector<Primitive> all_primitives() {
  return joined({primitives(), conversions(), copy_primitives(), gang_primitives(), host_primitives()});
}
std::vector<Mutant> all_mutants() { return joined({mutants(), copy_mutants(), gang_mutants()}); }

uint64_t hash(const Output& output) {
  uint64_t h = 0xcbf29ce484222325u;
  for (const float value : output) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    h = (h ^ bits) * 0x100000001b3u;
  }
  return h;
}

int list() {
  for (const Primitive& primitive : all_primitives()) std::printf("primitive %s\n", primitive.name.c_str());
  for (const Mutant& mutant : all_mutants()) std::printf("mutant %s\n", mutant.name.c_str());
  return 0;
}

int run_primitive(const std::string& name) {
  for (const Primitive& primitive : all_primitives()) {
    if (primitive.name != name) continue;
    try {
      primitive.run();
    } catch (const std::exception& error) {
      std::printf("%s: %s\n", name.c_str(), error.what());
      return 1;
    }
    return 0;
  }
  std::printf("no primitive %s\n", name.c_str());
  return 2;
}

void run_mutant(const Mutant& mutant, bool broken, const std::string& order, int seed) {
  emulator::Settings settings;
  settings.order = emulator::order_named(order);
  settings.seed = static_cast<uint64_t>(seed);
  settings.blocks_together = mutant.blocks_together;
  emulator::configure(settings);
  try {
    const Output output = mutant.run(broken);
    std::printf("%s bits %016llx\n", mutant.name.c_str(), static_cast<unsigned long long>(hash(output)));
  } catch (const std::exception& error) {
    std::string text = error.what();
    for (char& c : text) c = c == '\n' ? ';' : c;
    std::printf("%s defect %s\n", mutant.name.c_str(), text.c_str());
  }
  std::fflush(stdout);
}

int run_mutants(const std::string& name, bool broken, const std::string& order, int first_seed, int last_seed) {
  bool known = false;
  for (const Mutant& mutant : all_mutants()) {
    if (name != mutant.name && (broken || name != "all")) continue;
    known = true;
    for (int seed = first_seed; seed <= last_seed; ++seed) run_mutant(mutant, broken, order, seed);
  }
  if (!known) std::printf("no mutant %s\n", name.c_str());
  return known ? 0 : 2;
}

}  // namespace

int main(int count, char** words) {
  const std::string verb = count > 1 ? words[1] : "";
  if (verb == "list") return list();
  if (verb == "primitive" && count == 3) return run_primitive(words[2]);
  if ((verb == "broken" || verb == "correct") && count == 6) {
    return run_mutants(words[2], verb == "broken", words[3], std::atoi(words[4]), std::atoi(words[5]));
  }
  std::printf("see the head of self_test.cpp\n");
  return 2;
}
