// The only door to CUDA: everything that kernels use of the toolkit, under our names. With FASTNORM_EMULATE defined the
// same names come from the emulator in tests/emulator, and the .cu files compile with g++ and run on the CPU.
#pragma once

#include <cstdint>
#include <type_traits>

#include "api.h"

namespace fastnorm::cuda {

// How a kernel is launched. Blocks and grids have one dimension.
struct LaunchConfig {
  int64_t blocks;
  int threads;
  int64_t shared_bytes;
  void* stream;
  int cluster = 1;           // blocks of a cluster
  bool cooperative = false;  // all blocks resident, sync_grid allowed
};

// Whether copies to shared memory go through the registers of their threads.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr bool kCopiesThroughRegisters = true;
#else
constexpr bool kCopiesThroughRegisters = false;
#endif

}  // namespace fastnorm::cuda

#if defined(FASTNORM_EMULATE)

#include "emulator.h"

#else

// Without the standard library of CUDA, whose headers take nvcc 5 seconds a file.
#define _CG_LIMIT_INCLUDED_DEPENDENCIES
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>

#define FASTNORM_DEVICE __device__ __forceinline__
// A kernel for blocks of at most `threads` threads. It uses few enough registers for `blocks` blocks per SM.
#define FASTNORM_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)

namespace fastnorm::cuda {

FASTNORM_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
FASTNORM_DEVICE int block_threads() { return static_cast<int>(blockDim.x); }
FASTNORM_DEVICE int64_t block_index() { return static_cast<int>(blockIdx.x); }
FASTNORM_DEVICE int64_t grid_blocks() { return static_cast<int>(gridDim.x); }

// The block's dynamic shared memory, 16-byte aligned.
FASTNORM_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char fastnorm_shared[];
  return fastnorm_shared;
}

FASTNORM_DEVICE void sync_block() { __syncthreads(); }
FASTNORM_DEVICE void sync_warp() { __syncwarp(); }

// All blocks of a cooperative launch.
FASTNORM_DEVICE void sync_grid() { cooperative_groups::this_grid().sync(); }

// Some blocks of a cooperative launch, which have met so many times before. They count their arrivals in global memory,
// from 0.
FASTNORM_DEVICE void sync_blocks(unsigned* arrivals, int blocks, int met) {
  const unsigned all = static_cast<unsigned>(blocks) * static_cast<unsigned>(met + 1);
  sync_block();
  if (thread_index() == 0) {
    unsigned seen;
    asm volatile("atom.add.release.gpu.u32 %0, [%1], 1;" : "=r"(seen) : "l"(arrivals) : "memory");
    do {
      asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(seen) : "l"(arrivals) : "memory");
    } while (static_cast<int>(seen - all) < 0);
  }
  sync_block();
}

// All blocks of a cluster. Below sm_90 a block is a cluster of its own.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
FASTNORM_DEVICE void sync_cluster() { cooperative_groups::this_cluster().sync(); }
// The same, but shows no one what was written before it, and so does not wait until those writes have arrived.
FASTNORM_DEVICE void meet_cluster() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
FASTNORM_DEVICE int cluster_rank() { return static_cast<int>(cooperative_groups::this_cluster().block_rank()); }
FASTNORM_DEVICE int cluster_size() { return static_cast<int>(cooperative_groups::this_cluster().num_blocks()); }
// The same address in the shared memory of block `rank`. A block may read it only while that block runs, so call
// sync_cluster() before the first read and after the last.
template <class T>
FASTNORM_DEVICE T* cluster_shared(T* place, int rank) {
  return cooperative_groups::this_cluster().map_shared_rank(place, rank);
}
#else
FASTNORM_DEVICE void sync_cluster() { __syncthreads(); }
FASTNORM_DEVICE void meet_cluster() { __syncthreads(); }
FASTNORM_DEVICE int cluster_rank() { return 0; }
FASTNORM_DEVICE int cluster_size() { return 1; }
template <class T>
FASTNORM_DEVICE T* cluster_shared(T* place, int) {
  return place;
}
#endif

