// From a statement to an Instruction. A decoder takes the parts of the opcode and the operands that it understands;
// what is left over is an error, so that nothing is passed over in silence.
//
//   ld.global.v4.f32 {%f1, %f2, %f3, %f4}, [%rd1+16]     name "ld"; parts "global", "v4", "f32"; two operands
#pragma once

#include <initializer_list>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "instruction.h"
#include "module.h"

namespace fastnorm::ptx {

class Names;

class Decoding {
 public:
  Decoding(const Statement& statement, Names& names);

  Instruction i;

  // The opcode.
  std::string_view name() const { return name_; }
  bool take(std::string_view part);
  // The first of these that the opcode has; "" where it has none.
  std::string_view take_one_of(std::initializer_list<std::string_view> parts);
  // Parts that say where caches should keep data: they change no value.
  void take_cache_hints();
  Type take_type();  // Type::kNone where no part is a type
  // The type, one of these: an error where it is another.
  Type take_type_of(std::initializer_list<Type> types);

  // The operands.
  size_t operands() const { return statement_.operands.size(); }
  const std::string& operand(size_t n) const { return statement_.operands.at(n); }
  void set_operand(size_t n, std::string text) { operands_changed_[n] = std::move(text); }
  Operand value(std::string_view text, Type type);
  Operand predicate(std::string_view text);
  // Operand n becomes out[k] or in[k].
  void out(size_t n, Type type, size_t k = 0) { i.out[k] = destination(text_of(n), type); }
  void in(size_t n, Type type, size_t k) { i.in[k] = value(text_of(n), type); }
  // out[0] from operand 0, in[0] and following from as many operands after it.
  void usual(Type out_type, std::initializer_list<Type> in_types);
  Operand destination(std::string_view text, Type type);
  // "[%rd1+16]" becomes in[0] and i.offset.
  void address(size_t n);
  // "{%f1, %f2}" or a single operand, as i.elements.
  void elements(size_t n, size_t count, Type type, bool written);
  bool is_vector(size_t n) const { return text_of(n)[0] == '{'; }
  bool is_number(std::string_view text) const;
  uint64_t number(size_t n) const;
  Names& names() { return names_; }

  [[noreturn]] void fail(const std::string& why) const;
  // All parts and operands have been used.
  void finish(size_t operands_used);

 private:
  const std::string& text_of(size_t n) const;

  const Statement& statement_;
  Names& names_;
  std::string_view name_;
  std::vector<std::string_view> parts_;
  std::unordered_map<size_t, std::string> operands_changed_;
};

using Decoder = void (*)(Decoding&);
using Decoders = std::unordered_map<std::string_view, Decoder>;

// Each file of the family decode_*.cpp adds the opcodes that it knows.
void add_integers(Decoders& decoders);
void add_bits(Decoders& decoders);
void add_floats(Decoders& decoders);
void add_halves(Decoders& decoders);
void add_approximations(Decoders& decoders);
void add_comparisons(Decoders& decoders);
void add_conversions(Decoders& decoders);
void add_moves(Decoders& decoders);
void add_memory(Decoders& decoders);
void add_atomics(Decoders& decoders);
void add_copies(Decoders& decoders);
void add_warp(Decoders& decoders);
void add_control(Decoders& decoders);

// F for every type of a list, picked by a Type: null where it is none of them.
template <class F, class... T>
constexpr Execute pick(Type type, std::pair<Type, T>... choices) {
  Execute found = nullptr;
  ((choices.first == type ? void(found = F::template execute<typename T::type>()) : void()), ...);
  return found;
}

}  // namespace fastnorm::ptx
