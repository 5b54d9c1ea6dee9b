#include "names.h"

#include <algorithm>
#include <array>
#include <cctype>

#include "defect.h"

namespace fastnorm::ptx {

namespace {

constexpr std::array<std::string_view, static_cast<size_t>(Special::kCount)> kSpecialNames = {
    "%tid.x",           "%tid.y",
    "%tid.z",           "%ntid.x",
    "%ntid.y",          "%ntid.z",
    "%ctaid.x",         "%ctaid.y",
    "%ctaid.z",         "%nctaid.x",
    "%nctaid.y",        "%nctaid.z",
    "%cluster_ctarank", "%cluster_nctarank",
    "%cluster_ctaid.x", "%cluster_nctaid.x",
    "%clusterid.x",     "%nclusterid.x",
    "%laneid",          "%warpid",
    "%nwarpid",         "%smid",
    "%lanemask_eq",     "%lanemask_lt",
    "%lanemask_le",     "%lanemask_gt",
    "%lanemask_ge",     "%envreg1",
    "%envreg2",         "%dynamic_smem_size",
};

int64_t aligned(int64_t offset, int64_t align) { return (offset + align - 1) / align * align; }

}  // namespace

void Names::declare(std::string_view directive) {
  const std::string_view space = words_of(directive)[0].substr(1);
  const std::string_view rest = trimmed(directive.substr(1 + space.size()));
  if (space == "reg") return declare_registers(rest);
  if (space == "shared" || space == "local") place(scopes_.back(), parse_variable(space, rest));
}

void Names::declare_registers(std::string_view rest) {
  const std::string_view type_word = words_of(rest)[0];
  const Type type = type_named(type_word.substr(1));
  if (type == Type::kNone) throw Defect("registers of an unknown type: " + std::string(rest));
  for (const std::string& name : split_operands(rest.substr(type_word.size()))) {
    Declared d{type == Type::kPred, bytes_of(type) == 8, false, 0, 1};
    std::string key = name;
    if (const size_t angle = name.find('<'); angle != std::string::npos) {
      d.range = true;
      d.count = static_cast<uint32_t>(number_of(name.substr(angle + 1, name.find('>') - angle - 1)));
      key = name.substr(0, angle);
    }
    d.first = d.predicate ? predicates_ : registers();
    if (d.predicate) {
      predicates_ += d.count;
    } else {
      is_wide_.insert(is_wide_.end(), d.count, d.wide);
    }
    scopes_.back().registers[key] = d;
  }
}

void Names::declare_parameters(std::string_view text) {
  for (const std::string& parameter : split_operands(text)) {
    const Variable v = parse_variable("param", std::string_view(parameter).substr(std::string_view(".param").size()));
    kernel_.parameter_bytes = aligned(kernel_.parameter_bytes, v.align);
    kernel_.parameters.push_back({v.name, kernel_.parameter_bytes, v.bytes});
    kernel_.parameter_bytes += v.bytes;
  }
}

void Names::place_static_shared(std::string_view body) {
  for (const Variable& variable : module_.variables) {
    const bool fixed = variable.space == "shared" && !variable.external;
    if (fixed && body.find(variable.name) != std::string_view::npos) place(scopes_.front(), variable);
  }
}

void Names::place(Scope& scope, Variable variable) {
  int64_t& used = variable.space == "local" ? kernel_.local_bytes : kernel_.static_shared_bytes;
  used = aligned(used, variable.align);
  scope.offsets[variable.name] = static_cast<uint64_t>(used);
  used += variable.bytes;
  scope.variables[variable.name] = std::move(variable);
}

Operand Names::find_register(std::string_view name) const {
  size_t digits = name.size();
  while (digits > 0 && std::isdigit(static_cast<unsigned char>(name[digits - 1])) != 0) --digits;
  const std::string whole(name), prefix(name.substr(0, digits));
  for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
    const auto as = [](const Declared& d, uint32_t number) {
      return Operand{d.predicate ? Operand::kPredicate : Operand::kRegister, d.wide, false, d.first + number};
    };
    if (const auto found = scope->registers.find(whole); found != scope->registers.end() && !found->second.range) {
      return as(found->second, 0);
    }
    const auto found = scope->registers.find(prefix);
    if (found == scope->registers.end() || !found->second.range || digits == name.size()) continue;
    const uint64_t number = number_of(name.substr(digits));
    if (number < found->second.count) return as(found->second, static_cast<uint32_t>(number));
  }
  return {};
}

Operand Names::find_special(std::string_view name) {
  const auto found = std::find(kSpecialNames.begin(), kSpecialNames.end(), name);
  if (found == kSpecialNames.end()) return {};
  return {Operand::kSpecial, false, false, static_cast<uint32_t>(found - kSpecialNames.begin()) * kLanes};
}

Operand Names::constant(uint64_t bits, bool wide) {
  if (!wide) bits &= 0xffffffffu;
  const auto [found, is_new] = constants_.try_emplace({bits, wide}, static_cast<uint32_t>(kernel_.constants.size()));
  for (int lane = 0; is_new && lane < kLanes; ++lane) {
    kernel_.constants.push_back(static_cast<uint32_t>(bits));
    if (wide) kernel_.constants.push_back(static_cast<uint32_t>(bits >> 32));
  }
  return {Operand::kConstant, wide, false, found->second};
}

bool Names::find_address(std::string_view name, uint64_t* address, Space* space) const {
  for (const Parameter& parameter : kernel_.parameters) {
    if (parameter.name != name) continue;
    *address = static_cast<uint64_t>(parameter.offset);
    *space = Space::kParameter;
    return true;
  }
  for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
    const auto found = scope->variables.find(name);
    if (found == scope->variables.end()) continue;
    *space = found->second.space == "local" ? Space::kLocal : Space::kShared;
    *address = scope->offsets.find(name)->second + (*space == Space::kShared ? kSharedBegin : 0);
    return true;
  }
  for (const Variable& variable : module_.variables) {
    if (variable.name != name) continue;
    *space = variable.space == "shared" ? Space::kShared : Space::kGlobal;
    if (variable.memory) *address = reinterpret_cast<uint64_t>(variable.memory->data());
    // Dynamic shared memory follows the static variables, all of which have been placed before the body is decoded.
    if (variable.external) *address = kSharedBegin + static_cast<uint64_t>(aligned(kernel_.static_shared_bytes, 16));
    return *space == Space::kGlobal || variable.external;
  }
  return false;
}

}  // namespace fastnorm::ptx
