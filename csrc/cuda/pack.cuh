// The one door to global memory: aligned packs of elements, parameters of either type, the mask. The emulator counts
// and checks every access made here.
#pragma once

#include <algorithm>

#include "core/args.h"
#include "platform.cuh"

namespace fastnorm::cuda {

// W neighbouring elements, read and written in one access. It holds them as words: an array of halves would be taken
// apart and put together again, half by half, wherever a pack is copied.
template <class T, int W>
struct alignas(sizeof(T) * W) Pack {
  using Word = std::conditional_t<(sizeof(T) * W < sizeof(unsigned)), uint16_t, unsigned>;
  Word word[sizeof(T) * W / sizeof(Word)];
};

template <class A, class T>
FASTNORM_DEVICE A widen(T v) {
  if constexpr (std::is_same<T, float>::value || std::is_same<T, double>::value) {
    return static_cast<A>(v);
  } else {
    return static_cast<A>(to_float(v));
  }
}
template <class T, class A>
FASTNORM_DEVICE T narrow(A v) {
  if constexpr (std::is_same<T, float>::value || std::is_same<T, double>::value) {
    return static_cast<T>(v);
  } else {
    T out;
    from_float(static_cast<float>(v), out);
    return out;
  }
}

// ---- elements ----

template <int W, class T>
FASTNORM_DEVICE Pack<T, W> load(const T* p) {
  note_read(p, sizeof(Pack<T, W>), Access::kStream);
  return read_whole(reinterpret_cast<const Pack<T, W>*>(p));
}
template <int W, class T>
FASTNORM_DEVICE void store(T* p, const Pack<T, W>& pack) {
  note_write(p, sizeof(Pack<T, W>), Access::kStream);
  write_whole(reinterpret_cast<Pack<T, W>*>(p), pack);
}

// Begins to copy a pack to shared memory; it has landed after this thread's wait_copies.
template <int W, class T>
FASTNORM_DEVICE void stage(Pack<T, W>* to, const T* p) {
  note_read(p, sizeof(Pack<T, W>), Access::kStream);
  if constexpr (sizeof(Pack<T, W>) >= 4) {
    copy_async<sizeof(Pack<T, W>)>(to, p);
  } else {
    *to = read_whole(reinterpret_cast<const Pack<T, W>*>(p));
  }
}

template <class A, class T, int W>
FASTNORM_DEVICE void widen(const Pack<T, W>& pack, A (&out)[W]) {
  if constexpr (sizeof(T) == 2 && W > 1) {
#pragma unroll
    for (int w = 0; w < W; w += 2) to_floats<T>(pack.word[w / 2], out[w], out[w + 1]);
  } else {
    T lanes[W];
    memcpy(lanes, &pack, sizeof pack);
#pragma unroll
    for (int w = 0; w < W; ++w) out[w] = widen<A>(lanes[w]);
  }
}
// One lane alone: packs that wait to be used take half the registers of their numbers.
template <class A, class T, int W>
FASTNORM_DEVICE A widen_lane(const Pack<T, W>& pack, int lane) {
  if constexpr (sizeof(T) == 2 && W > 1) {
    A low, high;
    to_floats<T>(pack.word[lane / 2], low, high);
    return lane % 2 == 0 ? low : high;
  } else {
    A values[W];
    widen<A>(pack, values);
    return values[lane];
  }
}
template <class T, class A, int W>
FASTNORM_DEVICE Pack<T, W> narrow(const A (&values)[W]) {
  Pack<T, W> pack;
  if constexpr (sizeof(T) == 2 && W > 1) {
#pragma unroll
    for (int w = 0; w < W; w += 2) pack.word[w / 2] = from_floats<T>(values[w], values[w + 1]);
  } else {
    T lanes[W];
#pragma unroll
    for (int w = 0; w < W; ++w) lanes[w] = narrow<T>(values[w]);
    memcpy(&pack, lanes, sizeof pack);
  }
  return pack;
}

// ---- parameters, statistics and partials: few and small, so the caches hold them ----

template <int W, class T>
FASTNORM_DEVICE Pack<T, W> load_cached(const T* p) {
  note_read(p, sizeof(Pack<T, W>), Access::kParameter);
  return read_whole(reinterpret_cast<const Pack<T, W>*>(p));
}

template <class V>
FASTNORM_DEVICE V load_one(const V* p) {
  note_read(p, alignof(V), Access::kParameter);
  return *p;
}
template <class V>
FASTNORM_DEVICE void store_one(V* p, const V& v) {
  note_write(p, alignof(V), Access::kParameter);
  *p = v;
}

// W neighbouring numbers, of which the first is as aligned as a pack of them, at most 16 bytes.
template <int W, class A>
FASTNORM_DEVICE void load_adjoining(const A* p, A (&out)[W]) {
  constexpr int kPart = std::min(W, static_cast<int>(16 / sizeof(A)));
#pragma unroll
  for (int part = 0; part < W; part += kPart) {
    A values[kPart];
    widen<A>(load_cached<kPart>(p + part), values);
#pragma unroll
    for (int i = 0; i < kPart; ++i) out[part + i] = values[i];
  }
}

// One number whose type is known at run time.
template <class A>
FASTNORM_DEVICE A load_number(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::kFloat64: return static_cast<A>(load_one(static_cast<const double*>(data) + i));
    case DType::kBFloat16: return widen<A>(load_one(static_cast<const BFloat16*>(data) + i));
    case DType::kFloat16: return widen<A>(load_one(static_cast<const Float16*>(data) + i));
    default: return static_cast<A>(load_one(static_cast<const float*>(data) + i));
  }
}
template <class A>
FASTNORM_DEVICE void store_number(void* data, DType dtype, int64_t i, A v) {
  switch (dtype) {
    case DType::kFloat64: return store_one(static_cast<double*>(data) + i, static_cast<double>(v));
    case DType::kBFloat16: return store_one(static_cast<BFloat16*>(data) + i, narrow<BFloat16>(v));
    case DType::kFloat16: return store_one(static_cast<Float16*>(data) + i, narrow<Float16>(v));
    default: return store_one(static_cast<float*>(data) + i, static_cast<float>(v));
  }
}
template <class A>
FASTNORM_DEVICE A load_param(const Params& params, int64_t channel, A absent) {
  return params.data == nullptr ? absent : load_number<A>(params.data, params.dtype, channel);
}

