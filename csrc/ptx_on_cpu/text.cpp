#include "text.h"

#include <algorithm>
#include <sstream>
#include <stdexcept>

namespace ptx_on_cpu {
namespace {

constexpr char kBlanks[] = " \t\r\n";

std::string trim(const std::string& text) {
  const size_t first = text.find_first_not_of(kBlanks);
  return first == std::string::npos ? "" : text.substr(first, text.find_last_not_of(kBlanks) + 1 - first);
}

std::string without_comments(std::string text) {
  for (size_t at = 0; (at = text.find("//", at)) != std::string::npos;)
    for (; at < text.size() && text[at] != '\n'; ++at) text[at] = ' ';
  return text;
}

// Walks over a text and counts its lines.
class Cursor {
 public:
  explicit Cursor(const std::string& text) : text_(text) {}

  bool at_end() {
    move_to(text_.find_first_not_of(kBlanks, at_));
    return at_ == text_.size();
  }
  bool sees(const std::string& start) const { return text_.compare(at_, start.size(), start) == 0; }

  // What comes before the first of `ends`, which is passed over and kept in `end`.
  std::string take(const char* ends) {
    const size_t begin = at_;
    move_to(text_.find_first_of(ends, at_));
    const std::string taken = text_.substr(begin, at_ - begin);
    end = text_[at_];
    if (at_ < text_.size()) move_to(at_ + 1);
    return trim(taken);
  }
  // A name and a colon; or nothing.
  std::string take_label() {
    const size_t colon =
        text_.find_first_not_of("$_0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ", at_);
    return colon != at_ && colon != std::string::npos && text_[colon] == ':' ? take(":") : "";
  }

  int line = 1;
  char end = 0;

 private:
  void move_to(size_t to) {
    to = std::min(to, text_.size());
    line += int(std::count(text_.begin() + long(at_), text_.begin() + long(to), '\n'));
    at_ = to;
  }

  const std::string& text_;
  size_t at_ = 0;
};

std::vector<Variable> parse_variables(const std::string& list) {
  std::vector<Variable> variables;
  for (const std::string& declaration : split(list, ',')) variables.push_back(parse_variable(declaration));
  return variables;
}

// After ".entry" or ".func": results, name, parameters, directives, body. Of a declaration only the first three.
Function parse_function(Cursor& in, const std::string& head, const std::map<int, std::string>& files) {
  Function function;
  function.name = words(head).back();
  if (function.name == ".func") {
    function.results = parse_variables(in.take(")"));
    function.name = in.take("(");
  }
  if (in.end == '(') function.parameters = parse_variables(in.take(")"));
  if (in.end != '{' && in.end != ';') in.take("{;");
  std::string source;
  for (int depth = in.end == '{'; depth > 0 && !in.at_end();) {
    const int line = in.line;
    if (in.sees("{") || in.sees("}")) {
      depth += in.sees("{") ? 1 : -1;
      in.take("{}");
    } else if (in.sees(".loc\t") || in.sees(".loc ")) {
      const auto place = words(in.take("\n"));
      if (place[2] != "0") source = files.at(std::stoi(place[1])) + ":" + place[2];
    } else if (const std::string label = in.take_label(); !label.empty()) {
      function.body.push_back({label, line, source, true});
    } else {
      function.body.push_back({in.take(";"), line, source, false});
    }
  }
  return function;
}

}  // namespace

void fail(const std::string& problem) { throw std::runtime_error("ptx_on_cpu: " + problem); }

std::vector<std::string> words(const std::string& text) {
  std::istringstream in(text);
  std::vector<std::string> all;
  for (std::string word; in >> word;) all.push_back(word);
  return all;
}

std::vector<std::string> split(const std::string& text, char by) {
  std::vector<std::string> parts;
  int depth = 0;
  std::string part;
  for (char c : text + by) {
    depth += (c == '{' || c == '[' || c == '(') - (c == '}' || c == ']' || c == ')');
    if (c == by && depth == 0) {
      parts.push_back(trim(part));
      part.clear();
    } else {
      part += c;
    }
  }
  return trim(text).empty() ? std::vector<std::string>{} : parts;
}

Type parse_type(const std::string& word) {
  if (word == "pred") return {'p', 1};
  if (word == "bf16") return {'h', 2};
  const bool known = word.size() > 1 && std::string("busf").find(word[0]) != std::string::npos &&
                     word.find_first_not_of("0123456789", 1) == std::string::npos;
  return known ? Type{word[0], std::stoi(word.substr(1)) / 8} : Type{};
}

// ".param .align 8 .b8 name[40]" or ".param .b64 name"
Variable parse_variable(const std::string& declaration) {
  const auto parts = words(declaration);
  Variable variable{parts.back()};
  for (size_t k = 0; k + 1 < parts.size(); ++k) {
    if (const Type type = parse_type(parts[k].substr(1))) variable.bytes = variable.align = uint64_t(type.bytes);
  }
  for (size_t k = 0; k + 1 < parts.size(); ++k)
    if (parts[k] == ".align") variable.align = std::stoull(parts[k + 1]);
  const size_t bracket = variable.name.find('[');
  if (bracket != std::string::npos) {
    const std::string count = variable.name.substr(bracket + 1);
    variable.bytes *= count == "]" ? 0 : std::stoull(count);
    variable.name.resize(bracket);
  }
  return variable;
}

// The names of the source files by their numbers, which are at the end: `.file 1 "csrc/cuda/pool.cuh"`.
static std::map<int, std::string> file_names(const std::string& text) {
  std::map<int, std::string> names;
  for (size_t at = 0; (at = text.find(".file\t", at)) != std::string::npos; ++at) {
    const std::string line = text.substr(at, text.find('\n', at) - at), path = line.substr(0, line.rfind('"'));
    names[std::stoi(words(line)[1])] = path.substr(path.find_last_of("/\"") + 1);
  }
  return names;
}

Module parse(const std::string& ptx) {
  const std::string text = without_comments(ptx);
  Module module;
  const std::map<int, std::string> files = file_names(text);
  for (Cursor in(text); !in.at_end();) {
    const auto directive = [&](const char* name) { return in.sees(std::string(".") + name); };
    if (directive("target")) {
      module.architecture = std::stoi(in.take("\n").substr(std::string(".target sm_").size()));
    } else if (directive("version") || directive("address_size") || directive("file")) {
      in.take("\n");
    } else if (directive("section")) {
      in.take("}");
    } else if (directive("extern .shared")) {
      module.shared.insert(parse_variable(in.take(";")).name);
    } else {
      const std::string head = in.take("({;");
      if (head.find(".entry") == std::string::npos && head.find(".func") == std::string::npos)
        fail("not understood outside of functions: " + head);
      Function function = parse_function(in, head, files);
      if (!function.body.empty()) module.functions[function.name] = std::move(function);
    }
  }
  return module;
}

}  // namespace ptx_on_cpu
