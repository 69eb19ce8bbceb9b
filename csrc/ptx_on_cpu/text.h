// PTX as it is written: functions, their parameters and statements. What the statements mean is translation.h's matter.
#pragma once

#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <vector>

namespace ptx_on_cpu {

// Of an operand; "b32" has the kind 'b' and 4 bytes. "bf16" has the kind 'h', "pred" the kind 'p'.
struct Type {
  char kind = 0;
  int bytes = 0;

  explicit operator bool() const { return kind != 0; }
  bool is_float() const { return kind == 'f' || kind == 'h'; }
};

Type parse_type(const std::string& word);  // without its dot; no type at all: kind 0

// A parameter of a function, or a variable in local memory.
struct Variable {
  std::string name;
  uint64_t bytes = 0, align = 1;
};

Variable parse_variable(const std::string& declaration);

struct Statement {
  std::string text;
  int line = 0;        // of the PTX
  std::string source;  // "pool.cuh:12"
  bool is_label = false;
};

struct Function {
  std::string name;
  std::vector<Variable> results, parameters;
  std::vector<Statement> body;
};

struct Module {
  int architecture = 0;
  std::map<std::string, Function> functions;
  std::set<std::string> shared;  // names of the block's dynamic shared memory
};

Module parse(const std::string& ptx);

std::vector<std::string> words(const std::string& text);
std::vector<std::string> split(const std::string& text, char by);  // outside of brackets

[[noreturn]] void fail(const std::string& problem);

}  // namespace ptx_on_cpu
