#include "compile.h"

#include <map>
#include <utility>

#include "decoding.h"
#include "defect.h"
#include "locations.h"
#include "names.h"

namespace fastnorm::ptx {

namespace {

struct AllDecoders {
  Decoders integers, floats, halves, approximations;
  Decoders others;  // of names that no type tells apart

  AllDecoders() {
    add_integers(integers);
    add_floats(floats);
    add_halves(halves);
    add_approximations(approximations);
    for (const auto add : {add_bits, add_comparisons, add_conversions, add_moves, add_memory, add_atomics, add_copies,
                           add_warp, add_control}) {
      add(others);
    }
  }

  // For "add.f32" and the like, by the type and .approx or .full in the opcode.
  const Decoders& arithmetic(std::string_view opcode) const {
    bool is_float = false, is_half = false, approximate = false;
    while (!opcode.empty()) {
      const size_t dot = std::min(opcode.find('.'), opcode.size());
      const std::string_view part = opcode.substr(0, dot);
      const Type type = type_named(part);
      is_float |= type == Type::kF32 || type == Type::kF64;
      is_half |= type >= Type::kF16 && type <= Type::kBF16x2;
      approximate |= part == "approx" || part == "full";
      opcode.remove_prefix(std::min(dot + 1, opcode.size()));
    }
    return approximate ? approximations : is_half ? halves : is_float ? floats : integers;
  }

  Decoder find(std::string_view opcode) const {
    const std::string_view name = opcode.substr(0, opcode.find('.'));
    for (const Decoders* decoders : {&others, &arithmetic(opcode)}) {
      if (const auto found = decoders->find(name); found != decoders->end()) return found->second;
    }
    return nullptr;
  }
};

class Compiler {
 public:
  Compiler(const Module& module, const Entry& entry) : names_(kernel_, module), entry_(entry), locations_(module) {
    for (const Variable& variable : module.variables) {
      if (variable.memory) kernel_.variables.push_back(variable.memory);
    }
  }

  Kernel run() {
    kernel_.name = entry_.name;
    names_.declare_parameters(entry_.parameters);
    names_.place_static_shared(entry_.body);
    const std::vector<std::string_view> directives = words_of(entry_.directives);
    for (size_t w = 0; w + 1 < directives.size(); ++w) {
      const std::string_view first = directives[w + 1].substr(0, directives[w + 1].find(','));
      if (directives[w] == ".maxntid") kernel_.most_threads = static_cast<int>(number_of(first));
    }
    for (const Statement& statement : parse_body(entry_.body)) add(statement);
    Statement end;
    end.opcode = end.text = "ret";  // after the last one
    decode(end);
    set_targets();
    assign_registers(kernel_, names_);
    return std::move(kernel_);
  }

 private:
  void add(const Statement& statement) {
    switch (statement.kind) {
      case Statement::kOpen: return names_.open();
      case Statement::kClose: return names_.close();
      case Statement::kLocation: return locations_.set(statement.text);
      case Statement::kLabel:
        labels_[statement.text] = static_cast<uint32_t>(kernel_.code.size());
        last_label_ = statement.text;
        return;
      case Statement::kDirective:
        if (statement.text.starts_with(".branchtargets")) {
          lists_[last_label_] = split_operands(std::string_view(statement.text).substr(14));
        } else {
          names_.declare(statement.text);
        }
        return;
      default: decode(statement);
    }
  }

  void decode(const Statement& statement) {
    static const AllDecoders decoders;
    const Decoder decoder = decoders.find(statement.opcode);
    if (decoder == nullptr) throw Defect("an instruction that is not known: " + statement.text);
    Decoding decoding(statement, names_);
    decoder(decoding);
    decoding.i.text = static_cast<uint32_t>(kernel_.texts.size());
    kernel_.texts.push_back(statement.text + locations_.text());
    if (decoding.i.flow == Flow::kBranch) branches_.push_back({kernel_.code.size(), statement.operands[0]});
    if (decoding.i.flow == Flow::kIndexed) branches_.push_back({kernel_.code.size(), statement.operands[1]});
    kernel_.code.push_back(decoding.i);
  }

  uint32_t place_of(const std::string& label) const {
    const auto found = labels_.find(label);
    if (found == labels_.end()) throw Defect("no label " + label);
    return found->second;
  }

  void set_targets() {
    std::vector<Instruction>& code = kernel_.code;
    for (const auto& [at, label] : branches_) {
      if (code[at].flow == Flow::kBranch) {
        code[at].target = place_of(label);
        code[code[at].target].begins_block = true;
        continue;
      }
      const auto list = lists_.find(label);
      if (list == lists_.end()) throw Defect("no list of targets " + label);
      code[at].target = static_cast<uint32_t>(kernel_.targets.size());
      kernel_.targets.emplace_back();
      for (const std::string& name : list->second) {
        kernel_.targets.back().push_back(place_of(name));
        code[kernel_.targets.back().back()].begins_block = true;
      }
    }
    for (size_t at = 1; at < code.size(); ++at) {
      if (code[at - 1].flow != Flow::kNext) code[at].begins_block = true;
    }
  }

  Kernel kernel_;
  Names names_;
  const Entry& entry_;
  Locations locations_;
  std::map<std::string, uint32_t> labels_;
  std::map<std::string, std::vector<std::string>> lists_;  // of indexed branches
  std::string last_label_;
  std::vector<std::pair<size_t, std::string>> branches_;
};

}  // namespace

Kernel compile(const Module& module, const std::string& name) {
  const auto entry = module.entries.find(name);
  if (entry == module.entries.end()) throw Defect("no kernel " + name);
  try {
    return Compiler(module, entry->second).run();
  } catch (const Defect& defect) {
    throw Defect(std::string(defect.what()) + ", in " + name);
  }
}

}  // namespace fastnorm::ptx
