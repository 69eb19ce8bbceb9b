#include <map>

#include "launch.h"

namespace ptx_on_cpu {
namespace {

enum Direction { up, down, butterfly, index };

// Lanes are in segments; the third operand holds what of a lane's number is the segment's, and the last lane.
template <Direction direction>
void shuffle(Launch& launch, const Instruction& i, uint32_t mask) {
  const uint64_t *value = launch.read(i.of[0]), *by = launch.read(i.of[1]), *bounds = launch.read(i.of[2]);
  uint64_t result[kLanes], in_range[kLanes];
  for_lanes(mask, [&](int lane) {
    const int step = int(by[lane] & 31), clamp = int(bounds[lane] & 31), segment = int(bounds[lane] >> 8 & 31);
    const int first = lane & segment, bound = first | (clamp & ~segment);
    int source = first | (step & ~segment);
    if (direction == up) source = lane - step;
    if (direction == down) source = lane + step;
    if (direction == butterfly) source = lane ^ step;
    in_range[lane] = direction == up ? source >= bound : source <= bound;
    if (!in_range[lane]) source = lane;
    if (!(mask >> source & 1)) launch.blame(i, "a shuffle from a lane that does not take part");
    result[lane] = uint32_t(value[source]);
  });
  uint64_t* const to = launch.write(i.to[0]);
  uint64_t* const predicate = i.to.size() > 1 && i.to[1] != kNoRegister ? launch.write(i.to[1]) : nullptr;
  for_lanes(mask, [&](int lane) {
    to[lane] = result[lane];
    if (predicate) predicate[lane] = in_range[lane];
  });
}

enum Question { which, any, all };

template <Question question>
void vote(Launch& launch, const Instruction& i, uint32_t mask) {
  const uint64_t* predicate = launch.read(i.of[0]);
  uint32_t votes = 0;
  for_lanes(mask, [&](int lane) { votes |= uint32_t(predicate[lane] & 1) << lane; });
  const uint64_t answer = question == which ? votes : question == any ? votes != 0 : votes == mask;
  uint64_t* const to = launch.write(i.to[0]);
  for_lanes(mask, [&](int lane) { to[lane] = answer; });
}

void meet(Launch& launch, const Instruction&, uint32_t) { ++launch.warp->epoch; }

const std::map<std::string, Action> kOperations = {
    {"shfl.sync.up.b32", shuffle<up>},          {"shfl.sync.down.b32", shuffle<down>},
    {"shfl.sync.bfly.b32", shuffle<butterfly>}, {"shfl.sync.idx.b32", shuffle<index>},
    {"vote.sync.ballot.b32", vote<which>},      {"vote.sync.any.pred", vote<any>},
    {"vote.sync.all.pred", vote<all>},          {"bar.warp.sync", meet}};

}  // namespace

Action warp_operation(const std::string& name) {
  const auto found = kOperations.find(name);
  return found == kOperations.end() ? nullptr : found->second;
}

}  // namespace ptx_on_cpu
