// A kernel as it runs: instructions, each done by one function for the lanes of a warp that take part.
#pragma once

#include <climits>
#include <cstdint>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "text.h"

namespace ptx_on_cpu {

constexpr int kLanes = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;

struct Launch;
struct Instruction;
using Action = void (*)(Launch&, const Instruction&, uint32_t mask);

enum class Space : uint8_t { generic, global, shared, local, param };

// A generic address has its space in the highest bits; those of global memory are addresses of this process.
constexpr int kWindowShift = 60;
constexpr Space kWindows[] = {Space::global, Space::shared, Space::local, Space::param};
inline const std::map<std::string, Space> kSpaces = {
    {"global", Space::global}, {"shared", Space::shared}, {"local", Space::local}, {"param", Space::param}};

// How a warp goes on after an instruction: at a barrier it waits for its block, at a meeting for its own lanes.
enum class Flow : uint8_t { next, branch, exit, barrier, meeting };

// What was counted of an instruction. `units` of a memory access: sectors of 32 bytes of global memory, or wavefronts
// of shared memory; `fewest`: how many would have done for as many bytes; `shared_addresses`: lanes with another's
// address.
struct Count {
  uint64_t warps = 0, lanes = 0, units = 0, fewest = 0, shared_addresses = 0;
};

// Registers have numbers from zero on, constants below; each holds 64 bits a lane, of which an instruction uses as many
// as its type has.
constexpr int kNoRegister = INT_MIN;

struct Instruction {
  Action action = nullptr;
  Action rounded = nullptr;  // what `action` runs with another rounding
  Flow flow = Flow::next;
  Type type, from;  // `from`: of what is converted
  Space space = Space::generic;
  bool is_store = false, is_atomic = false, skips_l1 = false, acquires_and_releases = false, negated = false;
  bool saturates = false;   // a conversion to a float: holds it between 0 and 1
  int vector = 1;           // elements of an access
  int mode = 0;             // of rounding, or which relations hold for a comparison
  int guard = kNoRegister;  // a predicate: the lanes that take part, or do not if negated
  std::vector<int> to, of;
  int64_t offset = 0;
  int target = -1;  // of a branch
  int line = 0;     // of the PTX
  std::string text, source;
  mutable Count count;
};

struct Kernel {
  std::string name, entry;  // without namespaces; as the PTX spells it
  std::vector<Instruction> code;
  std::vector<uint64_t> constants;  // kLanes of each
  int registers = 0;
  uint64_t local_bytes = 0, param_bytes = 0;
  std::vector<Variable> parameters;
  std::vector<uint64_t> parameter_offsets;
  uint64_t launches = 0, blocks = 0, threads = 0, barriers = 0, shared_bytes = 0;
};

// Registers that every warp has from the start.
constexpr const char* kSpecialRegisters[] = {"%tid.x",    "%tid.y",    "%tid.z",   "%ntid.x",  "%ntid.y",
                                             "%ntid.z",   "%ctaid.x",  "%ctaid.y", "%ctaid.z", "%nctaid.x",
                                             "%nctaid.y", "%nctaid.z", "%laneid"};

template <class T>
T value(uint64_t bits) {
  T t;
  std::memcpy(&t, &bits, sizeof t);
  return t;
}
template <class T>
uint64_t bits(T t) {
  uint64_t all = 0;
  std::memcpy(&all, &t, sizeof t);
  return all;
}

template <class F>
void for_lanes(uint32_t mask, F f) {
  if (mask == kAllLanes) {
    for (int lane = 0; lane < kLanes; ++lane) f(lane);
  } else {
    for (; mask; mask &= mask - 1) f(__builtin_ctz(mask));
  }
}

}  // namespace ptx_on_cpu
