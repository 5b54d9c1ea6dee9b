// The production kernels without torch: every case of drive_cases.h, planned for one device, forward and backward under
// several schedules, whose results must agree to the bit and be finite. Then once more with two blocks, which take the
// work that the plan gave to many. The build makes it plain and with the sanitizers.
//
//   drive_kernels DEVICE LAST_SEED BLOCKS_TOGETHER [BARRIER]    exit status 1 where something differs or is reported
//
// LAST_SEED 0: under fifo alone. BARRIER, such as "fold.cuh:57" or "gang.cuh:57 pending 1", is left out.
// It prints the plans that were taken, such as "forward fused rows cluster 1", one per line.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/formulas.h"
#include "drive_cases.h"
#include "runtime.h"

#include "convert.h"

namespace {

using namespace fastnorm;
using drive::Case;

// Memory of exactly so many elements, so that AddressSanitizer knows its end.
class Buffer {
 public:
  Buffer(int64_t bytes, int64_t offset) : bytes_(bytes), offset_(offset), memory_(new unsigned char[bytes + offset]) {
    std::memset(memory_.get(), 0xff, static_cast<size_t>(bytes + offset));  // NaN until written
  }
  unsigned char* data() const { return memory_.get() + offset_; }
  std::vector<unsigned char> bits() const { return {data(), data() + bytes_}; }

 private:
  int64_t bytes_, offset_;
  std::unique_ptr<unsigned char[]> memory_;
};

void write(void* data, DType dtype, int64_t i, double v) {
  switch (dtype) {
    case DType::kFloat64: static_cast<double*>(data)[i] = v; break;
    case DType::kFloat32: static_cast<float*>(data)[i] = static_cast<float>(v); break;
    case DType::kBFloat16: static_cast<BFloat16*>(data)[i] = emulator::narrow_bfloat16(static_cast<float>(v)); break;
    default: static_cast<Float16*>(data)[i] = emulator::narrow_float16(static_cast<float>(v)); break;
  }
}
double read(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::kFloat64: return static_cast<const double*>(data)[i];
    case DType::kFloat32: return static_cast<double>(static_cast<const float*>(data)[i]);
    case DType::kBFloat16: return static_cast<double>(emulator::widen(static_cast<const BFloat16*>(data)[i]));
    default: return static_cast<double>(emulator::widen(static_cast<const Float16*>(data)[i]));
  }
}

// Numbers between -1 and 1 about `middle`, from a sequence of their own.
Buffer numbers(int64_t count, DType dtype, int offset, uint64_t sequence, double middle = 0) {
  Buffer buffer(count * size_of(dtype), offset * size_of(dtype));
  uint64_t state = sequence * 0x9e3779b97f4a7c15u + 1;
  for (int64_t i = 0; i < count; ++i) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    write(buffer.data(), dtype, i, middle + std::ldexp(static_cast<double>(state >> 33), -30) - 1);
  }
  return buffer;
}

void check_finite(const Buffer& buffer, DType dtype, int64_t count, const std::string& name) {
  for (int64_t i = 0; i < count; ++i) {
    if (std::isfinite(read(buffer.data(), dtype, i))) continue;
    throw std::runtime_error(name + "[" + std::to_string(i) + "] is not finite");
  }
}
void check_launch(int error) {
  if (error != 0) throw std::runtime_error(std::string("launch: ") + cuda::error_string(error));
}
void check_launches(int64_t planned) {
  const int64_t found = emulator::launch_count();
  if (found == planned) return;
  throw std::runtime_error(std::to_string(found) + " launches where the plan has " + std::to_string(planned));
}

// A plan in few words: for a fused one, also its gang and number of stages.
std::string text_of(Strategy strategy, const Grid& grid) {
  const std::string text = std::string(name_of(strategy)) + " " + name_of(grid.traversal);
  if (strategy != Strategy::kFused) return text;
  const char* const kept = grid.place() == Place::kRegisters ? name_of(grid.place()) : name_of(grid.gang);
  return text + " " + kept + " " + std::to_string(grid.stages);
}
std::string text_of(const Forced& f) {
  if (f.place >= 0)
    return std::string(", ") + name_of(static_cast<Place>(f.place)) + ", stages " + std::to_string(f.stages);
  if (f.gang < 0) return {};
  return std::string(", ") + name_of(static_cast<Gang>(f.gang)) + " of " + std::to_string(f.pieces) + ", stages " +
         std::to_string(f.stages);
}

