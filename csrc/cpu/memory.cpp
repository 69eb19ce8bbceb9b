#include "memory.h"

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <map>
#include <mutex>
#include <new>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace tardkd::cpu {
namespace {

constexpr size_t kHugePage = 2u << 20;

struct Cache {
  std::mutex mutex;
  std::multimap<size_t, void*> kept;  // by capacity
  size_t kept_bytes = 0, used_bytes = 0, most_used_bytes = 0;

  void free(std::multimap<size_t, void*>::iterator block) {
    std::free(block->second);
    kept_bytes -= block->first;
    kept.erase(block);
  }
};

// Never destroyed: tensors may outlive everything else in a process that ends.
Cache& cache() {
  static Cache* instance = new Cache;
  return *instance;
}

void* allocate(size_t capacity) {
  void* data = std::aligned_alloc(kHugePage, capacity);
  if (!data) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
  madvise(data, capacity, MADV_HUGEPAGE);  // only advice: a refusal is of no consequence
#endif
  return data;
}

}  // namespace

Block::Block(size_t bytes) : bytes_(bytes) {
  Cache& all = cache();
  std::lock_guard<std::mutex> lock(all.mutex);
  capacity_ = std::max<size_t>(1, (bytes + kHugePage - 1) / kHugePage) * kHugePage;
  const auto fitting = all.kept.lower_bound(capacity_);
  if (fitting != all.kept.end()) {
    capacity_ = fitting->first, data_ = fitting->second;
    all.kept_bytes -= capacity_;
    all.kept.erase(fitting);
  } else {
    // The largest kept one has become too small: the new one takes its place.
    if (!all.kept.empty()) all.free(std::prev(all.kept.end()));
    data_ = allocate(capacity_);
  }
  all.used_bytes += capacity_;
  all.most_used_bytes = std::max(all.most_used_bytes, all.used_bytes);
}

Block::~Block() {
  Cache& all = cache();
  std::lock_guard<std::mutex> lock(all.mutex);
  all.used_bytes -= capacity_;
  all.kept.emplace(capacity_, data_);
  all.kept_bytes += capacity_;
  while (all.kept_bytes + all.used_bytes > all.most_used_bytes) all.free(all.kept.begin());
}

size_t empty_cache() {
  Cache& all = cache();
  std::lock_guard<std::mutex> lock(all.mutex);
  const size_t bytes = all.kept_bytes;
  while (!all.kept.empty()) all.free(all.kept.begin());
  all.most_used_bytes = all.used_bytes;
  return bytes;
}

}  // namespace tardkd::cpu