// shuffle_xor gives v of the lane whose number differs in the bits of `lanes`, shuffle v of lane `lane`. All 32 lanes
// of the warp take part. T is a plain struct of 4-byte words.
template <class T, class Shuffle>
FASTNORM_DEVICE T shuffle_words(T v, Shuffle shuffle_word) {
  static_assert(std::is_trivially_copyable<T>::value && sizeof(T) % 4 == 0, "shuffled word by word");
  union Words {
    T value;
    unsigned word[sizeof(T) / 4];
    __device__ Words() {}
  } words;
  words.value = v;
#pragma unroll
  for (unsigned i = 0; i < sizeof(T) / 4; ++i) words.word[i] = shuffle_word(words.word[i]);
  return words.value;
}
template <class T>
FASTNORM_DEVICE T shuffle_xor(T v, int lanes) {
  return shuffle_words(v, [=](unsigned word) { return __shfl_xor_sync(0xffffffffu, word, lanes); });
}
template <class T>
FASTNORM_DEVICE T shuffle(T v, int lane) {
  return shuffle_words(v, [=](unsigned word) { return __shfl_sync(0xffffffffu, word, lane); });
}

FASTNORM_DEVICE float to_float(BFloat16 v) { return __bfloat162float(__ushort_as_bfloat16(v.bits)); }
FASTNORM_DEVICE float to_float(Float16 v) { return __half2float(__ushort_as_half(v.bits)); }
FASTNORM_DEVICE void from_float(float v, BFloat16& out) { out.bits = __bfloat16_as_ushort(__float2bfloat16_rn(v)); }
FASTNORM_DEVICE void from_float(float v, Float16& out) { out.bits = __half_as_ushort(__float2half_rn(v)); }
// Two halves of a word; the first is in the low bits.
template <class T>
FASTNORM_DEVICE void to_floats(unsigned word, float& low, float& high) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    low = __uint_as_float(word << 16);
    high = __uint_as_float(word & 0xffff0000u);
  } else {
    low = __half2float(__ushort_as_half(static_cast<unsigned short>(word)));
    high = __half2float(__ushort_as_half(static_cast<unsigned short>(word >> 16)));
  }
}
template <class T>
FASTNORM_DEVICE unsigned from_floats(float low, float high) {
  std::conditional_t<std::is_same_v<T, BFloat16>, __nv_bfloat162, __half2> pair;
  if constexpr (std::is_same_v<T, BFloat16>) {
    pair = __floats2bfloat162_rn(low, high);
  } else {
    pair = __floats2half2_rn(low, high);
  }
  unsigned word;
  memcpy(&word, &pair, sizeof word);
  return word;
}

// The bits that a number takes; 0 for 0.
FASTNORM_DEVICE int bit_width(int v) { return 32 - __clz(v); }

// One instruction each: errors of 2 ulp and 1 ulp, and denormal numbers count as 0.
FASTNORM_DEVICE float exp2_approx(float v) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(v));
  return result;
}
FASTNORM_DEVICE float reciprocal_approx(float v) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(v));
  return result;
}

// The compiler does not compute v a second time where it is used again.
FASTNORM_DEVICE void keep_in_register(float& v) { asm("" : "+f"(v)); }
FASTNORM_DEVICE void keep_in_register(double& v) { asm("" : "+d"(v)); }
template <class T>
FASTNORM_DEVICE void keep_in_register(T*& p) {
  asm("" : "+l"(p));
}

// max(v, 0); NaN stays NaN.
FASTNORM_DEVICE float relu_of(float v) {
#if __CUDA_ARCH__ >= 800
  float result;
  asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(result) : "f"(v));
  return result;
#else
  return v <= 0.0f ? 0.0f : v;
#endif
}
FASTNORM_DEVICE double relu_of(double v) { return v <= 0.0 ? 0.0 : v; }
// An error of 1 ulp.
FASTNORM_DEVICE float rsqrt_approx(float v) {
  float result;
  asm("rsqrt.approx.f32 %0, %1;" : "=f"(result) : "f"(v));
  return result;
}

