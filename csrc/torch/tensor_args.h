// Tensors to kernel arguments: the checks that every op shares, and the view of a tensor as Geometry.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <sys/mman.h>
#include <torch/csrc/stable/c/shim.h>

#include <atomic>
#include <optional>

#include "../kernels.h"

namespace fastnorm::ops {

using at::Tensor;
using OptTensor = std::optional<Tensor>;

inline DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case at::kFloat: return DType::kFloat32;
    case at::kDouble: return DType::kFloat64;
    case at::kBFloat16: return DType::kBFloat16;
    case at::kHalf: return DType::kFloat16;
    default:
      TORCH_CHECK(false, "fastnorm: ", name, " has dtype ", t.scalar_type(),
                  ", expected float32, float64, bfloat16 or float16");
  }
}

inline at::ScalarType accum_type(DType dtype) { return dtype == DType::kFloat64 ? at::kDouble : at::kFloat; }

inline void check_cpu(const Tensor& t, const char* name) {
  TORCH_CHECK(t.device().is_cpu() && t.layout() == at::kStrided, "fastnorm: ", name, " is a ", t.layout(),
              " tensor on ", t.device(), ", expected a dense tensor on cpu");
}

inline Activation check_activation(int64_t code) {
  TORCH_CHECK(code >= 0 && code < kActivations, "fastnorm: activation is ", code, ", expected 0 to ", kActivations - 1);
  return static_cast<Activation>(code);
}

// x as (N, C, S), and the memory format its kernels walk.
struct View {
  Geometry geometry;
  at::MemoryFormat format;
  at::IntArrayRef param_sizes;  // of weight and bias; may point into x's sizes
  int64_t channels;

  View(const Tensor& x, int64_t kind, int64_t groups);

  // t in this format; t itself when it already is.
  Tensor dense(const Tensor& t) const { return t.contiguous(format); }
  at::IntArrayRef params() const { return param_sizes.empty() ? at::IntArrayRef(channels) : param_sizes; }
};

inline View::View(const Tensor& x, int64_t kind, int64_t groups) : format(at::MemoryFormat::Contiguous) {
  TORCH_CHECK(kind >= 0 && kind <= 2, "fastnorm: kind is ", kind, ", expected 0 (batch), 1 (group) or 2 (layer)");
  const at::IntArrayRef sizes = x.sizes();
  const int64_t dims = x.dim();
  if (kind == 2) {
    TORCH_CHECK(groups >= 1 && groups <= dims, "fastnorm: x has ", dims, " dims, expected groups = ", groups,
                " normalized ones to be between 1 and that");
    param_sizes = sizes.slice(dims - groups);
    channels = c10::multiply_integers(param_sizes);
    const int64_t rows = c10::multiply_integers(sizes.slice(0, dims - groups));
    geometry = {Kind::kLayer, rows, channels, 1, 1, false};
    return;
  }
  TORCH_CHECK(dims >= 2, "fastnorm: x has shape ", sizes, ", expected (N, C, *)");
  channels = sizes[1];
  const int64_t spatial = c10::multiply_integers(sizes.slice(2));
  if (kind == 0) groups = channels;
  TORCH_CHECK(kind == 0 || (groups >= 1 && channels % groups == 0), "fastnorm: x has ", channels,
              " channels, expected a multiple of groups = ", groups);
  format = x.suggest_memory_format();
  const bool last = format != at::MemoryFormat::Contiguous && channels > 1 && spatial > 1;
  geometry = {kind == 0 ? Kind::kBatch : Kind::kGroup, sizes[0], channels, spatial, groups, last};
}

inline bool present(const OptTensor& t) { return t.has_value() && t->defined(); }

// Two tensors that go together (weight and bias, mean and var) have one dtype.
inline void check_same_dtype(const OptTensor& a, const OptTensor& b, const char* names) {
  TORCH_CHECK(!present(a) || !present(b) || a->scalar_type() == b->scalar_type(), "fastnorm: ", names, " have dtypes ",
              a->scalar_type(), " and ", b->scalar_type(), ", expected one");
}

