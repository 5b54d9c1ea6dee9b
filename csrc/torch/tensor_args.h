// Tensors to kernel arguments: the checks that every op shares, and the view of a tensor as Geometry.
//
// A call that the kernels do not serve is refused by one exception, which Python sees as NotImplementedError, before
// anything is written. The caller then turns to torch's operators. Every other exception is a failure.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "core/args.h"
#include "ops.h"
#include "supported.h"

namespace fastnorm::ops {

using at::Tensor;
using OptTensor = std::optional<Tensor>;

inline bool present(const OptTensor& t) { return t.has_value() && t->defined(); }

inline DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case at::kFloat: return DType::kFloat32;
    case at::kDouble: return DType::kFloat64;
    case at::kBFloat16: return DType::kBFloat16;
    case at::kHalf: return DType::kFloat16;
    default:
      FASTNORM_SUPPORTED(false, name, " has dtype ", t.scalar_type(),
                         ", expected float32, float64, bfloat16 or float16");
  }
}

// Calls f with a zero of the type that ATen has for dtype.
template <class F>
void dispatch_scalar(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat64: return f(double{});
    case DType::kBFloat16: return f(at::BFloat16{});
    case DType::kFloat16: return f(at::Half{});
    default: return f(float{});
  }
}

inline at::ScalarType accum_type(DType dtype) { return dtype == DType::kFloat64 ? at::kDouble : at::kFloat; }

// Whether t is more than sizes: tensors of torch's fake mode and of the meta device have no memory.
inline bool has_data(const Tensor& t) { return !t.is_meta() && !t.key_set().has(c10::DispatchKey::Python); }

inline void check_place(const Tensor& t, const char* name, at::Device device) {
  FASTNORM_SUPPORTED(t.device() == device && t.layout() == at::kStrided, name, " is a ", t.layout(), " tensor on ",
                     t.device(), ", expected a dense one on ", device, " like the others");
}
inline void check_on(const Tensor& t, const char* name, at::Device device) {
  check_place(t, name, device);
  FASTNORM_SUPPORTED(reinterpret_cast<uintptr_t>(t.const_data_ptr()) % t.element_size() == 0, name, " begins at ",
                     t.const_data_ptr(), ", expected a multiple of its elements' size");
}

inline Activation check_activation(int64_t code) {
  FASTNORM_SUPPORTED(code >= 0 && code < kActivations, "activation is ", code, ", expected 0 to ", kActivations - 1);
  return static_cast<Activation>(code);
}

// x as (N, C, S), and the memory format its kernels walk.
struct View {
  Geometry geometry;
  at::MemoryFormat format;
  at::IntArrayRef param_sizes;  // of weight and bias; may point into x's sizes
  int64_t channels;

  View(const Tensor& x, int64_t groups, int64_t normalized_dims);

  // t in this format; t itself when it already is.
  Tensor dense(const Tensor& t) const { return t.contiguous(format); }
  at::IntArrayRef params() const { return param_sizes.empty() ? at::IntArrayRef(channels) : param_sizes; }
};

inline View::View(const Tensor& x, int64_t groups, int64_t normalized_dims) : format(at::MemoryFormat::Contiguous) {
  const at::IntArrayRef sizes = x.sizes();
  const int64_t dims = x.dim();
  FASTNORM_SUPPORTED(
      groups >= 0 && normalized_dims >= kNormalizedChannels && (groups == 0 || normalized_dims == 0),
      "got groups = ", groups, " and normalized_dims = ", normalized_dims,
      ", expected one of them to be positive (group, layer norm), both 0 (batch norm) or normalized_dims to be ",
      kNormalizedChannels, " (layer norm of channels)");
  if (normalized_dims > 0) {
    FASTNORM_SUPPORTED(normalized_dims <= dims, "normalized_dims is ", normalized_dims, ", expected at most x's ", dims,
                       " dims");
    param_sizes = sizes.slice(dims - normalized_dims);
    channels = c10::multiply_integers(param_sizes);
    const int64_t rows = c10::multiply_integers(sizes.slice(0, dims - normalized_dims));
    geometry = {Kind::kLayer, rows, channels, 1, 1, false};
    return;
  }
  FASTNORM_SUPPORTED(dims >= 2, "x has shape ", sizes, ", expected (N, C, *)");
  channels = sizes[1];
  FASTNORM_SUPPORTED(groups == 0 || channels % groups == 0, "x has ", channels,
                     " channels, expected a multiple of groups = ", groups);
  const int64_t spatial = c10::multiply_integers(sizes.slice(2));
  format = x.suggest_memory_format();
  const bool last = format != at::MemoryFormat::Contiguous && channels > 1 && spatial > 1;
  if (normalized_dims == kNormalizedChannels) {
    const bool rows = last || channels == 1 || spatial == 1;  // the channels of a position adjoin
    geometry = {Kind::kLayer, rows ? sizes[0] * spatial : sizes[0], channels, rows ? 1 : spatial, 1, false};
    return;
  }
  geometry = {groups == 0 ? Kind::kBatch : Kind::kGroup, sizes[0], channels, spatial,
              groups == 0 ? channels : groups,           last};
}

// Two tensors that go together (weight and bias, mean and var) have one dtype.
inline void check_same_dtype(const OptTensor& a, const OptTensor& b, const char* names) {
  FASTNORM_SUPPORTED(!present(a) || !present(b) || a->scalar_type() == b->scalar_type(), names, " have dtypes ",
                     a->scalar_type(), " and ", b->scalar_type(), ", expected one");
}

// weight, bias, mean, var: of the view's parameter sizes, of x's dtype or float32 (float64 only with float64).
inline void check_params(const OptTensor& t, const char* name, const Tensor& x, const View& view) {
  if (!present(t)) return;
  check_on(*t, name, x.device());
  FASTNORM_SUPPORTED(t->sizes() == view.params(), name, " has shape ", t->sizes(), ", expected ", view.params());
  const bool fits =
      t->scalar_type() == x.scalar_type() || (t->scalar_type() == at::kFloat && x.scalar_type() != at::kDouble);
  FASTNORM_SUPPORTED(fits, name, " has dtype ", t->scalar_type(), " with x of ", x.scalar_type(),
                     ", expected x's dtype or float32");
}

// residual, dy: shape and dtype of x.
inline void check_like_x(const Tensor& t, const char* name, const Tensor& x) {
  check_on(t, name, x.device());
  FASTNORM_SUPPORTED(t.sizes() == x.sizes(), name, " has shape ", t.sizes(), ", expected x's ", x.sizes());
  FASTNORM_SUPPORTED(t.scalar_type() == x.scalar_type(), name, " has dtype ", t.scalar_type(), ", expected x's ",
                     x.scalar_type());
}

// Checked parameters as a kernel takes them. `keep` holds the memory where the tensor itself is not contiguous.
inline Params params_of(const OptTensor& t, Tensor& keep) {
  if (!present(t)) return {nullptr, DType::kFloat32};
  keep = t->contiguous();
  return {keep.const_data_ptr(), dtype_of(keep, "a parameter")};
}

}  // namespace fastnorm::ops
