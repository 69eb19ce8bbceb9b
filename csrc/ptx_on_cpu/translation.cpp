#include "translation.h"

#include <cxxabi.h>

#include <algorithm>
#include <cstdlib>

#include "arithmetic.h"
#include "launch.h"

namespace ptx_on_cpu {
namespace {

// "gaussian_loss_kernel<float>" from a mangled name.
std::string readable(const std::string& mangled) {
  int status = 0;
  char* const text = abi::__cxa_demangle(mangled.c_str(), nullptr, nullptr, &status);
  std::string name = status == 0 ? text : mangled;
  std::free(text);
  for (const std::string space : {"(anonymous namespace)::", "_GLOBAL__N__"})
    for (size_t at; (at = name.find(space)) != std::string::npos;) name.erase(at, name.find("::", at) + 2 - at);
  name.resize(std::min(name.find('('), name.size()));
  for (const std::string space : {"void ", "tardkd::", "cuda::"})
    for (size_t at; (at = name.find(space)) != std::string::npos;) name.erase(at, space.size());
  return name;
}

// The names of one function; those of the call that led to it are parameters of its own.
struct Scope {
  bool is_kernel = false;
  std::map<std::string, int> registers, labels;            // labels: of instructions
  std::map<std::string, uint64_t> params, locals, passed;  // offsets; what is passed to a function is in local memory
  std::vector<std::pair<size_t, std::string>> branches;
  std::vector<size_t> returns;
};

class Translator {
 public:
  Translator(const Module& module, Kernel& kernel) : module_(module), kernel_(kernel) {}

  void translate(const Function& entry) {
    Scope scope;
    scope.is_kernel = true;
    for (const char* name : kSpecialRegisters) special_[name] = kernel_.registers++;
    kernel_.parameters = entry.parameters;
    for (const Variable& parameter : entry.parameters) {
      const uint64_t offset = allot(kernel_.param_bytes, parameter);
      kernel_.parameter_offsets.push_back(scope.params[parameter.name] = offset);
    }
    add_body(entry, scope);
    Instruction end;
    end.flow = Flow::exit;
    kernel_.code.push_back(end);
    kernel_.local_bytes = (kernel_.local_bytes + 15) / 16 * 16;
  }

 private:
  // The next place for a variable in memory of which `used` bytes are taken.
  static uint64_t allot(uint64_t& used, const Variable& variable) {
    const uint64_t offset = (used + variable.align - 1) / variable.align * variable.align;
    used = offset + variable.bytes;
    return offset;
  }

  // ---- operands ----------------------------------------------------------------------------------------------------

  int constant(uint64_t value) {
    const auto [found, is_new] = constants_.emplace(value, int(constants_.size()));
    if (is_new) kernel_.constants.insert(kernel_.constants.end(), kLanes, value);
    return ~found->second;
  }

  int register_of(Scope& scope, const std::string& name) {
    if (name == "_") return kNoRegister;
    if (const auto special = special_.find(name); special != special_.end()) return special->second;
    const auto [found, is_new] = scope.registers.emplace(name, kernel_.registers);
    kernel_.registers += is_new;
    return found->second;
  }

  int operand(Scope& scope, const std::string& text, const Type& type) {
    if (text[0] == '%') return register_of(scope, text);
    if (text.compare(0, 2, "0f") == 0 || text.compare(0, 2, "0d") == 0)
      return constant(std::stoull(text.substr(2), nullptr, 16));
    if (text[0] == '-' || isdigit(text[0])) {
      const uint64_t value = text[0] == '-' ? uint64_t(std::stoll(text, nullptr, 0)) : std::stoull(text, nullptr, 0);
      return constant(type ? value << (64 - 8 * type.bytes) >> (64 - 8 * type.bytes) : value);
    }
    if (module_.shared.count(text)) return constant(0);
    for (const auto* offsets : {&scope.locals, &scope.params})
      if (const auto found = offsets->find(text); found != offsets->end()) return constant(found->second);
    fail("what is " + text + "?");
  }

