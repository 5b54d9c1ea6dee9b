// The CUDA backend: it plans a call, takes the workspace from torch's allocator and launches on the current stream. The
// host waits for nothing, so that a graph can capture calls.
//
//   FASTNORM_CUDA_BUILD  the compiler's version and the architectures, as "13.0 sm_80 sm_90 compute_90"; absent where
//                        the build has no CUDA kernels
//   FASTNORM_EMULATE     set for the library of tests/emulator: the same kernels for tensors on the CPU
#include "backend.h"

#if defined(FASTNORM_CUDA_BUILD) || defined(FASTNORM_EMULATE)

#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <mutex>
#include <set>
#include <string>

#include "cuda/api.h"
#include "cuda_stream.h"
#include "gang_refusals.h"
#include "plan/cuda.h"
#include "plan_cache.h"

namespace fastnorm::ops {

namespace {

at::Tensor make_empty(at::IntArrayRef sizes, at::ScalarType type, at::MemoryFormat format, at::Device device) {
  return at::empty(sizes, at::TensorOptions(device).dtype(type), format);
}

// A launch that failed is no refusal. It raises torch.AcceleratorError, and fastnorm does not turn to torch's
// operators.
[[noreturn]] void fail(int error, const std::string& text) {
  throw c10::AcceleratorError({__func__, __FILE__, static_cast<uint32_t>(__LINE__)}, error, "fastnorm: " + text);
}
void check_cuda(int error) {
  if (error != 0) fail(error, std::string("CUDA error: ") + cuda::error_string(error));
}

#if defined(FASTNORM_EMULATE)

// The emulator throws what it finds. Its device changes from test to test.
template <class F>
int launch(F&& f) {
  try {
    return f();
  } catch (const std::runtime_error& found) {
    fail(-1, found.what());
  }
}

DeviceInfo device_info(at::Device) {
  DeviceInfo info{};
  check_cuda(cuda::device_info(0, &info));
  return info;
}

void* current_stream(at::Device) { return nullptr; }

#else

template <class F>
int launch(F&& f) {
  return f();
}

// Machine code (sm_*) runs on devices of its own major version and the same or a later minor one. Intermediate code
// (compute_*) runs on all devices that are as new or newer.
bool built_for(int capability) {
  const std::string build = FASTNORM_CUDA_BUILD;
  for (size_t at = build.find('_'); at != std::string::npos; at = build.find('_', at + 1)) {
    const int arch = std::atoi(build.c_str() + at + 1);
    const bool machine_code = build[at - 1] == 'm';
    if (arch <= capability && (!machine_code || arch / 10 == capability / 10)) return true;
  }
  return false;
}

const DeviceInfo& device_info(at::Device device) {
  struct Facts {
    std::once_flag once;
    DeviceInfo info{};
    bool served = false;
  };
  static Facts known[std::numeric_limits<c10::DeviceIndex>::max() + 1];
  Facts& facts = known[device.index()];
  std::call_once(facts.once, [&] {
    check_cuda(cuda::device_info(device.index(), &facts.info));
    facts.served = built_for(facts.info.capability);
  });
  TORCH_CHECK_NOT_IMPLEMENTED(facts.served, "fastnorm: x is on ", device, " of compute capability ",
                              facts.info.capability / 10, ".", facts.info.capability % 10,
                              ", expected one that this build is for: CUDA " FASTNORM_CUDA_BUILD);
  return facts.info;
}

void* current_stream(at::Device device) {
  void* stream = nullptr;
  TORCH_CHECK(get_cuda_stream(device.index(), &stream), "fastnorm: torch has no CUDA stream on ", device);
  return stream;
}

#endif

// The largest power of two, up to 16, that divides all addresses: the lowest bit that is set in any of them. Null
// pointers have no bit set.
template <class... Pointers>
int common_alignment(Pointers... addresses) {
  const uintptr_t bits = (16 | ... | reinterpret_cast<uintptr_t>(addresses));
  return static_cast<int>(bits & -bits);
}
// Whether the parameters of neighbouring elements are neighbours, so that kernels read them in packs.
bool packs_params(const Geometry& g) {
  return g.per_element() || (g.traversal() == Traversal::kColumns && !g.sets_are_positions());
}

// The workspace of a call. It can be freed on return, because torch's allocator reuses memory in the stream's order.
class Workspace {
 public:
  Workspace(int64_t bytes, at::Device device) {
    if (bytes > 0) memory_ = make_empty({bytes}, at::kByte, at::MemoryFormat::Contiguous, device);
  }
  void* data() const { return memory_.defined() ? memory_.mutable_data_ptr() : nullptr; }

