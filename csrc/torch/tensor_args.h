// Tensors to kernel arguments: the checks that every op shares, and the view of a tensor as Geometry.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "core/args.h"

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

inline void check_on(const Tensor& t, const char* name, at::Device device) {
  TORCH_CHECK(t.device() == device && t.layout() == at::kStrided, "fastnorm: ", name, " is a ", t.layout(),
              " tensor on ", t.device(), ", expected a dense one on ", device, " like the others");
  TORCH_CHECK(reinterpret_cast<uintptr_t>(t.const_data_ptr()) % t.element_size() == 0, "fastnorm: ", name,
              " begins at ", t.const_data_ptr(), ", expected a multiple of its elements' size");
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

// weight, bias, mean, var: of the view's parameter sizes, of x's dtype or float32 (float64 only with float64).
inline void check_params(const OptTensor& t, const char* name, const Tensor& x, const View& view) {
  if (!present(t)) return;
  check_on(*t, name, x.device());
  TORCH_CHECK(t->sizes() == view.params(), "fastnorm: ", name, " has shape ", t->sizes(), ", expected ", view.params());
  const bool fits =
      t->scalar_type() == x.scalar_type() || (t->scalar_type() == at::kFloat && x.scalar_type() != at::kDouble);
  TORCH_CHECK(fits, "fastnorm: ", name, " has dtype ", t->scalar_type(), " with x of ", x.scalar_type(),
              ", expected x's dtype or float32");
}

// residual, dy: shape and dtype of x.
inline void check_like_x(const Tensor& t, const char* name, const Tensor& x) {
  check_on(t, name, x.device());
  TORCH_CHECK(t.sizes() == x.sizes(), "fastnorm: ", name, " has shape ", t.sizes(), ", expected x's ", x.sizes());
  TORCH_CHECK(t.scalar_type() == x.scalar_type(), "fastnorm: ", name, " has dtype ", t.scalar_type(), ", expected x's ",
              x.scalar_type());
}

// Checked parameters as a kernel takes them. `keep` holds the memory where the tensor itself is not contiguous.
inline Params params_of(const OptTensor& t, Tensor& keep) {
  if (!present(t)) return {nullptr, DType::kFloat32};
  keep = t->contiguous();
  return {keep.const_data_ptr(), dtype_of(keep, "a parameter")};
}

}  // namespace fastnorm::ops
