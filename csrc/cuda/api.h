// The interface of the CUDA kernels: launches of planned calls.
#pragma once

#include "core/args.h"
#include "plan/types.h"

namespace fastnorm::cuda {

// What a launch returns whose gangs the device cannot hold at a time (cudaErrorCooperativeLaunchTooLarge): it is shared
// or partitioned. Nothing has been enqueued then, and a plan without clusters and cooperation will do.
constexpr int kGangRefused = 720;

// Enqueue on `stream` of the current device; 0 or CUDA's error code, whose text error_string gives. `workspace`: as
// many bytes as the plan says, 16-byte aligned, free for other use once the stream has passed the call.
int launch_forward(const ForwardArgs& args, const ForwardPlan& plan, void* workspace, void* stream);
int launch_backward(const BackwardArgs& args, const BackwardPlan& plan, void* workspace, void* stream);
int launch_update_running_stats(const RunningArgs& args, void* stream);
const char* error_string(int error);

// The facts plans are made of; asked of the driver once a device.
int device_info(int device, DeviceInfo* info);

}  // namespace fastnorm::cuda
