// PTX's fundamental types, and how a register keeps them: a value of 8 bytes takes 64 bits, every other 32.
#pragma once

#include <bit>
#include <cstdint>
#include <optional>
#include <string_view>
#include <type_traits>

#include "core/dtype.h"

namespace fastnorm::ptx {

enum class Type : uint8_t {
  kNone,
  kB8,
  kB16,
  kB32,
  kB64,
  kU8,
  kU16,
  kU32,
  kU64,
  kS8,
  kS16,
  kS32,
  kS64,
  kF16,
  kBF16,
  kF16x2,
  kBF16x2,
  kF32,
  kF64,
  kPred,
};

// Type::kNone where no type has that name.
Type type_named(std::string_view name);
const char* name_of(Type type);

constexpr int bytes_of(Type type) {
  switch (type) {
    case Type::kB8:
    case Type::kU8:
    case Type::kS8: return 1;
    case Type::kB16:
    case Type::kU16:
    case Type::kS16:
    case Type::kF16:
    case Type::kBF16: return 2;
    case Type::kB64:
    case Type::kU64:
    case Type::kS64:
    case Type::kF64: return 8;
    default: return 4;
  }
}
constexpr bool is_signed(Type type) {
  return type == Type::kS8 || type == Type::kS16 || type == Type::kS32 || type == Type::kS64;
}
constexpr bool is_float(Type type) { return type >= Type::kF16 && type <= Type::kF64; }

// Two 16-bit numbers in one register, the first in the lower half.
template <class H>
struct Pair {
  H low, high;
};

// The bits of a value as a register keeps them. Those above a narrow one are its sign or 0; no instruction on narrow
// values reads them.
template <class T>
using Kept = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;

template <size_t kBytes>
using Unsigned =
    std::conditional_t<kBytes == 8, uint64_t,
                       std::conditional_t<kBytes == 4, uint32_t, std::conditional_t<kBytes == 2, uint16_t, uint8_t>>>;

template <class T>
inline T value_of(Kept<T> kept) {
  return std::bit_cast<T>(static_cast<Unsigned<sizeof(T)>>(kept));
}
template <class T>
inline Kept<T> kept_of(T value) {
  if constexpr (std::is_integral_v<T> && sizeof(T) < 4) return static_cast<uint32_t>(value);
  return std::bit_cast<Unsigned<sizeof(T)>>(value);
}

}  // namespace fastnorm::ptx
