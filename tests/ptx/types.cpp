#include "types.h"

#include <array>
#include <utility>

namespace fastnorm::ptx {

namespace {

constexpr std::array<std::pair<std::string_view, Type>, 19> kNames = {{
    {"b8", Type::kB8},         {"b16", Type::kB16}, {"b32", Type::kB32}, {"b64", Type::kB64},   {"u8", Type::kU8},
    {"u16", Type::kU16},       {"u32", Type::kU32}, {"u64", Type::kU64}, {"s8", Type::kS8},     {"s16", Type::kS16},
    {"s32", Type::kS32},       {"s64", Type::kS64}, {"f16", Type::kF16}, {"bf16", Type::kBF16}, {"f16x2", Type::kF16x2},
    {"bf16x2", Type::kBF16x2}, {"f32", Type::kF32}, {"f64", Type::kF64}, {"pred", Type::kPred},
}};

}  // namespace

Type type_named(std::string_view name) {
  for (const auto& [known, type] : kNames) {
    if (known == name) return type;
  }
  return Type::kNone;
}

const char* name_of(Type type) {
  for (const auto& [name, known] : kNames) {
    if (known == type) return name.data();
  }
  return "nothing";
}

}  // namespace fastnorm::ptx
