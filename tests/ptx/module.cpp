#include "module.h"

#include <algorithm>
#include <cctype>
#include <charconv>
#include <cstring>

#include "defect.h"
#include "types.h"

namespace fastnorm::ptx {

namespace {

bool is_blank(char c) { return std::isspace(static_cast<unsigned char>(c)) != 0; }

std::string without_comments(std::string_view text) {
  std::string kept;
  kept.reserve(text.size());
  for (size_t at = 0; at < text.size();) {
    if (text.substr(at, 2) == "//") {
      at = std::min(text.find('\n', at), text.size());
    } else if (text.substr(at, 2) == "/*") {
      const size_t end = text.find("*/", at + 2);
      at = end == std::string_view::npos ? text.size() : end + 2;
    } else {
      kept += text[at++];
    }
  }
  return kept;
}

// The end of the bracket that opens at `at`, past it.
size_t past_bracket(std::string_view text, size_t at) {
  const char open = text[at], close = open == '(' ? ')' : '}';
  int depth = 0;
  for (; at < text.size(); ++at) {
    const char c = text[at];
    if (c == '/' && text.substr(at, 2) == "//") at = std::min(text.find('\n', at), text.size() - 1);
    if (c == open) ++depth;
    if (c == close && --depth == 0) return at + 1;
  }
  throw Defect(std::string("a bracket that does not close: ") + open);
}

// Takes "name ( parameters ) directives { body }" from `at`, which is past .entry. Returns the end.
size_t parse_entry(std::string_view text, size_t at, Module& module) {
  Entry entry;
  const size_t body = text.find('{', at), open = std::min(text.find('(', at), body);
  if (body == std::string_view::npos) throw Defect("a kernel without a body");
  size_t directives = open;
  if (open < body) {
    directives = past_bracket(text, open);
    entry.parameters = text.substr(open + 1, directives - open - 2);
  }
  entry.name = trimmed(text.substr(at, open - at));
  entry.directives = text.substr(directives, body - directives);
  const size_t end = past_bracket(text, body);
  entry.body = text.substr(body + 1, end - body - 2);
  module.entries[entry.name] = std::move(entry);
  return end;
}

}  // namespace

std::string_view trimmed(std::string_view text) {
  while (!text.empty() && is_blank(text.front())) text.remove_prefix(1);
  while (!text.empty() && is_blank(text.back())) text.remove_suffix(1);
  return text;
}

std::vector<std::string_view> words_of(std::string_view text) {
  std::vector<std::string_view> words;
  for (size_t at = 0; at < text.size();) {
    if (is_blank(text[at])) {
      ++at;
      continue;
    }
    size_t end = at;
    while (end < text.size() && !is_blank(text[end])) ++end;
    words.push_back(text.substr(at, end - at));
    at = end;
  }
  return words;
}

std::vector<std::string> split_operands(std::string_view text) {
  std::vector<std::string> parts;
  int depth = 0;
  size_t first = 0;
  for (size_t at = 0; at <= text.size(); ++at) {
    const char c = at < text.size() ? text[at] : ',';
    if (c == '{' || c == '[' || c == '(') ++depth;
    if (c == '}' || c == ']' || c == ')') --depth;
    if (c != ',' || (depth != 0 && at < text.size())) continue;
    const std::string_view part = trimmed(text.substr(first, at - first));
    if (!part.empty()) parts.emplace_back(part);
    first = at + 1;
  }
  return parts;
}

uint64_t number_of(std::string_view text) {
  const auto bad = [&] { throw Defect("no number: " + std::string(text)); };
  std::string_view digits = text;
  const bool negative = !digits.empty() && digits[0] == '-';
  if (negative) digits.remove_prefix(1);
  int base = 10;
  if (digits.size() > 2 && digits[0] == '0' && std::strchr("xXfFdD", digits[1]) != nullptr) {
    base = 16;
    digits.remove_prefix(2);
  }
  while (base == 10 && !digits.empty() && digits.back() == 'U') digits.remove_suffix(1);
  uint64_t number = 0;
  const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), number, base);
  if (error != std::errc() || end != digits.data() + digits.size()) bad();
  return negative ? ~number + 1 : number;
}

