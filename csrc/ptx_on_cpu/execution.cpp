#include <algorithm>
#include <numeric>
#include <optional>

#include "launch.h"

namespace ptx_on_cpu {
namespace {

// More instructions than any warp takes until its block's next barrier, and not so many that it takes long.
constexpr uint64_t kEndless = uint64_t(1) << 22;

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t below(uint64_t n) {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return ((z ^ (z >> 31)) >> 32) * n >> 32;
  }

 private:
  uint64_t state_;
};

// Takes from the warp the group that runs next, joined with those at the same instruction: without `random` the one
// that is furthest behind. Nothing: all wait or have returned.
std::optional<Group> take_group(Warp& warp, Random* random) {
  std::optional<Group> chosen;
  uint64_t candidates = 0;
  for (const Group& group : warp.groups) {
    if (group.state != Group::runs) continue;
    ++candidates;
    if (!chosen || (random ? random->below(candidates) == 0 : group.at < chosen->at)) chosen = group;
  }
  if (!chosen) return chosen;
  const auto joins = [&](const Group& group) {
    const bool does = group.state == Group::runs && group.at == chosen->at;
    if (does) chosen->mask |= group.mask;
    return does;
  };
  warp.groups.erase(std::remove_if(warp.groups.begin(), warp.groups.end(), joins), warp.groups.end());
  return chosen;
}

// Runs a warp operation once all lanes of its mask are there. False: they are not.
bool meet(Launch& launch, const Instruction& i, Group& group) {
  Warp& warp = *launch.warp;
  const uint32_t wanted = uint32_t(launch.read(i.of.back())[__builtin_ctz(group.mask)]);
  if (group.mask & ~wanted) launch.blame(i, "a lane outside the mask of its warp operation");
  const auto waits_here = [&](const Group& other) { return other.state == Group::at_meeting && other.at == group.at; };
  uint32_t here = group.mask;
  for (const Group& other : warp.groups) here |= waits_here(other) ? other.mask : 0;
  if ((here & wanted) != (wanted & warp.live)) return false;
  if ((wanted & warp.live) != wanted) launch.blame(i, "a warp operation waits for lanes that have returned");
  warp.groups.erase(std::remove_if(warp.groups.begin(), warp.groups.end(), waits_here), warp.groups.end());
  group.mask = here;
  i.action(launch, i, here);
  ++group.at;
  return true;
}

// Runs a group for at most `most` instructions or up to `end`, until its lanes part or wait. Returns how many it ran.
uint64_t run_group(Launch& launch, Group group, uint64_t most, int end) {
  Warp& warp = *launch.warp;
  for (uint64_t steps = 0;; ++steps) {
    if (steps == most || group.at >= end) return warp.groups.push_back(group), steps;
    const Instruction& i = launch.kernel.code[size_t(group.at)];
    uint32_t mask = group.mask;
    if (i.guard != kNoRegister) {
      const uint64_t* predicate = launch.read(i.guard);
      uint32_t holds = 0;
      for_lanes(mask, [&](int lane) { holds |= uint32_t(predicate[lane] & 1) << lane; });
      mask &= i.negated ? ~holds : holds;
    }
    ++i.count.warps;
    i.count.lanes += uint64_t(__builtin_popcount(mask));
    if (i.flow == Flow::next || mask == 0) {
      if (mask) i.action(launch, i, mask);
      ++group.at;
      continue;
    }
    if (i.flow == Flow::branch && mask == group.mask) {
      group.at = i.target;
      continue;
    }
    if (mask != group.mask) warp.groups.push_back({group.at + 1, group.mask & ~mask, Group::runs});
    group.mask = mask;
    if (i.flow == Flow::meeting && meet(launch, i, group)) continue;
    if (i.flow == Flow::exit) {
      warp.live &= ~mask;
    } else {
      if (i.flow == Flow::branch) group.at = i.target;
      if (i.flow == Flow::barrier) group.state = Group::at_barrier;
      if (i.flow == Flow::meeting) group.state = Group::at_meeting;
      warp.groups.push_back(group);
    }
    return steps + 1;
  }
}

// Until all of the warp waits or has returned; with `random` for at most `most` instructions.
void run_warp(Launch& launch, Warp& warp, Random* random, uint64_t most) {
  launch.warp = &warp;
  for (uint64_t steps = 0; steps < most;) {
    const std::optional<Group> group = take_group(warp, random);
    if (!group) return;
    // In order, a group stops where one that is ahead of it can join it.
    int end = INT_MAX;
    for (const Group& other : warp.groups)
      if (!random && other.state == Group::runs) end = std::min(end, other.at);
    steps += 1 + run_group(launch, *group, std::min(most - steps, random ? 1 + random->below(24) : most), end);
    if (steps > kEndless) fail(launch.kernel.name + " waits for ever, for another block perhaps");
  }
}

void start_block(Launch& launch, const Dim& grid, const Dim& block, uint64_t number, size_t shared_bytes) {
  launch.block = number;
  launch.block_stamp = ++launch.stamps;
  launch.barriers = 0;
  launch.acquired = {};
  launch.shared.assign(shared_bytes, 0xff);
  launch.shared_shadow.resize((shared_bytes + 3) / 4);
  launch.local.assign(size_t(launch.block_threads) * launch.kernel.local_bytes, 0xff);
  launch.warps.resize(launch.block_threads / kLanes);
  for (size_t n = 0; n < launch.warps.size(); ++n) {
    Warp& warp = launch.warps[n];
    const uint64_t lanes = std::min<uint64_t>(kLanes, block.count() - n * kLanes);
    warp.registers.resize(size_t(launch.kernel.registers) * kLanes);
    warp.number = int(n);
    warp.epoch = 0;
    warp.live = kAllLanes >> (kLanes - lanes);
    warp.groups.assign(1, Group{0, warp.live, Group::runs});
    for (size_t lane = 0; lane < kLanes; ++lane) {
      const uint64_t t = n * kLanes + lane;
      const uint64_t special[] = {t % block.x,
                                  t / block.x % block.y,
                                  t / block.x / block.y,
                                  block.x,
                                  block.y,
                                  block.z,
                                  number % grid.x,
                                  number / grid.x % grid.y,
                                  number / grid.x / grid.y,
                                  grid.x,
                                  grid.y,
                                  grid.z,
                                  lane};
      for (size_t k = 0; k < std::size(kSpecialRegisters); ++k) warp.registers[k * kLanes + lane] = special[k];
    }
  }
}

// All of the block's warps wait at its barrier, at the same one, or have returned. False: all have.
bool pass_barrier(Launch& launch) {
  const Group* first = nullptr;
  for (const Warp& warp : launch.warps) {
    for (const Group& group : warp.groups) {
      const Instruction& i = launch.kernel.code[size_t(group.at)];
      if (group.state != Group::at_barrier) {
        launch.blame(i, "deadlock");
        fail(launch.kernel.name + ": deadlock at " + i.source + ": " + i.text);
      }
      if (first && first->at != group.at) launch.blame(i, "threads of a block at different barriers");
      first = &group;
    }
  }
  for (Warp& warp : launch.warps)
    for (Group& group : warp.groups) group = {group.at + 1, group.mask, Group::runs};
  ++launch.barriers;
  launch.kernel.barriers += first != nullptr;
  return first != nullptr;
}

void run_block(Launch& launch, Random* random) {
  do {
    for (size_t n = 0; random && n < 4 * launch.warps.size(); ++n)
      run_warp(launch, launch.warps[random->below(launch.warps.size())], random, 1 + random->below(400));
    for (Warp& warp : launch.warps) run_warp(launch, warp, random, UINT64_MAX);
  } while (pass_barrier(launch));
}

}  // namespace

void run(Launch& launch, const Dim& grid, const Dim& block, size_t shared_bytes, uint64_t seed) {
  launch.block_threads = uint32_t((block.count() + kLanes - 1) / kLanes * kLanes);
  launch.releases.resize(grid.count());
  launch.fences.resize(grid.count() * launch.block_threads);
  Random random(seed);
  std::vector<uint64_t> order(grid.count());
  std::iota(order.begin(), order.end(), 0);
  for (size_t left = order.size(); seed && left > 1; --left) std::swap(order[left - 1], order[random.below(left)]);
  for (uint64_t number : order) {
    start_block(launch, grid, block, number, shared_bytes);
    run_block(launch, seed ? &random : nullptr);
  }
}

}  // namespace ptx_on_cpu
