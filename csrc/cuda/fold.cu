// The kernels that depend on accumulation types only, and the queries of the device.
#include "fold.cuh"

#include <algorithm>

namespace fastnorm::cuda {

namespace {

// Enough for any device: blocks take items in strides.
constexpr int64_t kMaxFoldBlocks = 4096;

LaunchConfig by_channel_config(int64_t channels, void* stream) {
  const int64_t blocks = std::clamp<int64_t>((channels + kBlockThreads - 1) / kBlockThreads, 1, kMaxFoldBlocks);
  return {blocks, kBlockThreads, 0, stream};
}

LaunchConfig fold_config(int64_t warps, void* stream) {
  const int64_t blocks = std::clamp<int64_t>((warps + kFoldWarps - 1) / kFoldWarps, 1, kMaxFoldBlocks);
  return {blocks, kBlockThreads, 0, stream};
}

template <class A>
int fold_params_on(const FoldParamsArgs<A>& f, void* stream) {
  const int64_t blocks = fold_params_blocks(f.channels, f.outer * f.pieces, kBlockThreads);
  return launch(fold_params_alone<A>, LaunchConfig{blocks, kBlockThreads, 0, stream}, f);
}

}  // namespace

int launch_fold_forward(const FoldForwardArgs<float>& f, void* stream) {
  return launch(fold_forward<float>, fold_config(f.sets, stream), f);
}
int launch_fold_forward(const FoldForwardArgs<double>& f, void* stream) {
  return launch(fold_forward<double>, fold_config(f.sets, stream), f);
}
int launch_fold_terms(const FoldTermsArgs<float>& f, void* stream) {
  return launch(fold_terms<float>, fold_config(f.sets, stream), f);
}
int launch_fold_terms(const FoldTermsArgs<double>& f, void* stream) {
  return launch(fold_terms<double>, fold_config(f.sets, stream), f);
}
int launch_given_terms(const GivenTermsArgs<float>& f, void* stream) {
  return launch(given_terms<float>, by_channel_config(f.channels, stream), f);
}
int launch_given_terms(const GivenTermsArgs<double>& f, void* stream) {
  return launch(given_terms<double>, by_channel_config(f.channels, stream), f);
}
int launch_fold_params(const FoldParamsArgs<float>& f, void* stream) { return fold_params_on(f, stream); }
int launch_fold_params(const FoldParamsArgs<double>& f, void* stream) { return fold_params_on(f, stream); }
int64_t fold_params_blocks(int64_t channels, int64_t partials, int threads) {
  return std::clamp<int64_t>((channels * fold_lanes(partials) + threads - 1) / threads, 1, kMaxFoldBlocks);
}

int launch_update_running_stats(const RunningArgs& r, void* stream) {
  const LaunchConfig config = by_channel_config(r.cumulative ? 1 : r.channels, stream);
  return r.dtype == DType::kFloat64 ? launch(update_running<double>, config, r)
                                    : launch(update_running<float>, config, r);
}

int launch_fold_partials(const FoldArgs& f, void* stream) {
  const LaunchConfig config = fold_config(f.channels, stream);
  return f.dtype == DType::kFloat64 ? launch(fold_partials<double>, config, f)
                                    : launch(fold_partials<float>, config, f);
}

const char* error_string(int error) { return platform_error_string(error % kGangRefused); }
int device_info(int device, DeviceInfo* info) {
  return query_device(device, reinterpret_cast<const void*>(&update_running<float>), info);
}

}  // namespace fastnorm::cuda
