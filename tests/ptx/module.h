// PTX as text: a module's kernels and variables, and a kernel's statements, taken apart but not understood yet.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace fastnorm::ptx {

// A variable outside of registers: "shared", "global", "const" or "local".
struct Variable {
  std::string space, name;
  int64_t align = 1, bytes = 0;
  bool external = false;                               // dynamic shared memory
  std::shared_ptr<std::vector<unsigned char>> memory;  // of global and const: filled with the initial values
};

// Parts of the module's text.
struct Entry {
  std::string name;
  std::string_view parameters, directives, body;
};

struct Module {
  std::map<std::string, Entry> entries;
  std::vector<Variable> variables;
  std::map<int, std::string> files;  // paths, by their numbers in .loc
};

// The text has to live as long as the module.
Module parse_module(std::string_view text);

// One statement of a body.
struct Statement {
  enum Kind { kInstruction, kLabel, kDirective, kLocation, kOpen, kClose } kind = kInstruction;
  std::string text;                   // all of it; of a label its name; of a location the numbers
  std::string guard;                  // "%p1" or "!%p1", or empty
  std::string opcode;                 // "ld.global.f32"
  std::vector<std::string> operands;  // "%r1", "[%rd1+4]", "{%r1, %r2}", "%r1|%p1"
};

std::vector<Statement> parse_body(std::string_view body);

// The parts between commas that are in no bracket, without blanks around them.
std::vector<std::string> split_operands(std::string_view text);
// ".align 4 .b8 name[16]", after the space.
Variable parse_variable(std::string_view space, std::string_view text);
std::string_view trimmed(std::string_view text);
std::vector<std::string_view> words_of(std::string_view text);
// A number as PTX writes it: decimal, 0x..., 0f... and 0d... for the bits of a float. Throws Defect for anything else.
uint64_t number_of(std::string_view text);

}  // namespace fastnorm::ptx
