#include "scheduler.h"

#include <cxxabi.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <numeric>
#include <stdexcept>
#include <thread>

#include "cuda_runtime.h"
#include "fiber.h"

namespace cuda_on_cpu {
namespace {

constexpr int kWarp = 32;
constexpr uint64_t kMaxThreads = 1024;     // of a block
constexpr size_t kMaxShared = 227 * 1024;  // bytes of a block
constexpr size_t kStack = 128 * 1024;
constexpr size_t kPage = 4096;

// splitmix64
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  template <class T>
  void shuffle(std::vector<T>& items) {
    for (size_t left = items.size(); left > 1; --left) std::swap(items[left - 1], items[(next() >> 32) * left >> 32]);
  }

 private:
  uint64_t state_;
};

bool same(const Site& a, const Site& b) {
  const auto equal = [](const char* x, const char* y) { return x == y || std::strcmp(x, y) == 0; };
  return a.line == b.line && equal(a.file, b.file) && equal(a.operation, b.operation);
}

std::string text(const Site& site) {
  return std::string(site.operation) + " at " + site.file + ":" + std::to_string(site.line);
}

std::string text(const uint3& index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) + ")";
}

std::string text(unsigned mask) {
  char hexadecimal[16];
  std::snprintf(hexadecimal, sizeof hexadecimal, "0x%08x", mask);
  return hexadecimal;
}

uint3 unravel(uint64_t number, const dim3& extent) {
  return {unsigned(number % extent.x), unsigned(number / extent.x % extent.y), unsigned(number / extent.x / extent.y)};
}

uint64_t count(const dim3& extent) { return uint64_t(extent.x) * extent.y * extent.z; }

// What the workers share of a launch.
struct Job {
  const std::string& kernel;
  dim3 grid, block;
  size_t shared;
  const std::function<void()>& body;
  uint64_t seed;
  std::vector<uint64_t> order{};  // of the blocks
  std::atomic<size_t> next{0};    // in order
  std::mutex mutex{};
  std::string error{};  // of the first thread that broke a rule
};

// Runs blocks, one at a time, on whichever OS thread calls work().
class Worker {
 public:
  Worker();

  // Runs blocks of the job until none is left or one failed anywhere.
  void work(Job& job);

  // What the running thread asks for.
  int lane() const { return running_->number % kWarp; }
  unsigned char* shared() const { return shared_.get(); }
  size_t shared_size() const { return job_->shared; }
  void barrier(const Site& site);
  uint64_t warp_operation(unsigned mask, uint64_t value, int source, const Site& site);

  // How it breaks a rule: blame() first, then, with no object left whose destructor matters, abandon().
  void blame(const std::string& what);
  [[noreturn]] void abandon();
  std::string progress() const;  // where the running thread was last seen

 private:
  enum class State { running, at_barrier, in_warp, returned };

  struct Thread {
    Fiber fiber;
    Worker* worker;
    int number;  // in the block
    uint3 index;
    State state;
    Site site;      // where it waits, or waited last
    unsigned mask;  // of the warp operation
    int source;     // lane whose value it wants; < 0: all votes
    uint64_t value, result;
  };

  static void run_thread(void* argument);
  void run_block(uint64_t number);
  void start_thread(int number);
  void thread_returned();
  void wait();
  Thread* next();
  void release(Thread& thread);
  void favour_a_warp();
  int missing_lane(const Thread& thread) const;
  void finish_warp_operation(const Thread& thread);
  static std::string describe(const Thread& thread);
  void diagnose();

  struct Free {
    void operator()(unsigned char* memory) const { free(memory); }
  };

  char* stacks_;
  std::vector<std::unique_ptr<Thread>> threads_;  // as many as the largest block so far had
  Fiber home_;                                    // work() itself

  Job* job_ = nullptr;
  int count_ = 0;                  // threads of a block
  uint3* thread_index_ = nullptr;  // threadIdx of this OS thread
  uint3 block_{};
  std::unique_ptr<unsigned char, Free> shared_;
  Random random_{0};
  std::vector<Thread*> ready_, released_;  // to run in this round, in the next
  size_t position_ = 0;                    // in ready_
  Thread* running_ = nullptr;
  int favoured_ = 0;                // warp that runs ahead of the others
  int waiting_ = 0, returned_ = 0;  // threads at the barrier, threads that are done
  const Thread *first_waiting_ = nullptr, *last_returned_ = nullptr;
  std::string error_;
};

