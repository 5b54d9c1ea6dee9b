// The kernel interface: plain structs, raw pointers, sizes. Nothing here knows a framework. What is checked before a
// kernel runs is checked by the caller (csrc/torch); kernels only compute.
#pragma once

#include <cstdint>

#include "activation.h"
#include "dtype.h"
#include "geometry.h"
#include "plan.h"

namespace fastnorm {

// How the caller's thread pool is reached: runs body(context, task) for every task, in any order, on any thread.
struct Parallel {
  int threads;
  void (*run)(int64_t tasks, void (*body)(void*, int64_t), void* context);
};

// A vector of C parameters of its own type; null pointers mean "absent".
struct Params {
  const void* data;
  DType dtype;
};

// y = act((x - mean) * rstd * weight + bias + residual), x and y as geometry says, all dense.
struct ForwardArgs {
  Geometry geometry;
  CpuPlan plan;
  Parallel parallel;
  DType dtype;
  const void* x;
  const void* residual;  // or null
  void* y;
  uint8_t* mask;                     // mask_bytes(...) or null: one bit per element, the side of a two-sided activation
  Params weight, bias;               // [C]
  Params running_mean, running_var;  // [C]: frozen statistics, or null
  void* stats;  // [4, sets] of Accum<dtype>: mean, rstd, biased variance, what mean lost by rounding
  double eps;
  Activation activation;
  double activation_param;
};

// d = dy * act'(z); dx = rstd * (w d - mean(w d) - xhat mean(w d xhat)), or rstd w d when frozen;
// dweight = sum(d xhat), dbias = sum(d), dresidual = d. A null output is not computed.
struct BackwardArgs {
  Geometry geometry;
  CpuPlan plan;
  Parallel parallel;
  DType dtype;
  const void* dy;
  const void* x;
  const void* residual;
  const uint8_t* mask;
  Params weight, bias;
  const void* stats;
  bool frozen;
  Activation activation;
  double activation_param;
  void* dx;
  void* dresidual;
  double* dweight;  // [C]
  double* dbias;    // [C]
};

// Bytes of the mask: every run (planar) or position (channels last) starts at a whole pack.
inline int64_t mask_row_bytes(int64_t run, DType dtype) {
  const int64_t lanes = dtype == DType::kFloat64 ? 8 : 16;
  return (run + lanes - 1) / lanes * lanes / 8;
}
inline int64_t mask_run(const Geometry& g) {
  return g.traversal() == Traversal::kColumns ? g.C : g.per_element() ? g.D() : g.S;
}
inline int64_t mask_bytes(const Geometry& g, DType dtype) {
  const int64_t run = mask_run(g);
  return run == 0 ? 0 : g.numel() / run * mask_row_bytes(run, dtype);
}

namespace cpu {

// One per instruction set; csrc/cpu/dispatch.cpp picks at load time.
struct Kernels {
  const char* name;
  void (*forward)(const ForwardArgs&);
  void (*backward)(const BackwardArgs&);
};
const Kernels& kernels();

}  // namespace cpu
}  // namespace fastnorm