// weight, bias, running_mean, running_var: of the given sizes, of x's dtype or float32 (float64 only with float64).
// `keep` holds the memory where the tensor itself is not contiguous.
inline Params check_params(const OptTensor& t, const char* name, const Tensor& x, at::IntArrayRef sizes, Tensor& keep) {
  if (!present(t)) return {nullptr, DType::kFloat32};
  check_cpu(*t, name);
  TORCH_CHECK(t->sizes() == sizes, "fastnorm: ", name, " has shape ", t->sizes(), ", expected ", sizes);
  const bool fits =
      t->scalar_type() == x.scalar_type() || (t->scalar_type() == at::kFloat && x.scalar_type() != at::kDouble);
  TORCH_CHECK(fits, "fastnorm: ", name, " has dtype ", t->scalar_type(), " with x of ", x.scalar_type(),
              ", expected x's dtype or float32");
  if (t->is_contiguous()) return {t->const_data_ptr(), dtype_of(*t, name)};
  keep = t->contiguous();
  return {keep.const_data_ptr(), dtype_of(keep, name)};
}

// residual, dy: shape and dtype of x; returned in the view's format.
inline Tensor check_like_x(const Tensor& t, const char* name, const Tensor& x, const View& view) {
  check_cpu(t, name);
  TORCH_CHECK(t.sizes() == x.sizes(), "fastnorm: ", name, " has shape ", t.sizes(), ", expected x's ", x.sizes());
  TORCH_CHECK(t.scalar_type() == x.scalar_type(), "fastnorm: ", name, " has dtype ", t.scalar_type(), ", expected x's ",
              x.scalar_type());
  return view.dense(t);
}

// From here on an output asks for huge pages: the kernel then clears it 2 MB at a time instead of taking a fault for
// every 4 KB, which for a tensor fresh from the system costs more than all of our arithmetic: BatchNorm2d forward of
// 32x64x112x112 float32 took 1.1 times x.clone() without and 0.34 with (two threads, malloc as it comes).
constexpr size_t kHugePageBytes = size_t(2) << 20, kMinHugeBytes = 4 * kHugePageBytes;

// A new tensor, without the dispatcher's 0.3 us: ops of tiny tensors are made of little else.
inline Tensor make_empty(at::IntArrayRef sizes, at::ScalarType type,
                         at::MemoryFormat format = at::MemoryFormat::Contiguous) {
  return at::detail::empty_cpu(sizes, type, false, format);
}

// The same for a large tensor that the kernels will fill.
inline Tensor make_output(at::IntArrayRef sizes, at::ScalarType type, at::MemoryFormat format) {
  Tensor t = make_empty(sizes, type, format);
#if defined(MADV_HUGEPAGE)
  if (t.nbytes() >= kMinHugeBytes) {
    const auto begin = reinterpret_cast<uintptr_t>(t.mutable_data_ptr()), page = uintptr_t(4096);
    const uintptr_t first = (begin + page - 1) / page * page, end = (begin + t.nbytes()) / page * page;
    madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);  // advice: its failure costs nothing
  }
#endif
  return t;
}

// Tasks are handed out one by one: on a shared machine equal shares finish at unequal times.
inline void run_tasks(int64_t tasks, void (*body)(void*, int64_t), void* context) {
  struct Queue {
    std::atomic<int64_t> next{0};
    int64_t tasks;
    void (*body)(void*, int64_t);
    void* context;
  } queue;
  queue.tasks = tasks;
  queue.body = body;
  queue.context = context;
  const int64_t workers = std::min<int64_t>(tasks, at::get_num_threads());
  const auto work = [](int64_t begin, int64_t end, void* q) {
    Queue& queue = *static_cast<Queue*>(q);
    for (; begin < end; ++begin) {
      for (int64_t t; (t = queue.next.fetch_add(1, std::memory_order_relaxed)) < queue.tasks;) {
        queue.body(queue.context, t);
      }
    }
  };
  // torch's own loop, out of line: this library links no second OpenMP runtime.
  TORCH_CHECK(torch_parallel_for(0, workers, 1, work, &queue) == 0, "fastnorm: a parallel task failed");
}

inline Parallel parallel_for(const Geometry& g) {
  return {g.numel() < kMinParallelElements ? 1 : at::get_num_threads(), run_tasks};
}

CpuInfo cpu_info(int threads);  // cpu_info.cpp

}  // namespace fastnorm::ops
