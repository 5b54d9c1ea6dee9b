// Statistics between our operators and aten's: ours are [kStatsRows, sets], aten's a tensor each.
#pragma once

#include <ATen/ops/add.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/zeros_like.h>

#include <cmath>

#include "backend.h"
#include "ops.h"
#include "tensor_args.h"

namespace fastnorm::ops {

inline const OptTensor kAbsent;

// The dtype that aten saves statistics in: on the CPU x's own, unless parameters are wider.
inline at::ScalarType saved_type(const Tensor& x, std::initializer_list<const OptTensor*> params) {
  const at::ScalarType type = x.scalar_type();
  if (type == at::kDouble || type == at::kFloat) return type;
  if (!x.is_cpu()) return at::kFloat;
  for (const OptTensor* t : params) {
    if (present(*t) && (*t)->scalar_type() == at::kFloat) return at::kFloat;
  }
  return type;
}

// to[i] = from[i], on the CPU and without the dispatcher: calls on small tensors are made of little else.
template <class To, class From>
void convert(To* to, const From* from, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<To>(from[i]);
}

inline Tensor new_tensor(const Tensor& x, at::IntArrayRef sizes, at::ScalarType type) {
  return backend_of(x, "x").make_empty(sizes, type, at::MemoryFormat::Contiguous, x.device());
}
inline Tensor nothing(const Tensor& x, at::ScalarType type) { return new_tensor(x, {0}, type); }

inline Tensor saved_row(const Tensor& stats, StatsRow row, at::IntArrayRef sizes, at::ScalarType type) {
  if (!stats.is_cpu()) return stats.select(0, row).view(sizes);
  const int64_t sets = stats.size(1);
  Tensor saved = new_tensor(stats, sizes, type);
  dispatch_scalar(dtype_of(stats, "stats"), [&](auto from) {
    dispatch_scalar(dtype_of(saved, "statistics"), [&](auto to) {
      convert(saved.mutable_data_ptr<decltype(to)>(), stats.const_data_ptr<decltype(from)>() + row * sets, sets);
    });
  });
  return saved;
}

// Ours from aten's. What rounding cut off the mean is not known; the variance is read to find rows next to the smallest
// numbers, and eps does no harm there.
inline Tensor stats_of(const Tensor& mean, const Tensor& rstd, int64_t sets, DType dtype) {
  for (const auto& [t, name] : {std::pair(&mean, "mean"), std::pair(&rstd, "rstd")}) {
    FASTNORM_SUPPORTED(t->defined() && t->numel() == sets, name, " is absent or has another size than ", sets);
    dtype_of(*t, name);
  }
  const at::ScalarType type = accum_type(dtype);
  if (!mean.is_cpu() || !rstd.is_cpu()) {
    const Tensor r = rstd.reshape({1, sets}).to(type);  // the CUDA kernels do not read the variance
    return at::cat({mean.reshape({1, sets}).to(type), r, r, at::zeros_like(r)});
  }
  Tensor stats = new_tensor(mean, {kStatsRows, sets}, type);
  const Tensor dense_mean = mean.contiguous(), dense_rstd = rstd.contiguous();
  dispatch_scalar(dtype_of(stats, "stats"), [&](auto zero) {
    using A = decltype(zero);
    A* const s = stats.mutable_data_ptr<A>();
    for (const auto& [t, row] : {std::pair(&dense_mean, kMean), std::pair(&dense_rstd, kRstd)}) {
      dispatch_scalar(dtype_of(*t, "statistics"), [&, t = t, row = row](auto from) {
        convert(s + row * sets, t->template const_data_ptr<decltype(from)>(), sets);
      });
    }
    const A* const r = s + kRstd * sets;
    for (int64_t i = 0; i < sets; ++i) s[kVar * sets + i] = 1 / (r[i] * r[i]);
    std::fill_n(s + kMeanLow * sets, sets, A(0));
  });
  return stats;
}

// 1 / sqrt(var + eps) in float64, as evaluation takes it.
inline Tensor rstd_of(const Tensor& var, double eps) {
  if (!var.is_cpu()) return at::add(var.to(at::kDouble), eps).rsqrt();
  const Tensor dense = var.contiguous();
  Tensor rstd = new_tensor(var, var.sizes(), at::kDouble);
  dispatch_scalar(dtype_of(dense, "running_var"), [&](auto zero) {
    const auto* const v = dense.const_data_ptr<decltype(zero)>();
    auto* const r = rstd.mutable_data_ptr<double>();
    for (int64_t i = 0; i < dense.numel(); ++i) r[i] = 1 / std::sqrt(static_cast<double>(v[i]) + eps);
  });
  return rstd;
}

}  // namespace fastnorm::ops
