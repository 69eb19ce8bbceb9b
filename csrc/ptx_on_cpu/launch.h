// One launch of a kernel: its blocks run one after the other, the warps of a block in turn. Whatever breaks a rule is
// found, and the launch ends with an error that names all of it.
#pragma once

#include <map>
#include <memory>

#include "cache.h"
#include "program.h"

namespace ptx_on_cpu {

struct Dim {
  unsigned x, y, z;
  uint64_t count() const { return uint64_t(x) * y * z; }
};

// Lanes of a warp that are at the same instruction.
struct Group {
  enum State { runs, at_barrier, at_meeting };
  int at;
  uint32_t mask;
  State state;
};

struct Warp {
  std::vector<uint64_t> registers;  // kLanes of each
  std::vector<Group> groups;
  int number = 0;      // in the block
  uint32_t live = 0;   // lanes that have not returned
  uint32_t epoch = 0;  // bar.warp.sync met so far
};

// Who accessed one element of memory last, for the detection of races.
struct Shadow {
  static constexpr int32_t kNobody = -1, kSeveral = -2;
  uint64_t stamp = 0;  // of the launch or block that the rest is about
  int32_t writer = kNobody, reader = kNobody;
  uint32_t write_barriers = 0, write_epoch = 0, write_fences = 0, read_barriers = 0, read_epoch = 0;
  bool atomic = false;
};

// A tensor that launches may touch.
struct Range {
  uint64_t begin, end, item;
  std::vector<Shadow> shadow;  // an element each
};
using Ranges = std::map<uint64_t, Range>;  // by their begin; without any, global memory is not checked

struct Blamed {};  // ends a launch whose findings are to be reported

struct Launch {
  Kernel& kernel;
  Ranges& ranges;
  uint64_t& stamps;  // given out so far
  uint64_t launch_stamp = 0;
  std::map<std::string, uint64_t> findings;
  uint64_t blames = 0;
  std::vector<uint8_t> params;
  std::vector<Trace> traces;  // by block; or none

  // Of the block that runs.
  uint64_t block = 0, block_stamp = 0;
  uint32_t block_threads = 0, barriers = 0;  // whole warps; met so far
  std::vector<uint8_t> shared, local;
  std::vector<Shadow> shared_shadow;  // a word each
  std::vector<Warp> warps;
  Warp* warp = nullptr;
  Range* last_range = nullptr;

  // What a block wrote before a fence and a barrier is seen by a block that has met its atomic on an integer.
  struct Meeting {
    int32_t thread = -1;  // of the grid
    uint32_t barriers = 0;
    bool has_fence = false;
  };
  std::vector<Meeting> releases;  // by block, the last
  Meeting acquired;               // by this block
  std::vector<uint32_t> fences;   // by thread of the grid, so far

  Launch(Kernel& kernel, Ranges& ranges, uint64_t& stamps) : kernel(kernel), ranges(ranges), stamps(stamps) {}

  const uint64_t* read(int i) const {
    return i >= 0 ? &warp->registers[size_t(i) * kLanes] : &kernel.constants[size_t(~i) * kLanes];
  }
  uint64_t* write(int i) { return &warp->registers[size_t(i) * kLanes]; }
  int32_t thread_of_grid(int lane) const { return int32_t(block * block_threads) + warp->number * kLanes + lane; }
  // Who breaks a rule at every step breaks it often: a launch ends after so many findings.
  void blame(const Instruction& instruction, const std::string& what) {
    constexpr uint64_t kEnough = 1000;
    ++findings[what + " | " + instruction.source + " | " + instruction.text];
    if (++blames == kEnough) throw Blamed{};
  }
};

// execution.cpp. Seed 0: blocks and warps in order; else blocks shuffled, and parts of warps a few instructions at a
// time in random order.
void run(Launch& launch, const Dim& grid, const Dim& block, size_t shared_bytes, uint64_t seed);

// races.cpp. Notes an access to an element whose `shadow` is given, and blames it if nothing orders it after others.
void track(Launch&, const Instruction&, Shadow& shadow, uint64_t stamp, int32_t thread, bool writes);

// counters.cpp. Counts the access of the lanes of `mask` to `bytes` bytes each.
void count_access(Launch&, const Instruction&, Space space, const uint64_t* addresses, uint32_t mask, uint32_t bytes);

// Actions. memory.cpp:
void access(Launch&, const Instruction&, uint32_t mask);  // loads and stores
Action atomic_add(const Type& type);
void fence(Launch&, const Instruction&, uint32_t mask);
// warp_operations.cpp: by the names that PTX has for them, such as "shfl.sync.up"; null: there is none.
Action warp_operation(const std::string& name);

}  // namespace ptx_on_cpu
