#include <algorithm>
#include <array>

#include "launch.h"

namespace ptx_on_cpu {
namespace {

constexpr uint64_t kSector = 32, kBank = 4, kBanks = 32;

// How many of the values differ.
template <size_t n>
uint64_t distinct(std::array<uint64_t, n>& values, size_t count) {
  std::sort(values.begin(), values.begin() + long(count));
  return uint64_t(std::unique(values.begin(), values.begin() + long(count)) - values.begin());
}

// A lane's bytes are within one sector. `trace`: what the block asks for; or null.
void count_sectors(const Instruction& i, Trace* trace, const uint64_t* addresses, uint32_t mask, uint32_t bytes) {
  Count& count = i.count;
  std::array<uint64_t, kLanes> sectors, own;
  size_t lanes = 0;
  for_lanes(mask, [&](int lane) {
    sectors[lanes] = addresses[lane] / kSector;
    own[lanes++] = addresses[lane];
  });
  const uint64_t places = distinct(own, lanes);
  const uint64_t asked = distinct(sectors, lanes);
  const Touch touch = i.is_atomic ? Touch::atomic : i.is_store ? Touch::store : Touch::load;
  for (size_t k = 0; trace && k < asked; ++k) trace->add(sectors[k], touch);
  count.units += asked;
  count.fewest += (places * bytes + kSector - 1) / kSector;
  count.shared_addresses += lanes - places;
}

// Words of one bank are served one after the other, the same word at once. 8 bytes a lane go in two halves of a warp,
// 16 in four quarters.
void count_wavefronts(Count& count, const uint64_t* addresses, uint32_t mask, uint32_t bytes) {
  const int phases = bytes <= kBank ? 1 : int(bytes / kBank), lanes = kLanes / phases;
  for (int phase = 0; phase < phases; ++phase) {
    std::array<uint64_t, kLanes * 4> seen;
    size_t words = 0;
    for (int lane = phase * lanes; lane < (phase + 1) * lanes; ++lane)
      for (uint32_t k = 0; mask >> lane & 1 && k < std::max<uint32_t>(bytes / kBank, 1); ++k)
        seen[words++] = addresses[lane] / kBank + k;
    std::array<uint64_t, kBanks> in_bank{};
    words = distinct(seen, words);
    for (size_t word = 0; word < words; ++word) ++in_bank[seen[word] % kBanks];
    count.units += *std::max_element(in_bank.begin(), in_bank.end());
    count.fewest += words > 0;
  }
}

}  // namespace

void count_access(Launch& launch, const Instruction& i, Space space, const uint64_t* addresses, uint32_t mask,
                  uint32_t bytes) {
  if (!mask) return;
  Trace* const trace = launch.traces.empty() ? nullptr : &launch.traces[launch.block];
  if (space == Space::global) count_sectors(i, trace, addresses, mask, bytes);
  if (space == Space::shared) count_wavefronts(i.count, addresses, mask, bytes);
}

}  // namespace ptx_on_cpu
