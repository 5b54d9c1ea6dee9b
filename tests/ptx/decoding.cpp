#include "decoding.h"

#include <algorithm>
#include <cctype>

#include "defect.h"
#include "names.h"

namespace fastnorm::ptx {

Decoding::Decoding(const Statement& statement, Names& names) : statement_(statement), names_(names) {
  std::string_view rest = statement.opcode;
  const size_t dot = std::min(rest.find('.'), rest.size());
  name_ = rest.substr(0, dot);
  rest.remove_prefix(dot);
  while (!rest.empty()) {
    const size_t end = std::min(rest.find('.', 1), rest.size());
    parts_.push_back(rest.substr(1, end - 1));
    rest.remove_prefix(end);
  }
  if (!statement.guard.empty()) i.guard = predicate(statement.guard);
}

void Decoding::fail(const std::string& why) const { throw Defect(why + ": " + statement_.text); }

bool Decoding::take(std::string_view part) {
  const auto found = std::find(parts_.begin(), parts_.end(), part);
  if (found == parts_.end()) return false;
  parts_.erase(found);
  return true;
}

std::string_view Decoding::take_one_of(std::initializer_list<std::string_view> parts) {
  for (const std::string_view part : parts) {
    if (take(part)) return part;
  }
  return "";
}

void Decoding::take_cache_hints() {
  take_one_of({"ca", "cg", "cs", "lu", "cv", "wb", "wt"});
  std::erase_if(parts_, [](std::string_view part) {
    return part.starts_with("L1::") || (part.starts_with("L2::") && part != "L2::cache_hint");
  });
}

Type Decoding::take_type() {
  for (auto part = parts_.begin(); part != parts_.end(); ++part) {
    if (const Type type = type_named(*part); type != Type::kNone) {
      parts_.erase(part);
      return type;
    }
  }
  return Type::kNone;
}

Type Decoding::take_type_of(std::initializer_list<Type> types) {
  const Type type = take_type();
  if (std::find(types.begin(), types.end(), type) == types.end()) fail("an instruction that is not known");
  return type;
}

const std::string& Decoding::text_of(size_t n) const {
  const auto changed = operands_changed_.find(n);
  if (changed != operands_changed_.end()) return changed->second;
  if (n >= operands()) fail("too few operands");
  return statement_.operands[n];
}

bool Decoding::is_number(std::string_view text) const {
  return !text.empty() && (std::isdigit(static_cast<unsigned char>(text[0])) != 0 || text[0] == '-');
}

uint64_t Decoding::number(size_t n) const {
  if (!is_number(text_of(n))) fail("no number: " + text_of(n));
  return number_of(text_of(n));
}

Operand Decoding::value(std::string_view text, Type type) {
  if (type == Type::kPred) return predicate(text);
  const bool wide = bytes_of(type) == 8;
  if (is_number(text)) {
    const uint64_t bits = number_of(text);
    return names_.constant(bytes_of(type) >= 4 ? bits : bits & ((uint64_t{1} << 8 * bytes_of(type)) - 1), wide);
  }
  const Operand found = names_.find_register(text);
  if (found.bank == Operand::kPredicate) fail("a predicate as a value: " + std::string(text));
  if (!found.is_nothing()) return found;
  if (const Operand special = Names::find_special(text); !special.is_nothing()) return special;
  uint64_t address = 0;
  Space space = Space::kGeneric;
  if (!names_.find_address(text, &address, &space)) fail("nothing has the name " + std::string(text));
  return names_.constant(address, wide);
}

Operand Decoding::predicate(std::string_view text) {
  const bool negated = text.starts_with('!');
  if (negated) text.remove_prefix(1);
  if (is_number(text)) return {Operand::kConstant, false, negated, number_of(text) != 0};
  Operand found = names_.find_register(text);
  if (found.bank != Operand::kPredicate) fail("no predicate: " + std::string(text));
  found.negated = negated;
  return found;
}

Operand Decoding::destination(std::string_view text, Type type) {
  if (text == "_") return {};
  const Operand found = names_.find_register(text);
  const bool fits = (found.bank == Operand::kPredicate) == (type == Type::kPred);
  if (found.is_nothing() || !fits) fail("no destination: " + std::string(text));
  return found;
}

void Decoding::usual(Type out_type, std::initializer_list<Type> in_types) {
  out(0, out_type);
  size_t n = 0;
  for (const Type type : in_types) {
    in(n + 1, type, n);
    if (i.in[n].wide != (bytes_of(type) == 8)) fail("an operand of another width: " + text_of(n + 1));
    ++n;
  }
  if (i.out[0].is_nothing() || i.out[0].wide != (bytes_of(out_type) == 8)) {
    fail("a destination of another width: " + text_of(0));
  }
  finish(n + 1);
}

void Decoding::address(size_t n) {
  const std::string& text = text_of(n);
  if (text.size() < 3 || text.front() != '[' || text.back() != ']') fail("no address: " + text);
  std::string_view inside = trimmed(std::string_view(text).substr(1, text.size() - 2));
  std::string_view base = inside;
  if (const size_t plus = inside.find('+'); plus != std::string_view::npos) {
    base = trimmed(inside.substr(0, plus));
    i.offset = static_cast<int64_t>(number_of(trimmed(inside.substr(plus + 1))));
  }
  i.in[0] = value(base, Type::kB64);
}

void Decoding::elements(size_t n, size_t count, Type type, bool written) {
  std::string_view text = text_of(n);
  std::vector<std::string> names;
  if (is_vector(n)) {
    names = split_operands(text.substr(1, text.size() - 2));
  } else {
    names.emplace_back(text);
  }
  if (names.size() != count) fail("a vector of " + std::to_string(names.size()) + " elements");
  std::vector<Operand>& all = names_.kernel().elements;
  i.first_element = static_cast<uint32_t>(all.size());
  i.elements = static_cast<uint8_t>(count);
  i.elements_written = written;
  for (const std::string& name : names) all.push_back(written ? destination(name, type) : value(name, type));
}

void Decoding::finish(size_t operands_used) {
  if (!parts_.empty()) fail("an instruction that is not known, for ." + std::string(parts_.front()));
  if (operands() != operands_used) fail(std::to_string(operands()) + " operands");
}

}  // namespace fastnorm::ptx