// The inputs of a case, and its results under one schedule.
class Call {
 public:
  Call(const Case& c, const DeviceInfo& device, int64_t most_blocks, std::set<std::string>& plans)
      : case_(c), g_(c.geometry), device_(device), most_blocks_(most_blocks), plans_(plans) {}

  // All outputs, one after the other.
  std::vector<unsigned char> run() {
    results_.clear();
    forward();
    backward();
    running();
    return results_;
  }

 private:
  DType accum() const { return case_.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }
  Buffer tensor() const { return Buffer(g_.numel() * size_of(case_.dtype), case_.offset * size_of(case_.dtype)); }
  int alignment() const {
    const int64_t bytes = case_.offset * size_of(case_.dtype) | 16;
    return static_cast<int>(bytes & -bytes);
  }
  // The plan that make(device) gives; of a device without gangs where the emulator cannot run all threads of one: with
  // ThreadSanitizer it has few.
  template <class Make>
  auto fitting(Make make) const {
    const auto plan = make(device_);
    const Grid& grid = main_grid(plan);
    if (grid.gang == Gang::kBlock || grid.pieces * grid.threads() <= emulator::kMostThreads) return plan;
    DeviceInfo without = device_;
    without.cooperative = false;
    without.largest_cluster = 1;
    return make(without);
  }
  // Gangs stay whole.
  void limit(Grid& grid) const {
    const int64_t gang = grid.gang == Gang::kBlock ? 1 : grid.pieces;
    const int64_t most = std::min(most_blocks_, emulator::kMostThreads / grid.threads());
    grid.blocks = std::min(grid.blocks, std::max(gang, most / gang * gang));
  }
  Params params(const Buffer& buffer) const { return {case_.affine ? buffer.data() : nullptr, case_.params}; }
  void keep(const Buffer& buffer) {
    const std::vector<unsigned char> bits = buffer.bits();
    results_.insert(results_.end(), bits.begin(), bits.end());
  }
  void keep(const Buffer& buffer, DType dtype, int64_t count, const std::string& name) {
    check_finite(buffer, dtype, count, name);
    keep(buffer);
  }

  void forward() {
    ForwardArgs args{};
    args.geometry = g_;
    args.dtype = case_.dtype;
    args.x = x_.data();
    args.residual = case_.residual ? residual_.data() : nullptr;
    const Buffer y = tensor();
    args.y = y.data();
    args.mask = case_.mask ? mask_.data() : nullptr;
    args.weight = params(weight_);
    args.bias = params(bias_);
    if (case_.frozen) {
      args.running_mean = {mean_.data(), case_.params};
      args.running_var = {var_.data(), case_.params};
    }
    args.stats = stats_.data();
    args.eps = 1e-5;
    args.activation = case_.activation;
    args.activation_param = 0.01;
    Moved moved(case_);
    if (g_.kind == Kind::kBatch && !case_.frozen) args.running = running_args(moved, false);
    const ForwardNeeds needs{alignment(), true, case_.frozen, case_.residual, case_.activation};
    ForwardPlan plan =
        fitting([&](const DeviceInfo& device) { return plan_forward(g_, case_.dtype, needs, device, options_); });
    limit(plan.grid);
    plans_.insert("forward " + text_of(plan.strategy, plan.grid));
    const Buffer workspace(plan.workspace_bytes, 0);
    emulator::reset_counters();
    check_launch(cuda::launch_forward(args, plan, workspace.data(), nullptr));
    check_launches(plan.launches);
    keep(y, case_.dtype, g_.numel(), "y");
    keep(stats_, accum(), kStatsRows * g_.sets(), "stats");
    keep(mask_);
    if (!args.running.moves()) return;
    // The running statistics, too, have moved in these launches: as a launch of their own moves them, to the bit.
    Moved alone(case_);
    check_launch(cuda::launch_update_running_stats(running_args(alone, false), nullptr));
    if (moved.bits() != alone.bits()) throw std::runtime_error("running statistics differ from those moved alone");
  }

