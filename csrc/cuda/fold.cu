// The kernels that know accumulation types only, and what is asked of the device.
#include "fold.cuh"

#include <algorithm>

namespace fastnorm::cuda {

namespace {

// Enough for any device; blocks take items in strides.
constexpr int64_t kMaxFoldBlocks = 4096;

LaunchConfig fold_config(int64_t warps, void* stream) {
  const int64_t blocks = std::clamp<int64_t>((warps + kFoldWarps - 1) / kFoldWarps, 1, kMaxFoldBlocks);
  return {blocks, kBlockThreads, 0, stream};
}

template <class A>
int fold_backward_on(const FoldBackwardArgs<A>& f, void* stream) {
  const int64_t items = (f.terms == nullptr ? 0 : f.sets) + (f.param_sums == nullptr ? 0 : f.channels);
  return items == 0 ? 0 : launch(fold_backward<A>, fold_config(items, stream), f);
}

}  // namespace

int launch_fold_forward(const FoldForwardArgs<float>& f, void* stream) {
  return launch(fold_forward<float>, fold_config(f.sets, stream), f);
}
int launch_fold_forward(const FoldForwardArgs<double>& f, void* stream) {
  return launch(fold_forward<double>, fold_config(f.sets, stream), f);
}
int launch_fold_backward(const FoldBackwardArgs<float>& f, void* stream) { return fold_backward_on(f, stream); }
int launch_fold_backward(const FoldBackwardArgs<double>& f, void* stream) { return fold_backward_on(f, stream); }

int launch_update_running_stats(const RunningArgs& r, void* stream) {
  if (r.count > 0 && r.channels > 0 && (r.running_mean.data != nullptr || r.running_var.data != nullptr)) {
    const int64_t blocks = std::min((r.channels + kBlockThreads - 1) / kBlockThreads, kMaxFoldBlocks);
    const LaunchConfig config{blocks, kBlockThreads, 0, stream};
    const int error = r.dtype == DType::kFloat64 ? launch(update_running<double>, config, r)
                                                 : launch(update_running<float>, config, r);
    if (error) return error;
  }
  if (r.num_batches_tracked == nullptr) return 0;
  return launch(count_batch<int64_t>, LaunchConfig{1, kWarp, 0, stream}, r.num_batches_tracked);
}

const char* error_string(int error) { return platform_error_string(error); }
int device_info(int device, DeviceInfo* info) { return query_device(device, info); }

}  // namespace fastnorm::cuda
