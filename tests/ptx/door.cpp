#include "door.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "compile.h"
#include "cuda/platform.cuh"
#include "launch_check.h"
#include "runtime.h"

namespace fastnorm::emulator {

Traffic traffic;
std::unique_ptr<L2Model> l2;  // not modelled

}  // namespace fastnorm::emulator

namespace fastnorm::ptx {

namespace {

// Text in memory, or a file that is mapped to it.
class Text {
 public:
  explicit Text(std::string text) : own_(std::move(text)), view_(own_) {}
  explicit Text(int file, size_t bytes) {
    void* const mapped = mmap(nullptr, bytes, PROT_READ, MAP_PRIVATE, file, 0);
    if (mapped == MAP_FAILED) throw Defect("a file that cannot be read");
    view_ = {static_cast<const char*>(mapped), bytes};
  }
  ~Text() {
    if (view_.data() != own_.data()) munmap(const_cast<char*>(view_.data()), view_.size());
  }
  Text(const Text&) = delete;
  std::string_view view() const { return view_; }

 private:
  std::string own_;
  std::string_view view_;
};
struct Loaded {
  Text text;
  Module module;

  template <class... Source>
  explicit Loaded(Source... source) : text(source...), module(parse_module(text.view())) {}
};

struct Door {
  std::mutex one_launch;
  std::map<std::string, std::shared_ptr<const Loaded>> modules;  // by kernel
  std::map<std::string, Kernel> kernels;                         // that have been launched
  Machine machine;
  emulator::Settings settings;
  bool races = true, transactions = false;
  uint64_t launches = 0;
  std::vector<emulator::LaunchRecord> log;
  std::vector<std::string> launched;
  std::string defect;

  const Kernel& kernel(const std::string& name) {
    const auto known = kernels.find(name);
    if (known != kernels.end()) return known->second;
    const auto module = modules.find(name);
    if (module == modules.end()) throw Defect("no kernel " + name);
    return kernels[name] = compile(module->second->module, name);
  }
};

Door& door() {
  static Door& door = *new Door;  // never destroyed: kernels may run while a process ends
  return door;
}

emulator::Traffic traffic_of(const Counters& counters) {
  return {{counters.global_read.bytes, 0}, {counters.global_written.bytes, 0}};
}

// Parameters as the kernel addresses them.
std::vector<unsigned char> packed(const Kernel& kernel, void** arguments) {
  std::vector<unsigned char> bytes(static_cast<size_t>(kernel.parameter_bytes));
  for (size_t p = 0; p < kernel.parameters.size(); ++p) {
    const Parameter& parameter = kernel.parameters[p];
    std::memcpy(bytes.data() + parameter.offset, arguments[p], static_cast<size_t>(parameter.bytes));
  }
  return bytes;
}

}  // namespace

static void take(std::shared_ptr<const Loaded> loaded) {
  Door& d = door();
  const std::lock_guard<std::mutex> lock(d.one_launch);
  for (const auto& [name, entry] : loaded->module.entries) {
    d.modules[name] = loaded;
    d.kernels.erase(name);
  }
}

void load(const std::string& text) { take(std::make_shared<const Loaded>(text)); }

void load_file(const std::string& path) {
  const int file = open(path.c_str(), O_RDONLY);
  struct stat facts{};
  if (file < 0 || fstat(file, &facts) != 0) throw Defect("no file " + path);
  const auto loaded = std::make_shared<const Loaded>(file, static_cast<size_t>(facts.st_size));
  close(file);
  take(loaded);
}

static thread_local const CallMemory* call_memory = nullptr;

CallMemory::CallMemory() : outer_(call_memory) { call_memory = this; }
CallMemory::~CallMemory() { call_memory = outer_; }
Allocations memory_of_call() { return call_memory == nullptr ? Allocations() : call_memory->memory_; }

int launch(const std::string& name, const LaunchShape& shape, void** arguments) {
  Door& d = door();
  const std::lock_guard<std::mutex> lock(d.one_launch);
  try {
    const cuda::LaunchConfig config{shape.blocks, shape.threads, shape.shared_bytes,
                                    nullptr,      shape.cluster, shape.cooperative};
    emulator::check_launch(config, d.settings.device);
    if (const int answer = emulator::answer_of(d.settings.refusals, config)) {
      return answer >= cuda::kGangRefused ? answer - cuda::kGangRefused : answer;
    }
    d.launched.push_back(name);
    const Kernel& kernel = d.kernel(name);
    const std::vector<unsigned char> parameters = packed(kernel, arguments);
    const emulator::Traffic before = traffic_of(d.machine.counters());
    const uint64_t seed = d.settings.seed * 0x9e3779b97f4a7c15u + d.launches++;
    d.machine.run(kernel, shape, parameters.data(),
                  {d.settings.order, seed, d.races, d.transactions, memory_of_call()});
    emulator::traffic = traffic_of(d.machine.counters());
    d.log.push_back({shape.blocks, shape.threads, shape.shared_bytes, shape.cluster, shape.cooperative,
                     emulator::traffic - before, 0});
    return 0;
  } catch (const std::runtime_error& error) {
    d.defect = std::string("ptx: ") + error.what();
    return kLaunchFailure;
  }
}

int refuse(const std::string& why) {
  Door& d = door();
  const std::lock_guard<std::mutex> lock(d.one_launch);
  d.defect = "ptx: launch refused: " + why;
  return kLaunchFailure;
}

const char* last_defect() { return door().defect.c_str(); }
std::vector<std::string> launched() { return door().launched; }

void run(const std::string& name, const LaunchShape& shape, const std::string& parameters, const Options& options) {
  Door& d = door();
  const std::lock_guard<std::mutex> lock(d.one_launch);
  const Kernel& kernel = d.kernel(name);
  if (static_cast<int64_t>(parameters.size()) != kernel.parameter_bytes) {
    throw Defect(name + " has parameters of " + std::to_string(kernel.parameter_bytes) + " bytes");
  }
  alignas(16) std::vector<unsigned char> bytes(parameters.begin(), parameters.end());
  d.machine.run(kernel, shape, bytes.data(), options);
}

void with_machine(const std::function<void(Machine&)>& use) {
  const std::lock_guard<std::mutex> lock(door().one_launch);
  use(door().machine);
}
void look_for_races(bool on) { door().races = on; }
void count_transactions(bool on) { door().transactions = on; }

}  // namespace fastnorm::ptx

// What tests/emulator/bindings.cpp controls: the same settings and records as the emulator's.
namespace fastnorm::emulator {

void configure(const Settings& settings) {
  ptx::Door& d = ptx::door();
  const std::lock_guard<std::mutex> lock(d.one_launch);
  d.settings = settings;
  d.launches = 0;
}
const Settings& settings() { return ptx::door().settings; }

int64_t launch_count() { return static_cast<int64_t>(ptx::door().log.size()); }
const LaunchRecord& launch_record(int64_t number) { return ptx::door().log.at(static_cast<size_t>(number)); }
void reset_counters() {
  ptx::Door& d = ptx::door();
  const std::lock_guard<std::mutex> lock(d.one_launch);
  d.log.clear();
  d.launched.clear();
  d.machine.counters() = {};
  traffic = {};
}

}  // namespace fastnorm::emulator