  void backward() {
    BackwardArgs args{};
    args.geometry = g_;
    args.dtype = case_.dtype;
    args.dy = dy_.data();
    args.x = x_.data();
    const bool reads_residual = case_.residual && !case_.mask && case_.activation != Activation::kNone;
    args.residual = reads_residual ? residual_.data() : nullptr;
    args.mask = case_.mask ? mask_.data() : nullptr;
    args.weight = params(weight_);
    args.bias = params(bias_);
    args.stats = stats_.data();
    args.frozen = case_.frozen;
    args.activation = case_.activation;
    args.activation_param = 0.01;
    const Buffer dx = tensor(), dresidual = tensor();
    args.dx = dx.data();
    const bool writes_dresidual = case_.residual && case_.activation != Activation::kNone;
    args.dresidual = writes_dresidual ? dresidual.data() : nullptr;
    const Buffer dweight(g_.C * size_of(case_.params), 0), dbias(g_.C * size_of(case_.params), 0);
    args.dweight = {case_.affine ? dweight.data() : nullptr, case_.params};
    args.dbias = {case_.affine ? dbias.data() : nullptr, case_.params};
    const BackwardNeeds needs{alignment(), reads_residual,   case_.mask,   case_.frozen,
                              true,        writes_dresidual, case_.affine, case_.activation};
    BackwardPlan plan =
        fitting([&](const DeviceInfo& device) { return plan_backward(g_, case_.dtype, needs, device, options_); });
    for (Grid* grid : {&plan.reduce, &plan.apply, &plan.params}) limit(*grid);
    const Grid& grid = plan.strategy == Strategy::kApply ? plan.apply : plan.reduce;
    plans_.insert("backward " + text_of(plan.strategy, grid));
    plans_.insert("parameter sums " + std::string(name_of(plan.param_sums)) + (plan.grid_sync ? ", grid sync" : ""));
    const Buffer workspace(plan.workspace_bytes(), 0);
    emulator::reset_counters();
    check_launch(cuda::launch_backward(args, plan, workspace.data(), nullptr));
    check_launches(plan.launches);
    keep(dx, case_.dtype, g_.numel(), "dx");
    if (writes_dresidual) keep(dresidual, case_.dtype, g_.numel(), "dresidual");
    if (!case_.affine) return;
    keep(dweight, case_.params, g_.C, "dweight");
    keep(dbias, case_.params, g_.C, "dbias");
  }

  // Running statistics before a call.
  struct Moved {
    Buffer mean, var;
    int64_t batches = 3;

    explicit Moved(const Case& c)
        : mean(numbers(c.geometry.C, c.params, 0, 8)), var(numbers(c.geometry.C, c.params, 0, 9, 2)) {}
    std::vector<unsigned char> bits() const {
      std::vector<unsigned char> all = mean.bits();
      for (const unsigned char byte : var.bits()) all.push_back(byte);
      all.push_back(static_cast<unsigned char>(batches));
      return all;
    }
  };
  RunningArgs running_args(Moved& moved, bool cumulative) const {
    RunningArgs args{};
    args.dtype = accum();
    args.stats = stats_.data();
    args.sets = g_.sets();
    args.channels = g_.C;
    args.count = g_.set_size();
    args.unbiased = unbiased(static_cast<double>(args.count));
    args.running_mean = {moved.mean.data(), case_.params};
    args.running_var = {moved.var.data(), case_.params};
    args.mean_stride = args.var_stride = 1;
    args.num_batches_tracked = &moved.batches;
    args.cumulative = cumulative;
    args.momentum = 0.1;
    return args;
  }

