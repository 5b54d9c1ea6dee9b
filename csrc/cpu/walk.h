// How a kernel walks over elements: some packs at a time, and at the end the elements that are left.
#pragma once

#include <algorithm>
#include <type_traits>

#include "lane_mask.h"

namespace fastnorm::FASTNORM_CPU_CAPABILITY {

// ---- access: which elements of a group of packs exist ----

// All of them. With `stream`, stores go past the cache.
struct Whole {
  bool stream = false;
  template <class T>
  FASTNORM_INLINE Pack<Accum<T>> get(const T* p) const {
    return load(p);
  }
  template <class T>
  FASTNORM_INLINE void put(T* p, Pack<Accum<T>> v) const {
    if (stream) {
      store_past_cache(p, v);
    } else {
      store(p, v);
    }
  }
  template <class T>
  FASTNORM_INLINE Mask<Accum<T>> get_mask(const uint8_t* p) const {
    return load_mask<T>(p);
  }
  template <class T>
  FASTNORM_INLINE void put_mask(uint8_t* p, Mask<Accum<T>> m) const {
    store_mask<T>(p, m);
  }
  template <class T>
  FASTNORM_INLINE Pack<Accum<T>> zero_past_end(Pack<Accum<T>> v) const {
    return v;
  }
};
// The first n of every pack, 0 < n < kLanes.
struct Tail {
  int64_t n;
  template <class T>
  FASTNORM_INLINE Pack<Accum<T>> get(const T* p) const {
    return load_first(p, n);
  }
  template <class T>
  FASTNORM_INLINE void put(T* p, Pack<Accum<T>> v) const {
    store_first(p, v, n);
  }
  template <class T>
  FASTNORM_INLINE Mask<Accum<T>> get_mask(const uint8_t* p) const {
    return load_mask<T>(p, n);
  }
  template <class T>
  FASTNORM_INLINE void put_mask(uint8_t* p, Mask<Accum<T>> m) const {
    store_mask<T>(p, m & first_elements<T>(n), n);
  }
  // v with zero in the lanes of elements that do not exist.
  template <class T>
  FASTNORM_INLINE Pack<Accum<T>> zero_past_end(Pack<Accum<T>> v) const {
    return select(first_elements<T>(n), v, Pack<Accum<T>>(0));
  }
};

// Where pack p of a group lies: behind the one before it, or below it in the next row; of x, of the coefficients, of
// the mask, of an array that a kernel keeps for its second pass.
template <class A>
struct Adjacent {
  FASTNORM_INLINE int64_t element(int p) const { return p * kLanes<A>; }
  FASTNORM_INLINE int64_t coef(int p) const { return p * kLanes<A>; }
  FASTNORM_INLINE int row(int) const { return 0; }
  FASTNORM_INLINE int64_t mask(int p) const { return p * kMaskBytes<A>; }
  FASTNORM_INLINE int64_t dy(int p) const { return p * kLanes<A>; }
  FASTNORM_INLINE int64_t kept(int p) const { return p * kLanes<A>; }
  FASTNORM_INLINE bool fetches() const { return false; }
  FASTNORM_INLINE int64_t later_element(int) const { return 0; }
  FASTNORM_INLINE int64_t later_dy(int) const { return 0; }
};
struct Strided {
  int64_t stride, mask_stride, dy_stride, kept_stride;
  bool together = true;  // rows go in groups, not one by one
  // What lies so far behind an element (of dy) is fetched, unless that is 0.
  int64_t ahead = 0, dy_ahead = 0;
  Strided fetching(int64_t rows) const {
    return {stride, mask_stride, dy_stride, kept_stride, together, rows * stride, rows * dy_stride};
  }
  FASTNORM_INLINE int64_t element(int64_t p) const { return p * stride; }
  FASTNORM_INLINE int64_t coef(int) const { return 0; }
  FASTNORM_INLINE int row(int p) const { return p; }
  FASTNORM_INLINE int64_t mask(int64_t p) const { return p * mask_stride; }
  FASTNORM_INLINE int64_t dy(int64_t p) const { return p * dy_stride; }
  FASTNORM_INLINE int64_t kept(int64_t p) const { return p * kept_stride; }
  FASTNORM_INLINE bool fetches() const { return ahead != 0; }
  FASTNORM_INLINE int64_t later_element(int p) const { return element(p) + ahead; }
  FASTNORM_INLINE int64_t later_dy(int p) const { return dy(p) + dy_ahead; }
};

// Pack p alone of a group.
template <class Layout>
struct Single {
  const Layout& group;
  int p;
  FASTNORM_INLINE int64_t element(int) const { return group.element(p); }
  FASTNORM_INLINE int64_t coef(int) const { return group.coef(p); }
  FASTNORM_INLINE int row(int) const { return group.row(p); }
  FASTNORM_INLINE int64_t mask(int) const { return group.mask(p); }
  FASTNORM_INLINE int64_t dy(int) const { return group.dy(p); }
  FASTNORM_INLINE int64_t kept(int) const { return group.kept(p); }
  FASTNORM_INLINE bool fetches() const { return group.fetches(); }
  FASTNORM_INLINE int64_t later_element(int) const { return group.later_element(p); }
  FASTNORM_INLINE int64_t later_dy(int) const { return group.later_dy(p); }
};

// So many packs are worked on at a time. The portable build, where a pack is eight registers already, takes single
// ones: more would only double the compile time.
constexpr int kGroup = kParts > 4 ? 1 : 2;

// Calls f.template packs<P>(i, access, layout) over n adjacent elements from i on: kGroup packs at a time, then single
// ones. Returns where it stopped: less than a pack is left.
template <class A, class F>
FASTNORM_INLINE int64_t for_whole_packs(int64_t i, int64_t n, const F& f, bool stream) {
  constexpr int64_t L = kLanes<A>;
  constexpr Adjacent<A> layout{};
  for (; i + kGroup * L <= n; i += kGroup * L) f.template packs<kGroup>(i, Whole{stream}, layout);
  if constexpr (kGroup > 1) {
    for (; i + L <= n; i += L) f.template packs<1>(i, Whole{stream}, layout);
  }
  return i;
}
// The same, and then over what is left.
template <class A, class F>
FASTNORM_INLINE void for_packs(int64_t n, const F& f, bool stream = false) {
  const int64_t i = for_whole_packs<A>(0, n, f, stream);
  if (i < n) f.template packs<1>(i, Tail{n - i}, Adjacent<A>{});
}

// How the elements of a span are stored. Past the cache packs begin at lines, behind the first `head` elements.
struct Stores {
  bool stream = false;
  int64_t head = 0;
};
// The same as for_packs, the head first.
template <class A, class F>
FASTNORM_INLINE void store_packs(int64_t n, const F& f, Stores stores) {
  int64_t i = 0, part = stores.head;
  do {  // once for the head, if any, and once for what is left
    if (part > 0) f.template packs<1>(i, Tail{part}, Adjacent<A>{});
    i = for_whole_packs<A>(i + part, n, f, stores.stream);
    part = n - i;
  } while (part > 0);
}

// So many rows are worked on at a time, as far as registers go: they share coefficients and sums.
constexpr int kRowGroup = kParts > 4 ? 1 : kParts > 2 ? 2 : 4;

// Memory takes longer to answer than a group of short rows takes, and the processor follows the streams of several rows
// badly: what lies some KB ahead is fetched, in whole groups. With the next group alone layer norm of 401408x96 float32
// took 1.2 times as long, channels_last batch norm of 32x1024x14x14 bfloat16, backward, 1.25 times; with 8 KB 1.05
// times.
constexpr int64_t kBytesAhead = 16384;
inline int64_t rows_to_fetch(int64_t rows, int64_t row_bytes) {
  return std::max<int64_t>(1, kBytesAhead / (rows * row_bytes)) * rows;
}

// Calls f.template packs<P>(i, access, layout) over P rows of n elements, pack by pack.
template <int P, class A, class F>
FASTNORM_INLINE void across_rows(int64_t n, const F& f, Strided layout, bool stream) {
  constexpr int64_t L = kLanes<A>;
  int64_t i = 0;
  for (; i + L <= n; i += L) f.template packs<P>(i, Whole{stream}, layout);
  if (i < n) f.template packs<P>(i, Tail{n - i}, layout);
}
// Calls f(count, r) for rows r to r + count - 1, count a constant: kRowGroup of them while they go `together`, then
// one.
template <class F>
FASTNORM_INLINE void for_row_groups(int64_t rows, bool together, const F& f) {
  int64_t r = 0;
  if constexpr (kRowGroup > 1) {
    for (; together && r + kRowGroup <= rows; r += kRowGroup) f(std::integral_constant<int, kRowGroup>{}, r);
  }
  for (; r < rows; ++r) f(std::integral_constant<int, 1>{}, r);
}
// The same as across_rows over any number of rows; at_row(r) makes the f of row r.
template <class A, class F>
FASTNORM_INLINE void for_rows(int64_t rows, int64_t n, Strided layout, const F& at_row, bool stream = false) {
  for_row_groups(rows, layout.together, [&](auto count, int64_t r) FASTNORM_LAMBDA {
    across_rows<decltype(count)::value, A>(n, at_row(r), layout, stream);
  });
}

}  // namespace fastnorm::FASTNORM_CPU_CAPABILITY
