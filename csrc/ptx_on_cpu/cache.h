// What a GPU's second-level cache would pass on to memory of what the launches ask it for.
#pragma once

#include <cstddef>
#include <cstdint>
#include <list>
#include <unordered_map>
#include <vector>

namespace ptx_on_cpu {

enum class Touch : uint8_t { load, store, atomic };

// The sectors of 32 bytes that a block asks for, in order, each with a Touch in its highest bits.
struct Trace {
  std::vector<uint64_t> touches;
  void add(uint64_t sector, Touch touch) { touches.push_back(sector | uint64_t(touch) << 62); }
};

// Least recently used lines of four sectors go first. A load or an atomic fetches the sector, a store does not; what
// was written goes to memory when its line goes. Blocks are handed out in their order, `resident` at a time, and take
// turns.
class Cache {
 public:
  Cache(uint64_t bytes, uint64_t resident) : lines_(bytes / 128), resident_(resident) {}

  void run(const std::vector<Trace>& blocks);  // a launch; what is cached stays for the next
  void flush();                                // writes what has not been written

  uint64_t read = 0, written = 0;  // bytes from and to memory

 private:
  struct Line {
    uint64_t number;
    uint8_t valid, dirty;  // a bit for each sector
  };

  void touch(uint64_t sector, Touch touch);
  void evict();

  size_t lines_, resident_;
  std::list<Line> order_;  // the most recently used first
  std::unordered_map<uint64_t, std::list<Line>::iterator> places_;
};

}  // namespace ptx_on_cpu
