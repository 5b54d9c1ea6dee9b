// The interface of the CUDA kernels: launches of planned calls.
#pragma once

#include "core/args.h"
#include "plan/types.h"

namespace fastnorm::cuda {

// A launch returns this where the device is shared or partitioned and cannot hold the launch's gangs at the same time
// (cudaErrorCooperativeLaunchTooLarge). Nothing has been enqueued then, and a plan without clusters and cooperation
// works.
constexpr int kGangRefused = 720;

// These enqueue on `stream` of the current device and return 0 or CUDA's error code; error_string gives its text.
// `workspace` has as many bytes as the plan says, is 16-byte aligned, and is free for other use once the stream has
// passed the call.
int launch_forward(const ForwardArgs& args, const ForwardPlan& plan, void* workspace, void* stream);
int launch_backward(const BackwardArgs& args, const BackwardPlan& plan, void* workspace, void* stream);
int launch_update_running_stats(const RunningArgs& args, void* stream);
const char* error_string(int error);

// The facts that plans are made from, as the driver gives them. Slow: ask once per device.
int device_info(int device, DeviceInfo* info);

}  // namespace fastnorm::cuda