  static std::vector<std::string> elements(const std::string& text) {  // of "{a, b}" or "(a, b)"; or the text itself
    return text[0] == '{' || text[0] == '(' ? split(text.substr(1, text.size() - 2), ',')
                                            : std::vector<std::string>{text};
  }

  // "[%rd1+-8]" or "[symbol+4]"
  void set_address(Scope& scope, const std::string& text, Instruction& i) {
    const std::string inside = text.substr(1, text.size() - 2);
    const size_t plus = inside.find('+');
    const std::string base = inside.substr(0, plus);
    if (plus != std::string::npos) i.offset = std::stoll(inside.substr(plus + 1), nullptr, 0);
    const auto passed = scope.passed.find(base);
    if (passed != scope.passed.end()) i.space = Space::local;
    i.of.push_back(passed == scope.passed.end() ? operand(scope, base, {}) : constant(passed->second));
  }

  // ---- statements --------------------------------------------------------------------------------------------------

  void add_body(const Function& function, Scope& scope) {
    for (const Statement& statement : function.body) {
      if (statement.is_label) {
        scope.labels[statement.text] = int(kernel_.code.size());
        continue;
      }
      try {
        add(statement, scope);
      } catch (const std::exception& error) {
        fail("line " + std::to_string(statement.line) + ": " + statement.text + ": " + error.what());
      }
    }
    for (const auto& [at, label] : scope.branches) kernel_.code[at].target = scope.labels.at(label);
    for (size_t at : scope.returns) kernel_.code[at].target = int(kernel_.code.size());
  }

  void add(const Statement& statement, Scope& scope) {
    std::string text = statement.text;
    if (text.empty() || text.compare(0, 4, ".reg") == 0 || text.compare(0, 7, ".pragma") == 0) return;
    if (text[0] == '.') {
      Variable variable = parse_variable(text);
      if (text.compare(0, 6, ".param") == 0)
        variable.align = std::max<uint64_t>(variable.align, 8);
      else if (text.compare(0, 6, ".local") != 0)
        fail("this directive is not known");
      auto& offsets = text.compare(0, 6, ".param") == 0 ? scope.passed : scope.locals;
      offsets[variable.name] = allot(kernel_.local_bytes, variable);
      return;
    }
    Instruction i;
    i.line = statement.line;
    i.source = statement.source;
    i.text = text.substr(0, 100);
    if (text[0] == '@') {
      const size_t end = text.find_first_of(" \t");
      i.negated = text[1] == '!';
      i.guard = register_of(scope, text.substr(i.negated ? 2 : 1, end - (i.negated ? 2 : 1)));
      text.erase(0, text.find_first_not_of(" \t", end));
    }
    const std::string name = words(text)[0];
    const std::vector<std::string> opcode = split(name, '.'), operands = split(text.substr(name.size()), ',');
    if (opcode[0] == "call" && i.guard == kNoRegister) return add_call(operands, scope);
    i.type = parse_type(opcode.back());
    set_instruction(i, name, opcode, operands, scope);
    kernel_.code.push_back(std::move(i));
  }

  // The body of the function, in its own scope: "(results), name, (arguments)", of which the lists may be absent.
  void add_call(std::vector<std::string> operands, Scope& scope) {
    Scope inner;
    const bool has_results = operands[0][0] == '(';
    const Function& function = module_.functions.at(operands[has_results]);
    const auto pass = [&](const std::string& list, const std::vector<Variable>& parameters) {
      const std::vector<std::string> names = elements(list);
      for (size_t k = 0; k < names.size(); ++k) inner.passed[parameters[k].name] = scope.passed.at(names[k]);
    };
    if (has_results) pass(operands[0], function.results);
    if (operands.size() > size_t(has_results) + 1) pass(operands.back(), function.parameters);
    add_body(function, inner);
  }

