// The names that a kernel's statements use: registers, constants, special registers, parameters, variables, labels.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "kernel.h"
#include "module.h"

namespace fastnorm::ptx {

// Special registers, in the order of their lanes in a warp's memory.
enum class Special : uint32_t {
  kTidX,
  kTidY,
  kTidZ,
  kNtidX,
  kNtidY,
  kNtidZ,
  kCtaidX,
  kCtaidY,
  kCtaidZ,
  kNctaidX,
  kNctaidY,
  kNctaidZ,
  kClusterCtarank,
  kClusterNctarank,
  kClusterCtaidX,
  kClusterNctaidX,
  kClusteridX,
  kNclusteridX,
  kLaneid,
  kWarpid,
  kNwarpid,
  kSmid,
  kLanemaskEq,
  kLanemaskLt,
  kLanemaskLe,
  kLanemaskGt,
  kLanemaskGe,
  kEnvreg1,
  kEnvreg2,
  kDynamicSmemSize,
  kCount,
};

// Addresses. Those of global memory are the host's; others have one of these bits, and shared memory's have the block
// in them, from bit 24 on. Addresses of 32 bits are of shared memory: a block's own, or with rank + 1 from bit 24 on.
constexpr uint64_t kSharedWindow = uint64_t{1} << 62, kLocalWindow = uint64_t{1} << 61;
constexpr uint64_t kParameterWindow = uint64_t{1} << 60;
constexpr int kBlockShift = 24;
// Where shared memory begins: no kernel may depend on more alignment than it asks for.
constexpr uint32_t kSharedBegin = 1024 + 16;

class Names {
 public:
  Names(Kernel& kernel, const Module& module) : kernel_(kernel), module_(module) { open(); }

  // Names that are declared in a scope end with it.
  void open() { scopes_.emplace_back(); }
  void close() { scopes_.pop_back(); }
  void declare(std::string_view directive);  // ".reg .b32 %r<10>", ".shared .b8 x[4]"
  void declare_parameters(std::string_view text);
  // Gives the module's static shared variables that the body names a place.
  void place_static_shared(std::string_view body);

  // A register; Operand::kNothing where there is none of that name.
  Operand find_register(std::string_view name) const;
  static Operand find_special(std::string_view name);
  Operand constant(uint64_t bits, bool wide);
  // The address of a parameter or variable: in its own space.
  bool find_address(std::string_view name, uint64_t* address, Space* space) const;

  uint32_t registers() const { return static_cast<uint32_t>(is_wide_.size()); }
  bool is_wide(uint32_t id) const { return is_wide_[id]; }
  uint32_t predicates() const { return predicates_; }
  Kernel& kernel() { return kernel_; }

 private:
  // "%r<10>" declares %r0 to %r9, with neighbouring ids from `first` on.
  struct Declared {
    bool predicate, wide, range;
    uint32_t first, count;
  };
  struct Scope {
    std::unordered_map<std::string, Declared> registers;
    std::map<std::string, Variable, std::less<>> variables;
    std::map<std::string, uint64_t, std::less<>> offsets;
  };
  void declare_registers(std::string_view rest);
  void place(Scope& scope, Variable variable);

  Kernel& kernel_;
  const Module& module_;
  std::vector<Scope> scopes_;
  std::vector<bool> is_wide_;
  uint32_t predicates_ = 0;
  std::map<std::pair<uint64_t, bool>, uint32_t> constants_;
};

}  // namespace fastnorm::ptx
