// Where a call runs. The ops check and allocate alike for all backends; a backend has its memory and its kernels.
#pragma once

#include <ATen/core/Tensor.h>

#include "core/args.h"
#include "core/images.h"

namespace fastnorm::ops {

// Arguments are checked, outputs allocated, and no tensor is empty; all lie on `device`.
struct Backend {
  at::Tensor (*make_empty)(at::IntArrayRef sizes, at::ScalarType type, at::MemoryFormat format, at::Device device);
  void (*forward)(const ForwardArgs& args, at::Device device);  // moves args.running too
  void (*backward)(const BackwardArgs& args, at::Device device);
  void (*fold_partials)(const FoldArgs& args, at::Device device);
  void (*update_running_stats)(const RunningArgs& args, at::Device device);
  void (*normalize_images)(const ImageArgs& args, at::Device device);
};

extern const Backend kCpuBackend;   // backend_cpu.cpp
extern const Backend kCudaBackend;  // backend_cuda.cpp, in a build that has CUDA kernels

// That of a tensor's device, which the op's other tensors then share.
const Backend& backend_of(const at::Tensor& t, const char* name);  // backend.cpp

}  // namespace fastnorm::ops
