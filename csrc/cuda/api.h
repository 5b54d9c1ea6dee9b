// The interface of the CUDA kernels: launches of planned calls.
#pragma once

#include "core/args.h"
#include "core/images.h"
#include "plan/types.h"

namespace fastnorm::cuda {

// A launch returns this plus CUDA's error code where the device does not take the launch's gangs: it is shared or
// partitioned and cannot hold them at the same time, or its driver has no clusters in cooperative launches. Nothing has
// been enqueued then, and a plan without clusters and cooperation works.
constexpr int kGangRefused = 1 << 20;
inline bool is_gang_refused(int error) { return error >= kGangRefused; }

// A backward call whose sums are given has the plan of a frozen one, and workspace for given_terms_bytes more.
inline int64_t given_terms_bytes(const BackwardArgs& args) {
  return args.sums == nullptr ? 0 : 2 * args.geometry.C * (args.dtype == DType::kFloat64 ? 8 : 4);
}

// These enqueue on `stream` of the current device and return 0 or an error, whose text error_string gives.
// `workspace` has as many bytes as the plan says, is 16-byte aligned, and is free for other use once the stream has
// passed the call.
// A forward launch moves running statistics where they move set by set; else launch_update_running_stats does, after
// it.
int launch_forward(const ForwardArgs& args, const ForwardPlan& plan, void* workspace, void* stream);
int launch_backward(const BackwardArgs& args, const BackwardPlan& plan, void* workspace, void* stream);
int launch_update_running_stats(const RunningArgs& args, void* stream);
int launch_normalize_images(const ImageArgs& args, void* stream);
int launch_fold_partials(const FoldArgs& args, void* stream);
const char* error_string(int error);

// The facts that plans are made from, as the driver gives them. Slow: ask once per device.
int device_info(int device, DeviceInfo* info);

}  // namespace fastnorm::cuda
