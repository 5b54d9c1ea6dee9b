// Storage types: the types of elements in memory. Arithmetic is in Accum<T>: float, or double for double.
#pragma once

#include <cstdint>

// Marks functions that CPU and CUDA threads both call.
#if defined(__CUDACC__)
#define FASTNORM_HOST_DEVICE __host__ __device__
#else
#define FASTNORM_HOST_DEVICE
#endif

// Marks the formulas of the CPU kernels' loops: GCC leaves some of them out of line, and then a pack goes by
// memory.
#if defined(FASTNORM_CPU_CAPABILITY)
#define FASTNORM_FORMULA inline __attribute__((always_inline))
#else
#define FASTNORM_FORMULA FASTNORM_HOST_DEVICE
#endif

namespace fastnorm {

enum class DType : int8_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class T>
struct AccumOf {
  using type = float;
};
template <>
struct AccumOf<double> {
  using type = double;
};
template <class T>
using Accum = typename AccumOf<T>::type;

constexpr int64_t size_of(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }
constexpr int64_t accum_size(DType dtype) { return dtype == DType::kFloat64 ? 8 : 4; }

constexpr const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return "float32";
    case DType::kFloat64: return "float64";
    case DType::kBFloat16: return "bfloat16";
    default: return "float16";
  }
}

// A choice by condition. Vector types overload it and choose lane by lane.
template <class V>
FASTNORM_HOST_DEVICE V select(bool condition, V a, V b) {
  return condition ? a : b;
}

template <class T>
struct Tag {
  using type = T;
};

// Calls f(Tag<T>{}) for the storage type T that dtype names.
template <class F>
decltype(auto) dispatch(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat64: return f(Tag<double>{});
    case DType::kBFloat16: return f(Tag<BFloat16>{});
    case DType::kFloat16: return f(Tag<Float16>{});
    default: return f(Tag<float>{});
  }
}

}  // namespace fastnorm
