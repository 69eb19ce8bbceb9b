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

void count_sectors(Count& count, const uint64_t* addresses, uint32_t mask, uint32_t bytes) {
  std::array<uint64_t, kLanes> sectors, own;
  size_t lanes = 0;
  for_lanes(mask, [&](int lane) {
    sectors[lanes] = addresses[lane] / kSector;
    own[lanes++] = addresses[lane];
  });
  const uint64_t places = distinct(own, lanes);
  count.units += distinct(sectors, lanes);
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

void count_access(const Instruction& i, Space space, const uint64_t* addresses, uint32_t mask, uint32_t bytes) {
  if (!mask) return;
  if (space == Space::global) count_sectors(i.count, addresses, mask, bytes);
  if (space == Space::shared) count_wavefronts(i.count, addresses, mask, bytes);
}

}  // namespace ptx_on_cpu
