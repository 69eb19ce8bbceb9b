#include "cache.h"

#include <algorithm>

namespace ptx_on_cpu {
namespace {

constexpr size_t kTurn = 64;  // touches of a block in a turn: about what its warps have under way at once
constexpr uint64_t kSectorBytes = 32, kSectors = 4;

}  // namespace

void Cache::run(const std::vector<Trace>& blocks) {
  struct Running {
    size_t block, next;
  };
  std::vector<Running> running;
  for (size_t started = 0; started < blocks.size() || !running.empty();) {
    while (running.size() < resident_ && started < blocks.size()) running.push_back({started++, 0});
    for (Running& one : running) {
      const auto& touches = blocks[one.block].touches;
      for (const size_t end = std::min(touches.size(), one.next + kTurn); one.next < end; ++one.next)
        touch(touches[one.next] & (~uint64_t(0) >> 2), Touch(touches[one.next] >> 62));
    }
    const auto is_done = [&](const Running& one) { return one.next == blocks[one.block].touches.size(); };
    running.erase(std::remove_if(running.begin(), running.end(), is_done), running.end());
  }
}

void Cache::touch(uint64_t sector, Touch touch) {
  const uint64_t number = sector / kSectors;
  const uint8_t bit = uint8_t(1 << sector % kSectors);
  const auto found = places_.find(number);
  if (found != places_.end()) {
    order_.splice(order_.begin(), order_, found->second);
  } else {
    if (order_.size() == lines_) evict();
    order_.push_front({number, 0, 0});
    places_[number] = order_.begin();
  }
  Line& line = order_.front();
  if (touch != Touch::store && !(line.valid & bit)) read += kSectorBytes;
  line.valid |= bit;
  if (touch != Touch::load) line.dirty |= bit;
}

void Cache::evict() {
  written += kSectorBytes * uint64_t(__builtin_popcount(order_.back().dirty));
  places_.erase(order_.back().number);
  order_.pop_back();
}

void Cache::flush() {
  while (!order_.empty()) evict();
}

}  // namespace ptx_on_cpu