thread_local Worker* this_worker = nullptr;

Worker::Worker() {
  void* memory =
      mmap(nullptr, kMaxThreads * (kStack + kPage), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  stacks_ = static_cast<char*>(memory);
}

void Worker::work(Job& job) {
  this_worker = this;
  thread_index_ = &threadIdx;
  job_ = &job;
  blockDim = job.block;
  gridDim = job.grid;
  count_ = int(count(job.block));
  while (int(threads_.size()) < count_) {
    threads_.push_back(std::make_unique<Thread>());
    start_thread(int(threads_.size()) - 1);
  }
  for (int t = 0; t < count_; ++t) threads_[t]->index = unravel(t, job.block);

  for (size_t k; error_.empty() && (k = job.next++) < job.order.size();) run_block(job.order[k]);

  if (!error_.empty()) {
    for (int t = 0; t < int(threads_.size()); ++t) start_thread(t);  // some hang in the middle of the kernel
    job.next = job.order.size();
    const std::lock_guard<std::mutex> lock(job.mutex);
    if (job.error.empty()) job.error = error_;
    error_.clear();
  }
  shared_.reset();
  this_worker = nullptr;
}

void Worker::run_block(uint64_t number) {
  block_ = unravel(number, job_->grid);
  blockIdx = block_;
  void* memory = nullptr;
  if (posix_memalign(&memory, 128, job_->shared) != 0) throw std::bad_alloc();
  std::memset(memory, 0xff, job_->shared);  // NaN to who reads it unwritten
  shared_.reset(static_cast<unsigned char*>(memory));
  random_ = Random(Random(job_->seed + number).next());
  waiting_ = returned_ = 0;
  ready_.clear();
  released_.clear();
  position_ = 0;
  favour_a_warp();
  for (int t = 0; t < count_; ++t) {
    threads_[t]->site = Site{};
    threads_[t]->state = State::running;
    release(*threads_[t]);
  }

  switch_fiber(home_, next()->fiber);
  if (returned_ < count_ && error_.empty()) diagnose();
}

void Worker::start_thread(int number) {
  Thread& thread = *threads_[number];
  thread.worker = this;
  thread.number = number;
  // A page that may not be touched lies below each stack. Stacks begin at different cache sets.
  char* stack = stacks_ + number * (kStack + kPage) + kPage;
  if (mprotect(stack, kStack, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
  start(thread.fiber, stack, kStack - number % 64 * 64, &run_thread, &thread);
}

// Runs its thread of one block after the other.
void Worker::run_thread(void* argument) {
  Thread& thread = *static_cast<Thread*>(argument);
  for (;;) {
    thread.worker->job_->body();
    thread.worker->thread_returned();
  }
}

// ---- taking turns -------------------------------------------------------------------------------------------------

// One warp goes on at once, up to the next barrier, while the others wait for the next round: as far ahead of them as
// the barriers let it.
void Worker::release(Thread& thread) {
  const bool ahead = thread.number / kWarp == favoured_;
  thread.state = State::running;
  (ahead ? ready_ : released_).push_back(&thread);
}

void Worker::favour_a_warp() {
  const uint64_t warps = (count_ + kWarp - 1) / kWarp;
  favoured_ = warps > 1 ? int((random_.next() >> 32) * warps >> 32) : -1;  // a lone warp only has its lanes shuffled
}

// Whose turn it is; null when nobody can go on. A round ends with everyone waiting or released.
Worker::Thread* Worker::next() {
  if (position_ == ready_.size()) {
    ready_.swap(released_);
    released_.clear();
    random_.shuffle(ready_);
    position_ = 0;
    if (ready_.empty()) return nullptr;
  }
  running_ = ready_[position_++];
  *thread_index_ = running_->index;
  return running_;
}

void Worker::wait() {
  Thread* from = running_;
  Thread* to = next();
  if (to != from) switch_fiber(from->fiber, to ? to->fiber : home_);
}

void Worker::thread_returned() {
  if (waiting_ > 0) {
    blame("returns, but " + describe(*first_waiting_));
    abandon();
  }
  running_->state = State::returned;
  last_returned_ = running_;
  ++returned_;
  wait();
}

void Worker::barrier(const Site& site) {
  Thread& thread = *running_;
  if (returned_ > 0) {
    blame("is at " + text(site) + ", but " + describe(*last_returned_));
    abandon();
  }
  if (waiting_ > 0 && !same(site, first_waiting_->site)) {
    blame("is at " + text(site) + ", but " + describe(*first_waiting_));
    abandon();
  }
  thread.state = State::at_barrier;
  thread.site = site;
  if (waiting_++ == 0) first_waiting_ = &thread;
  if (waiting_ == count_) {
    waiting_ = 0;
    favour_a_warp();
    for (int t = 0; t < count_; ++t) release(*threads_[t]);
  }
  wait();
}

uint64_t Worker::warp_operation(unsigned mask, uint64_t value, int source, const Site& site) {
  Thread& thread = *running_;
  thread.state = State::in_warp;
  thread.site = site;
  thread.mask = mask;
  thread.source = source;
  thread.value = value;
  if (!(mask >> lane() & 1)) {
    blame("is not in the mask " + text(mask) + " of its own " + text(site));
    abandon();
  }
  if (source >= 0 && !(mask >> source & 1)) {
    blame("reads lane " + std::to_string(source) + ", which is not in the mask " + text(mask) + " of " + text(site));
    abandon();
  }
  if (missing_lane(thread) < 0) finish_warp_operation(thread);
  wait();
  return thread.result;
}

// First lane of the mask that is not at the thread's warp operation; -1 if all are.
int Worker::missing_lane(const Thread& thread) const {
  const int first = thread.number / kWarp * kWarp;
  for (unsigned left = thread.mask; left != 0; left &= left - 1) {
    const int lane = __builtin_ctz(left);
    if (first + lane >= count_) return lane;
    const Thread& other = *threads_[first + lane];
    if (other.state != State::in_warp || other.mask != thread.mask || !same(other.site, thread.site)) return lane;
  }
  return -1;
}

void Worker::finish_warp_operation(const Thread& thread) {
  const int first = thread.number / kWarp * kWarp;
  uint64_t votes = 0;
  for (unsigned left = thread.mask; left != 0; left &= left - 1) {
    const int lane = __builtin_ctz(left);
    if (threads_[first + lane]->value != 0) votes |= uint64_t(1) << lane;
  }
  for (unsigned left = thread.mask; left != 0; left &= left - 1) {
    Thread& other = *threads_[first + __builtin_ctz(left)];
    other.result = other.source < 0 ? votes : threads_[first + other.source]->value;
    release(other);
  }
}

// ---- errors ---------------------------------------------------------------------------------------------------------

void Worker::blame(const std::string& what) {
  error_ = job_->kernel + ", block " + text(block_) + ": thread " + text(running_->index) + " " + what;
}

std::string Worker::progress() const {
  return running_->site.operation ? ", after " + text(running_->site) : std::string();
}

void Worker::abandon() {
  switch_fiber(running_->fiber, home_);
  __builtin_unreachable();
}

std::string Worker::describe(const Thread& thread) {
  const std::string who = "thread " + text(thread.index);
  if (thread.state == State::returned) return who + " has returned";
  return who + " waits in " + text(thread.site) +
         (thread.state == State::in_warp ? " with the lanes " + text(thread.mask) : std::string());
}

// Nobody can go on, yet not all have returned. If all that wait did so at the barrier, it would have opened, and who
// misses it by returning is blamed at once: so there is a warp operation that lacks a lane.
void Worker::diagnose() {
  for (int t = 0; t < count_; ++t) {
    running_ = threads_[t].get();
    if (running_->state != State::in_warp) continue;
    const int number = t / kWarp * kWarp + missing_lane(*running_);
    blame("waits in " + text(running_->site) + " with the lanes " + text(running_->mask) + ", but " +
          (number < count_ ? describe(*threads_[number]) : "the block has no thread " + std::to_string(number)));
    return;
  }
}

}  // namespace

// ---- within a kernel ----------------------------------------------------------------------------------------------

int lane() { return this_worker->lane(); }

void block_barrier(const Site& site) { this_worker->barrier(site); }

uint64_t warp_shuffle(unsigned mask, uint64_t value, int source, const Site& site) {
  return this_worker->warp_operation(mask, value, source, site);
}

unsigned warp_ballot(unsigned mask, bool predicate, const Site& site) {
  return unsigned(this_worker->warp_operation(mask, predicate, -1, site));
}

unsigned char* shared_memory() { return this_worker->shared(); }

void check_shared_end(const void* end) {
  const ptrdiff_t taken = static_cast<const unsigned char*>(end) - this_worker->shared();
  if (taken <= ptrdiff_t(this_worker->shared_size())) return;
  this_worker->blame("takes " + std::to_string(taken) + " bytes of shared memory, but the launch gave " +
                     std::to_string(this_worker->shared_size()) + this_worker->progress());
  this_worker->abandon();
}

void shared_index_error(int64_t i, int count, int64_t size) {
  this_worker->blame((count > 1 ? "accesses " + std::to_string(count) + " elements from index " : "accesses index ") +
                     std::to_string(i) + " of a shared array of " + std::to_string(size) + this_worker->progress());
  this_worker->abandon();
}

// ---- by the host ----------------------------------------------------------------------------------------------------

namespace {

// Never destroyed: fibers are parked on the workers' stacks.
struct Scheduler {
  std::mutex mutex;
  std::vector<std::unique_ptr<Worker>> workers;
  size_t wanted_workers = 1;
  uint64_t seed = 0, launches_of_seed = 0;
  std::vector<std::string> launches;
};

Scheduler& scheduler() {
  static Scheduler& only = *new Scheduler;
  return only;
}

bool valid(const dim3& grid, const dim3& block, size_t shared) {
  return count(grid) > 0 && grid.x <= 0x7fffffffu && grid.y <= 65535 && grid.z <= 65535 && block.x <= kMaxThreads &&
         block.y <= kMaxThreads && block.z <= 64 && count(block) > 0 && count(block) <= kMaxThreads &&
         shared <= kMaxShared;
}

}  // namespace

cudaError_t run(const std::string& kernel, dim3 grid, dim3 block, size_t shared, const std::function<void()>& body) {
  if (!valid(grid, block, shared)) return cudaErrorInvalidConfiguration;
  Scheduler& all = scheduler();
  const std::lock_guard<std::mutex> lock(all.mutex);
  all.launches.push_back(kernel);
  Job job{kernel, grid, block, shared, body, Random(all.seed + (all.launches_of_seed++ << 32)).next()};
  job.order.resize(count(grid));
  std::iota(job.order.begin(), job.order.end(), uint64_t(0));
  Random(job.seed).shuffle(job.order);

  const size_t workers = std::min(all.wanted_workers, job.order.size());
  while (all.workers.size() < workers) all.workers.push_back(std::make_unique<Worker>());
  std::vector<std::thread> others;
  for (size_t w = 1; w < workers; ++w) others.emplace_back([&, w] { all.workers[w]->work(job); });
  all.workers[0]->work(job);
  for (std::thread& other : others) other.join();
  if (!job.error.empty()) throw std::runtime_error(job.error);
  return cudaSuccess;
}

std::string kernel_name(const std::type_info& type) {
  int status = 0;
  const std::unique_ptr<char, void (*)(void*)> demangled(abi::__cxa_demangle(type.name(), nullptr, nullptr, &status),
                                                         &free);
  std::string name = status == 0 ? demangled.get() : type.name();
  for (const std::string space : {"tardkd::", "cuda::", "(anonymous namespace)::"})
    for (size_t at; (at = name.find(space)) != std::string::npos;) name.erase(at, space.size());
  return "kernel" + name.substr(std::min(name.find('('), name.size()));
}

std::vector<std::string> launches() {
  const std::lock_guard<std::mutex> lock(scheduler().mutex);
  return scheduler().launches;
}

void reset() {
  set_seed(0);
  const std::lock_guard<std::mutex> lock(scheduler().mutex);
  scheduler().launches.clear();
}

void set_seed(uint64_t seed) {
  const std::lock_guard<std::mutex> lock(scheduler().mutex);
  scheduler().seed = seed;
  scheduler().launches_of_seed = 0;
}

void set_workers(int count) {
  const std::lock_guard<std::mutex> lock(scheduler().mutex);
  scheduler().wanted_workers = size_t(std::max(count, 1));
}

}  // namespace cuda_on_cpu