  void set_instruction(Instruction& i, const std::string& name, const std::vector<std::string>& opcode,
                       const std::vector<std::string>& operands, Scope& scope) {
    const std::string& kind = opcode[0];
    if (kind == "bra") {
      i.flow = Flow::branch;
      scope.branches.emplace_back(kernel_.code.size(), operands[0]);
    } else if (kind == "ret" || kind == "exit") {
      const bool ends = kind == "exit" || scope.is_kernel;
      i.flow = ends ? Flow::exit : Flow::branch;
      if (!ends) scope.returns.push_back(kernel_.code.size());
    } else if (kind == "ld" || kind == "st" || kind == "atom" || kind == "red") {
      set_access(i, opcode, operands, scope);
    } else if ((name == "bar.sync" || name == "barrier.sync") && operands == std::vector<std::string>{"0"}) {
      i.flow = Flow::barrier;
    } else if (name == "membar.gl" || name == "membar.sys" || name == "fence.acq_rel.gpu" || name == "fence.sc.gpu") {
      i.action = fence;
    } else if ((i.action = warp_operation(name)) != nullptr) {
      i.flow = Flow::meeting;
      const size_t results = kind == "bar" ? 0 : 1;
      if (results)
        for (const std::string& to : split(operands[0], '|')) i.to.push_back(register_of(scope, to));
      for (size_t k = results; k < operands.size(); ++k) i.of.push_back(operand(scope, operands[k], {'b', 4}));
    } else {
      for (const std::string& to : elements(operands.at(0))) i.to.push_back(register_of(scope, to));
      for (size_t k = 1; k < operands.size(); ++k)
        for (const std::string& of : elements(operands[k])) i.of.push_back(operand(scope, of, i.type));
      if (!set_arithmetic(i, opcode)) fail("this instruction is not known");
    }
  }

  void set_access(Instruction& i, const std::vector<std::string>& opcode, const std::vector<std::string>& operands,
                  Scope& scope) {
    const bool is_load = opcode[0] == "ld";
    i.is_atomic = opcode[0] == "atom" || opcode[0] == "red";
    i.is_store = !is_load;
    bool adds = false;
    for (size_t k = 1; k + 1 < opcode.size(); ++k) {
      const std::string& word = opcode[k];
      const bool adds_here = word == "add" && i.is_atomic, skips = word == "cg" && is_load;
      const bool orders = word == "acq_rel" && i.is_atomic, widens = word == "v2" || word == "v4";
      const auto space = kSpaces.find(word);
      if (space != kSpaces.end()) i.space = space->second;
      if (widens) i.vector = word[1] - '0';
      adds |= adds_here;
      i.skips_l1 |= skips;
      i.acquires_and_releases |= orders;
      const bool is_known = adds_here || skips || orders || widens || space != kSpaces.end();
      if (!is_known && word != "nc" && word != "gpu") fail("." + word + " is not known here");
    }
    const bool has_result = operands[0][0] != '[';
    if (has_result)
      for (const std::string& to : elements(operands[0])) i.to.push_back(register_of(scope, to));
    i.to.resize(size_t(i.vector), kNoRegister);
    set_address(scope, operands.at(has_result), i);
    for (size_t k = size_t(has_result) + 1; k < operands.size(); ++k)
      for (const std::string& of : elements(operands[k])) i.of.push_back(operand(scope, of, i.type));
    i.action = i.is_atomic ? atomic_add(i.type) : access;
    const size_t values = is_load ? 0 : size_t(i.vector);
    if (i.of.size() != 1 + values || !i.action || adds != i.is_atomic) fail("this access is not known");
  }

  const Module& module_;
  Kernel& kernel_;
  std::map<std::string, int> special_;
  std::map<uint64_t, int> constants_;
};

}  // namespace

std::unique_ptr<Kernel> translate(const Module& module, const Function& entry) {
  auto kernel = std::make_unique<Kernel>();
  kernel->name = readable(entry.name);
  kernel->entry = entry.name;
  Translator(module, *kernel).translate(entry);
  return kernel;
}

}  // namespace ptx_on_cpu