  void running() {
    if (g_.kind == Kind::kLayer || case_.frozen || g_.sets() % g_.C != 0) return;
    Moved moved(case_);
    check_launch(cuda::launch_update_running_stats(running_args(moved, case_.residual), nullptr));
    keep(moved.mean, case_.params, g_.C, "running_mean");
    keep(moved.var, case_.params, g_.C, "running_var");
    if (moved.batches != 4) throw std::runtime_error("num_batches_tracked is " + std::to_string(moved.batches));
  }

  const Case& case_;
  const Geometry& g_;
  const DeviceInfo device_;
  const PlanOptions options_{0, case_.forced};
  const int64_t most_blocks_;
  std::set<std::string>& plans_;
  std::vector<unsigned char> results_;
  const Buffer x_ = numbers(g_.numel(), case_.dtype, case_.offset, 1, 0.5);
  const Buffer dy_ = numbers(g_.numel(), case_.dtype, case_.offset, 2);
  const Buffer residual_ = numbers(g_.numel(), case_.dtype, case_.offset, 3);
  const Buffer weight_ = numbers(g_.C, case_.params, 0, 4, 1), bias_ = numbers(g_.C, case_.params, 0, 5);
  const Buffer mean_ = numbers(g_.C, case_.params, 0, 6), var_ = numbers(g_.C, case_.params, 0, 7, 2);
  const Buffer stats_{kStatsRows * g_.sets() * size_of(accum()), 0};
  const Buffer mask_{case_.mask ? mask_bytes(g_, case_.dtype) : 0, 0};
};

// fifo, the reference for the others; lifo; random and priority with the seeds from 1 on.
std::vector<emulator::Settings> schedules(const emulator::Settings& common, int last_seed) {
  std::vector<emulator::Settings> all;
  const auto add = [&](emulator::Order order, int seed) {
    all.push_back(common);
    all.back().order = order;
    all.back().seed = static_cast<uint64_t>(seed);
  };
  add(emulator::Order::kFifo, 0);
  if (last_seed > 0) add(emulator::Order::kLifo, 0);
  for (int seed = 1; seed <= last_seed; ++seed) {
    add(emulator::Order::kRandom, seed);
    add(emulator::Order::kPriority, seed);
  }
  return all;
}

// The defect of a case; empty where there is none.
std::string run_case(const Case& c, const std::vector<emulator::Settings>& all, int64_t most_blocks,
                     std::set<std::string>& plans) {
  std::vector<unsigned char> expected;
  for (const emulator::Settings& settings : all) {
    std::string failure;
    try {
      emulator::configure(settings);
      const std::vector<unsigned char> found = Call(c, settings.device, most_blocks, plans).run();
      if (expected.empty()) expected = found;
      if (found != expected) failure = "other bits than under fifo";
    } catch (const std::exception& error) {
      failure = error.what();
    }
    if (failure.empty()) continue;
    return to_string(c.geometry) + " " + name_of(c.dtype) + text_of(c.forced) + ", order " +
           std::to_string(static_cast<int>(settings.order)) + ", seed " + std::to_string(settings.seed) + ": " +
           failure;
  }
  return {};
}

}  // namespace

int main(int count, char** words) {
  if (count < 4) {
    std::printf("see the head of drive_kernels.cpp\n");
    return 2;
  }
  emulator::Settings common;
  common.device = emulator::device_named(words[1]);
  common.blocks_together = std::atoi(words[3]);
  common.without = count > 4 ? words[4] : "";
  const std::vector<emulator::Settings> all = schedules(common, std::atoi(words[2]));

  std::set<std::string> plans;
  int failures = 0;
  for (const int64_t most_blocks : {INT32_MAX, 2}) {
    for (Case c : drive::cases_of(words[1])) {
      if (!drive::compiled(c)) continue;
      const std::string failure = run_case(c, all, most_blocks, plans);
      if (failure.empty()) continue;
      ++failures;
      std::printf("FAILED %s\n", failure.c_str());
      // The missing barrier was noticed, and that was the question. Under fifo alone: which cases notice it?
      if (!common.without.empty() && all.size() > 1) return 1;
    }
  }
  for (const std::string& plan : plans) std::printf("%s\n", plan.c_str());
  return failures == 0 ? 0 : 1;
}
