#include "launch.h"

namespace ptx_on_cpu {
namespace {

Range* range_of(Launch& launch, uint64_t address, uint64_t bytes) {
  const auto holds = [&](const Range& range) { return address >= range.begin && address + bytes <= range.end; };
  if (launch.last_range && holds(*launch.last_range)) return launch.last_range;
  auto after = launch.ranges.upper_bound(address);
  if (after == launch.ranges.begin() || !holds(std::prev(after)->second)) return nullptr;
  return launch.last_range = &std::prev(after)->second;
}

uint8_t* find_shared(Launch& launch, const Instruction& i, uint64_t address, uint64_t bytes, int lane) {
  if (address + bytes > launch.shared.size()) return launch.blame(i, "shared memory out of bounds"), nullptr;
  for (uint64_t word = address / 4; word <= (address + bytes - 1) / 4; ++word) {
    Shadow& shadow = launch.shared_shadow[word];
    if (!i.is_store && shadow.stamp != launch.block_stamp)
      launch.blame(i, "shared memory is read that nobody has written");
    track(launch, i, shadow, launch.block_stamp, launch.warp->number * kLanes + lane, i.is_store);
  }
  return &launch.shared[address];
}

uint8_t* find_global(Launch& launch, const Instruction& i, uint64_t address, uint64_t bytes, int lane) {
  if (launch.ranges.empty()) return reinterpret_cast<uint8_t*>(address);
  Range* const range = range_of(launch, address, bytes);
  if (!range) return launch.blame(i, address < 4096 ? "null pointer" : "global memory out of bounds"), nullptr;
  if (!range->shadow.empty()) {
    const uint64_t first = address - range->begin, last = first + bytes - 1;
    for (uint64_t item = first / range->item; item <= last / range->item; ++item)
      track(launch, i, range->shadow[item], launch.launch_stamp, launch.thread_of_grid(lane), i.is_store);
  }
  return reinterpret_cast<uint8_t*>(address);
}

// Where an access of `lane` goes, in `space` and there at `address`; null if it must not be made.
uint8_t* find(Launch& launch, const Instruction& i, uint64_t& address, uint64_t bytes, int lane, Space& space) {
  space = i.space;
  if (space == Space::generic) {
    space = kWindows[address >> kWindowShift & 3];
    address &= (uint64_t(1) << kWindowShift) - 1;
  }
  if (space == Space::shared) address = uint32_t(address);  // registers of 32 bits wrap
  if (address % bytes) return launch.blame(i, "misaligned access"), nullptr;
  switch (space) {
    case Space::shared:
      return find_shared(launch, i, address, bytes, lane);
    case Space::local:
      if (address + bytes > launch.kernel.local_bytes) return launch.blame(i, "local memory out of bounds"), nullptr;
      return &launch.local[size_t(launch.warp->number * kLanes + lane) * launch.kernel.local_bytes + address];
    case Space::param:
      if (address + bytes > launch.params.size() || i.is_store)
        return launch.blame(i, "parameters out of bounds"), nullptr;
      return &launch.params[address];
    default:
      return find_global(launch, i, address, bytes, lane);
  }
}

// Calls use(lane, where it goes) for every lane, and counts.
template <class Use>
void for_each_access(Launch& launch, const Instruction& i, uint32_t mask, Use use) {
  const uint32_t bytes = uint32_t(i.type.bytes * i.vector);
  const uint64_t* base = launch.read(i.of[0]);
  uint64_t addresses[kLanes];
  uint32_t global = 0, shared = 0;
  for_lanes(mask, [&](int lane) {
    Space space;
    addresses[lane] = base[lane] + uint64_t(i.offset);
    uint8_t* const at = find(launch, i, addresses[lane], bytes, lane, space);
    global |= uint32_t(space == Space::global) << lane;
    shared |= uint32_t(space == Space::shared) << lane;
    use(lane, at, space);
  });
  count_access(launch, i, Space::global, addresses, global, bytes);
  count_access(launch, i, Space::shared, addresses, shared, bytes);
}

template <class T>
void add(Launch& launch, const Instruction& i, uint32_t mask) {
  for_each_access(launch, i, mask, [&](int lane, uint8_t* at, Space space) {
    if (std::is_integral_v<T> && space == Space::global) {
      launch.acquired = {launch.thread_of_grid(lane), launch.barriers, i.acquires_and_releases};
      launch.releases[launch.block] = launch.acquired;
    }
    for (int k = 0; at && k < i.vector; ++k, at += sizeof(T)) {
      T before;
      std::memcpy(&before, at, sizeof(T));
      const T after = T(before + value<T>(launch.read(i.of[size_t(k) + 1])[lane]));
      std::memcpy(at, &after, sizeof(T));
      if (i.to[size_t(k)] != kNoRegister) launch.write(i.to[size_t(k)])[lane] = bits(before);
    }
  });
}

}  // namespace

void access(Launch& launch, const Instruction& i, uint32_t mask) {
  const size_t bytes = size_t(i.type.bytes);
  const int unused = i.type.kind == 's' ? 64 - 8 * i.type.bytes : 0;  // a wider register holds the sign too
  for_each_access(launch, i, mask, [&](int lane, uint8_t* at, Space) {
    for (size_t k = 0; k < size_t(i.vector); ++k) {
      if (i.is_store) {
        if (at) std::memcpy(at + k * bytes, &launch.read(i.of[k + 1])[lane], bytes);
      } else if (i.to[k] != kNoRegister) {
        uint64_t loaded = 0;
        if (at) std::memcpy(&loaded, at + k * bytes, bytes);
        launch.write(i.to[k])[lane] = uint64_t(int64_t(loaded << unused) >> unused);
      }
    }
  });
}

Action atomic_add(const Type& type) {
  if (type.kind == 'f') return type.bytes == 4 ? add<float> : type.bytes == 8 ? add<double> : nullptr;
  return type.bytes == 4 ? add<uint32_t> : type.bytes == 8 ? add<uint64_t> : nullptr;
}

void fence(Launch& launch, const Instruction&, uint32_t mask) {
  for_lanes(mask, [&](int lane) { ++launch.fences[size_t(launch.thread_of_grid(lane))]; });
}

}  // namespace ptx_on_cpu