 private:
  at::Tensor memory_;
};

ForwardPlan make_plan(const PlanKey<ForwardNeeds>& key) {
  return plan_forward(key.geometry, key.dtype, key.needs, key.device, key.options);
}
BackwardPlan make_plan(const PlanKey<BackwardNeeds>& key) {
  return plan_backward(key.geometry, key.dtype, key.needs, key.device, key.options);
}

// Whether clusters meet in a cooperative launch.
bool joins_clusters(const ForwardPlan&) { return false; }
bool joins_clusters(const BackwardPlan& plan) { return plan.grid_sync && plan.reduce.gang == Gang::kCluster; }

// Takes away from the device what the refused plan made use of: first cooperative launches with clusters, then gangs.
template <class Plan, class Needs>
void take_away(const Plan& refused, PlanKey<Needs>& key) {
  const bool joins = joins_clusters(refused) && key.device.cooperative_clusters;
  key.device.cooperative_clusters = false;
  if (joins) return;
  key.device.largest_cluster = 1;
  key.device.cluster_sms = 0;
  key.device.cooperative = false;
  key.options = {};
}

std::string direction_of(const ForwardPlan&) { return "forward"; }
std::string direction_of(const BackwardPlan&) { return "backward"; }

std::string environment(const char* name) {
  const char* const value = std::getenv(name);
  return value == nullptr ? "" : value;
}

template <class Plan>
std::string text_of_refusal(const Plan& plan, int error) {
  return "the device refused to run the blocks of a " + direction_of(plan) +
         " launch together, as one that is shared or partitioned does (" + cuda::error_string(error) + "); planned " +
         to_string(plan);
}

// A refusal is counted; FASTNORM_STRICT=1 makes it an error; FASTNORM_LOG=fallback prints the first of its kind.
template <class Plan>
void note_refusal(const Plan& plan, int error) {
  ++refused_gangs();
  const std::string text = "fastnorm: " + text_of_refusal(plan, error);
  TORCH_CHECK(environment("FASTNORM_STRICT") != "1", text, " (FASTNORM_STRICT=1)");
  static std::mutex mutex;
  static std::set<std::string> printed;
  const std::lock_guard<std::mutex> lock(mutex);
  if (environment("FASTNORM_LOG").find("fallback") == std::string::npos) return;
  if (printed.insert(direction_of(plan) + name_of(main_grid(plan).gang)).second) {
    std::fprintf(stderr, "%s\n", text.c_str());
  }
}

// Launches a call as planned. A device may refuse blocks that wait for each other. Then this call and later ones like
// it go by a plan that has none.
template <class Plan, class Needs, class Launch>
void run_planned(const PlanKey<Needs>& key, Launch launch_plan) {
  static PlanCache<Plan, Needs> cache;
  const Plan planned = cache.get(key, [](const auto& k) { return make_plan(k); });
  int error = launch([&] { return launch_plan(planned); });
  if (!cuda::is_gang_refused(error)) return check_cuda(error);

  const int first_error = error;
  PlanKey<Needs> lesser = key;
  Plan plan = planned;
  while (cuda::is_gang_refused(error)) {
    note_refusal(plan, error);
    take_away(plan, lesser);
    plan = make_plan(lesser);
    error = launch([&] { return launch_plan(plan); });
  }
  if (error != 0) {
    fail(error, std::string("CUDA error: ") + cuda::error_string(error) + ", after " +
                    text_of_refusal(planned, first_error) +
                    ". In a stream capture the refusal itself ends the capture: make such a call once before it "
                    "begins, and later ones go by a plan that the device takes");
  }
  cache.put(key, plan);
}

void update_running_stats(const RunningArgs& args, at::Device device) {
  const c10::DeviceGuard guard(device);
  check_cuda(launch([&] { return cuda::launch_update_running_stats(args, current_stream(device)); }));
}

void fold_partials(const FoldArgs& args, at::Device device) {
  const c10::DeviceGuard guard(device);
  check_cuda(launch([&] { return cuda::launch_fold_partials(args, current_stream(device)); }));
}

void forward(const ForwardArgs& args, at::Device device) {
  const c10::DeviceGuard guard(device);
  int alignment = common_alignment(args.x, args.residual, args.y);
  if (packs_params(args.geometry)) {
    alignment = std::min(
        alignment, common_alignment(args.weight.data, args.bias.data, args.running_mean.data, args.running_var.data));
  }
  const ForwardNeeds needs{alignment, args.y != nullptr, args.has_statistics(), args.residual != nullptr,
                           args.activation};
  run_planned<ForwardPlan, ForwardNeeds>(
      {args.geometry, args.dtype, needs, device.index(), device_info(device), shared_options().get()},
      [&](const ForwardPlan& plan) {
        const Workspace workspace(plan.workspace_bytes, device);
        return cuda::launch_forward(args, plan, workspace.data(), current_stream(device));
      });
  if (args.running.moves() && !args.running.moves_set_by_set()) update_running_stats(args.running, device);
}

void backward(const BackwardArgs& args, at::Device device) {
  const c10::DeviceGuard guard(device);
  int alignment = common_alignment(args.dy, args.x, args.residual, args.dx, args.dresidual);
  if (packs_params(args.geometry)) {
    alignment = std::min(alignment, common_alignment(args.weight.data, args.bias.data));
  }
  const bool dx = args.dx != nullptr, dresidual = args.dresidual != nullptr;
  const bool params = args.dweight.data != nullptr || args.dbias.data != nullptr;
  const BackwardNeeds needs{alignment,
                            args.residual != nullptr,
                            args.mask != nullptr,
                            args.frozen || args.sums,
                            dx || dresidual,
                            dx && dresidual,
                            params,
                            args.activation};
  if (!needs.input && !needs.params) return;
  run_planned<BackwardPlan, BackwardNeeds>(
      {args.geometry, args.dtype, needs, device.index(), device_info(device), shared_options().get()},
      [&](const BackwardPlan& plan) {
        const Workspace workspace(plan.workspace_bytes() + cuda::given_terms_bytes(args), device);
        return cuda::launch_backward(args, plan, workspace.data(), current_stream(device));
      });
}

void normalize_images(const ImageArgs& args, at::Device device) {
  const c10::DeviceGuard guard(device);
  device_info(device);  // refuses a device that the build is not for
  check_cuda(launch([&] { return cuda::launch_normalize_images(args, current_stream(device)); }));
}

}  // namespace

const Backend kCudaBackend{make_empty, forward, backward, fold_partials, update_running_stats, normalize_images};

}  // namespace fastnorm::ops

#endif