// W neighbouring parameters for W elements of T. The accesses are as wide as the elements', because the addresses are
// as aligned as theirs.
template <class T, int W, class A>
FASTNORM_DEVICE void load_params(const Params& params, int64_t channel, A absent, A (&out)[W]) {
  if (params.data == nullptr) {
#pragma unroll
    for (int w = 0; w < W; ++w) out[w] = absent;
  } else if (params.dtype != DType::kFloat32 || std::is_same<T, float>::value) {
    widen<A>(load_cached<W>(static_cast<const T*>(params.data) + channel), out);
  } else {
    constexpr int kWhole = static_cast<int>(W * sizeof(T) / sizeof(float)), kPart = kWhole < 1   ? 1
                                                                                    : kWhole < W ? kWhole
                                                                                                 : W;
#pragma unroll
    for (int part = 0; part < W; part += kPart) {
      A values[kPart];
      widen<A>(load_cached<kPart>(static_cast<const float*>(params.data) + channel + part), values);
#pragma unroll
      for (int w = 0; w < kPart; ++w) out[part + w] = values[w];
    }
  }
}

// One parameter for elements of T; its type is T or float32.
template <class T, class A>
FASTNORM_DEVICE A load_param_of(const Params& params, int64_t channel, A absent) {
  A out[1];
  load_params<T>(params, channel, absent, out);
  return out[0];
}

// ---- mask ----

// Lanes whose bits share a byte.
template <int W>
constexpr int kLanesPerByte = W >= 8 ? 1 : 8 / W;

// Writes the bits of a pack; the first goes to `byte`. Where packs share a byte, neighbouring lanes hold neighbouring
// packs, and the first lane's pack begins the byte. All lanes of the warp take part; lanes that are not `in` add zeros.
template <int W>
FASTNORM_DEVICE void store_mask(uint8_t* byte, unsigned bits, bool in) {
  constexpr int kLanes = kLanesPerByte<W>;
  const int lane = thread_index() % kLanes;
  if (!in) bits = 0;
  bits <<= lane * W;
#pragma unroll
  for (int lanes = 1; lanes < kLanes; lanes *= 2) bits |= shuffle_xor(bits, lanes);
  if (in && lane == 0) {
    note_write(byte, 1, Access::kStream);
    *byte = static_cast<uint8_t>(bits);
  }
}

// The bits of the pack that begins at `element` of a row of the mask.
template <int W>
FASTNORM_DEVICE unsigned load_mask(const uint8_t* row, int64_t element) {
  const uint8_t* byte = row + element / 8;
  note_read(byte, 1, Access::kStream);
  return static_cast<unsigned>(*byte) >> (W >= 8 ? 0 : element % 8);
}

}  // namespace fastnorm::cuda