// a * b, rounded, whatever is added to it: the compiler makes no fused multiply-add of it.
FASTNORM_DEVICE float rounded_product(float a, float b) { return __fmul_rn(a, b); }

// One access for all of V's bytes, a power of two up to 16.
template <int kBytes>
struct WordOf;
template <>
struct WordOf<2> {
  using type = unsigned short;
};
template <>
struct WordOf<4> {
  using type = unsigned;
};
template <>
struct WordOf<8> {
  using type = uint2;
};
template <>
struct WordOf<16> {
  using type = uint4;
};
template <class V>
FASTNORM_DEVICE V read_whole(const V* p) {
  using Word = typename WordOf<sizeof(V)>::type;
  const Word word = *reinterpret_cast<const Word*>(p);
  V v;
  memcpy(&v, &word, sizeof(V));
  return v;
}
// The instructions are written out, because the compiler takes some stores of 16 bytes apart.
FASTNORM_DEVICE void write_word(unsigned short* p, unsigned short word) { *p = word; }
FASTNORM_DEVICE void write_word(unsigned* p, unsigned word) { *p = word; }
FASTNORM_DEVICE void write_word(uint2* p, uint2 word) {
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(p)), "r"(word.x), "r"(word.y));
}
FASTNORM_DEVICE void write_word(uint4* p, uint4 word) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)), "r"(word.x), "r"(word.y),
               "r"(word.z), "r"(word.w));
}
// To global memory.
template <class V>
FASTNORM_DEVICE void write_whole(V* p, const V& v) {
  typename WordOf<sizeof(V)>::type word;
  memcpy(&word, &v, sizeof(V));
  write_word(reinterpret_cast<decltype(word)*>(p), word);
}
template <class V>
FASTNORM_DEVICE void write_whole_shared(V* p, const V& v) {
  typename WordOf<sizeof(V)>::type word;
  memcpy(&word, &v, sizeof(V));
  *reinterpret_cast<decltype(word)*>(p) = word;
}

// Begins to copy kBytes (4, 8 or 16) from global to shared memory, past the registers. Below sm_80 it copies at once.
template <int kBytes>
FASTNORM_DEVICE void copy_async(void* place, const void* p) {
  __pipeline_memcpy_async(place, p, kBytes);
}
// Ends a group of this thread's copies (cp.async.commit_group).
FASTNORM_DEVICE void commit_copies() { __pipeline_commit(); }
// Waits for all of this thread's groups except the last `pending` (at most 7). Other threads see the copies after a
// barrier. The instruction wants a constant, which is found in three steps.
template <int kLow = 0, int kCount = 8>
FASTNORM_DEVICE void wait_copies(int pending) {
  if constexpr (kCount == 1) {
    __pipeline_wait_prior(kLow);
  } else if (pending < kLow + kCount / 2) {
    wait_copies<kLow, kCount / 2>(pending);
  } else {
    wait_copies<kLow + kCount / 2, kCount / 2>(pending);
  }
}

// Begins to bring the memory at p into L2.
FASTNORM_DEVICE void prefetch_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// The emulator counts and checks every access of pack.cuh; here they cost nothing.
enum class Access { kStream, kParameter };
FASTNORM_DEVICE void note_read(const void*, int, Access) {}
FASTNORM_DEVICE void note_write(const void*, int, Access) {}

// Defined in platform.cu.
//
// arguments: the address of each. 0, CUDA's error code, or kGangRefused and the code.
int launch_kernel(const void* kernel, const LaunchConfig& config, void** arguments);
// kernel: any kernel without static shared memory.
int query_device(int device, const void* kernel, DeviceInfo* info);
const char* platform_error_string(int error);

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), const LaunchConfig& config, Arguments&&... arguments) {
  const auto launch_with = [&](Parameters... parameters) {
    void* addresses[] = {&parameters...};
    return launch_kernel(reinterpret_cast<const void*>(kernel), config, addresses);
  };
  return launch_with(static_cast<Parameters>(arguments)...);
}

}  // namespace fastnorm::cuda

#endif
