// Scopes of strong accesses and fences: who takes part in their order.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace fastnorm::ptx {

// .cta, .cluster; .gpu and .sys.
enum class Scope : uint8_t { kBlock, kCluster, kDevice };
constexpr size_t kScopes = 3;

// Something for every scope.
template <class T>
struct PerScope : std::array<T, kScopes> {
  T& operator[](Scope s) { return std::array<T, kScopes>::operator[](static_cast<size_t>(s)); }
};

// All scopes up to one.
template <class F>
void for_scopes_up_to(Scope last, F f) {
  for (size_t s = 0; s <= static_cast<size_t>(last); ++s) f(static_cast<Scope>(s));
}

// A block's number among the groups of threads that are the scopes: its own, its cluster's, the device's.
inline uint32_t group_of(Scope scope, uint32_t block, uint32_t blocks_in_cluster) {
  return scope == Scope::kBlock ? block : scope == Scope::kCluster ? block / blocks_in_cluster : 0;
}

// The least scope that has both blocks.
inline Scope common_scope(uint32_t a, uint32_t b, uint32_t blocks_in_cluster) {
  if (a == b) return Scope::kBlock;
  return a / blocks_in_cluster == b / blocks_in_cluster ? Scope::kCluster : Scope::kDevice;
}

}  // namespace fastnorm::ptx
