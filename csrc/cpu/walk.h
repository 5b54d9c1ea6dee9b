// How a kernel walks over elements: four packs at a time, and at the end the lanes that are left.
#pragma once

#include <type_traits>

#include "load_store.h"

namespace fastnorm::FASTNORM_CPU_CAPABILITY {

template <class A>
constexpr int64_t kLanes = Pack<A>::kLanes;

// ---- access: which lanes of a group of packs exist ----

// All of them exist. With `stream`, stores go past the cache.
struct Whole {
  bool stream = false;
  template <class T>
  FASTNORM_INLINE Pack<Accum<T>> get(const T* p, int) const {
    return load(p);
  }
  template <class T>
  FASTNORM_INLINE void put(T* p, Pack<Accum<T>> v, int) const {
    if (stream) {
      store_past_cache(p, v);
    } else {
      store(p, v);
    }
  }
  template <class V>
  FASTNORM_INLINE V zero_past_end(V v, int) const {
    return v;
  }
};
// Of the last pack only the first n lanes exist, 0 < n <= kLanes.
template <int kLast>
struct Tail {
  int64_t n;
  bool stream;
  template <class T>
  FASTNORM_INLINE Pack<Accum<T>> get(const T* p, int pack) const {
    return pack == kLast && n < kLanes<Accum<T>> ? load_first(p, n) : load(p);
  }
  template <class T>
  FASTNORM_INLINE void put(T* p, Pack<Accum<T>> v, int pack) const {
    if (pack == kLast && n < kLanes<Accum<T>>) {
      store_first(p, v, n);
    } else {
      Whole{stream}.put(p, v, pack);
    }
  }
  // v with zero in the lanes that do not exist.
  template <class A>
  FASTNORM_INLINE Pack<A> zero_past_end(Pack<A> v, int pack) const {
    return pack == kLast ? select(first_lanes<A>(n), v, Pack<A>(0)) : v;
  }
  template <class A>
  FASTNORM_INLINE Mask<A> zero_past_end(Mask<A> m, int pack) const {
    return pack == kLast ? m & first_lanes<A>(n) : m;
  }
};

// Of every pack only the first n lanes exist: packs below one another at the edge of a tile.
struct Edge {
  int64_t n;
  template <class T>
  FASTNORM_INLINE Pack<Accum<T>> get(const T* p, int) const {
    return load_first(p, n);
  }
};

// Calls f(p, count) for four positions from p on at a time, then for single ones; count is a compile-time constant.
template <class F>
FASTNORM_INLINE void for_fours(int64_t n, F&& f) {
  int64_t p = 0;
  for (; p + 4 <= n; p += 4) f(p, std::integral_constant<int, 4>{});
  for (; p < n; ++p) f(p, std::integral_constant<int, 1>{});
}

// Calls f.template packs<P>(i, access) over n elements: four packs at a time, then the rest as one group. The portable
// build, where a pack is four registers already, takes single packs: groups of four would only double the compile time.
template <class A, class F>
FASTNORM_INLINE void for_packs(int64_t n, const F& f, bool stream = false) {
  constexpr int64_t L = kLanes<A>;
  int64_t i = 0;
  if constexpr (kParts > 2) {
    for (; i + L <= n; i += L) f.template packs<1>(i, Whole{stream});
    if (i < n) f.template packs<1>(i, Tail<0>{n - i, stream});
    return;
  }
  for (; i + 4 * L <= n; i += 4 * L) f.template packs<4>(i, Whole{stream});
  const int64_t rest = n - i;
  if (rest > 3 * L) {
    f.template packs<4>(i, Tail<3>{rest - 3 * L, stream});
  } else if (rest > 2 * L) {
    f.template packs<3>(i, Tail<2>{rest - 2 * L, stream});
  } else if (rest > L) {
    f.template packs<2>(i, Tail<1>{rest - L, stream});
  } else if (rest > 0) {
    f.template packs<1>(i, Tail<0>{rest, stream});
  }
}

}  // namespace fastnorm::FASTNORM_CPU_CAPABILITY