Variable parse_variable(std::string_view space, std::string_view text) {
  Variable variable;
  variable.space = space;
  std::string_view values;
  if (const size_t equals = text.find('='); equals != std::string_view::npos) {
    values = trimmed(text.substr(equals + 1));
    text = text.substr(0, equals);
  }
  const std::vector<std::string_view> words = words_of(text);
  Type type = Type::kNone;
  for (size_t w = 0; w < words.size(); ++w) {
    if (words[w] == ".align") {
      variable.align = static_cast<int64_t>(number_of(words.at(++w)));
    } else if (words[w][0] == '.') {
      type = type_named(words[w].substr(1));
    } else {
      variable.name += words[w];
    }
  }
  if (type == Type::kNone || variable.name.empty()) throw Defect("no variable: " + std::string(text));
  variable.align = std::max<int64_t>(variable.align, bytes_of(type));
  variable.bytes = bytes_of(type);
  if (const size_t bracket = variable.name.find('['); bracket != std::string::npos) {
    const std::string_view count = std::string_view(variable.name).substr(bracket + 1);
    const size_t end = count.find(']');
    variable.bytes *= end == 0 ? 0 : static_cast<int64_t>(number_of(count.substr(0, end)));
    variable.name.resize(bracket);
  }
  if (space != "global" && space != "const") return variable;
  variable.memory = std::make_shared<std::vector<unsigned char>>(static_cast<size_t>(variable.bytes));
  if (!values.empty() && values[0] == '{') values = values.substr(1, values.rfind('}') - 1);
  size_t at = 0;
  for (const std::string& value : split_operands(values)) {
    const uint64_t number = number_of(value);
    const auto bytes = static_cast<size_t>(bytes_of(type));
    if (at + bytes > variable.memory->size()) throw Defect("too many values for " + variable.name);
    std::memcpy(variable.memory->data() + at, &number, bytes);
    at += bytes;
  }
  return variable;
}

Module parse_module(std::string_view text) {
  Module module;
  for (size_t at = 0; at < text.size();) {
    const size_t line_end = std::min(text.find('\n', at), text.size());
    const std::string_view line = text.substr(at, line_end - at);
    const auto place_of = [&](std::string_view word) { return line.substr(0, line.find("//")).find(word); };
    if (line.substr(0, line.find_first_not_of(" \t") + 8).ends_with(".section")) break;  // tables for debuggers follow
    if (const size_t entry = place_of(".entry "); entry != line.npos) {
      at = parse_entry(text, at + entry + 7, module);
      continue;
    }
    if (place_of(".func ") != line.npos) {  // functions are not called: see decode_control.cpp
      const size_t body = std::min(text.find_first_of("{;", at), text.size() - 1);
      at = text[body] == ';' ? body + 1 : past_bracket(text, body);
      continue;
    }
    if (const std::vector<std::string_view> words = words_of(line); words.size() == 3 && words[0] == ".file") {
      module.files[static_cast<int>(number_of(words[1]))] = words[2].substr(1, words[2].size() - 2);
    }
    // The first variable of the line; another may follow.
    size_t next = line_end + 1, first = line.npos;
    for (const std::string_view space : {".shared ", ".global ", ".const "}) {
      const size_t word = place_of(space);
      if (word >= first) continue;
      first = word;
      const size_t begin = at + word + space.size(), end = text.find(';', begin);
      Variable variable = parse_variable(trimmed(space.substr(1)), text.substr(begin, end - begin));
      variable.external = place_of(".extern ") < word;
      if (module.variables.empty() || module.variables.back().name != variable.name) {
        module.variables.push_back(std::move(variable));
      }
      next = end + 1;
    }
    at = next;
  }
  return module;
}

std::vector<Statement> parse_body(std::string_view with_comments) {
  const std::string text = without_comments(with_comments);
  const std::string_view body = text;
  std::vector<Statement> statements;
  for (size_t at = 0; at < body.size();) {
    if (is_blank(body[at]) || body[at] == ';') {
      ++at;
      continue;
    }
    Statement s;
    if (body[at] == '{' || body[at] == '}') {
      s.kind = body[at] == '{' ? Statement::kOpen : Statement::kClose;
      statements.push_back(s);
      ++at;
      continue;
    }
    if (const std::string_view word = body.substr(at, 5); word == ".loc " || word == ".loc\t") {
      const size_t end = std::min(body.find('\n', at), body.size());
      s.kind = Statement::kLocation;
      s.text = body.substr(at + 5, end - at - 5);
      statements.push_back(std::move(s));
      at = end;
      continue;
    }
    const size_t end = body.find_first_of(":;", at);
    if (end == std::string_view::npos)
      throw Defect("a statement that does not end: " + std::string(body.substr(at, 60)));
    // "L2::128B" has a colon too: a label is one word.
    const bool is_label =
        body[end] == ':' && words_of(body.substr(at, end - at)).size() == 1 && body.substr(end, 2) != "::";
    const size_t stop = is_label ? end : body.find(';', at);
    if (stop == std::string_view::npos)
      throw Defect("a statement that does not end: " + std::string(body.substr(at, 60)));
    s.text = trimmed(body.substr(at, stop - at));
    at = stop + 1;
    if (is_label) {
      s.kind = Statement::kLabel;
    } else if (s.text[0] == '.') {
      s.kind = Statement::kDirective;
    } else {
      std::replace_if(s.text.begin(), s.text.end(), is_blank, ' ');
      std::string_view rest = s.text;
      if (rest[0] == '@') {
        const size_t blank = rest.find(' ');
        s.guard = rest.substr(1, blank - 1);
        rest = trimmed(rest.substr(blank));
      }
      const size_t blank = std::min(rest.find(' '), rest.size());
      s.opcode = rest.substr(0, blank);
      s.operands = split_operands(rest.substr(blank));
    }
    statements.push_back(std::move(s));
  }
  return statements;
}

}  // namespace fastnorm::ptx
