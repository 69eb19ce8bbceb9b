// Threads for the CPU kernels.
//
// torch brings its own OpenMP runtime; linking a second one into the process would have two pools spin against each
// other. A kernel here runs for milliseconds, so it starts plain threads (about 20 us each) and joins them: nothing
// stays behind, and a forked data-loader worker inherits no broken pool.
#pragma once

#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace tardkd::cpu {

// Calls body(worker) on `workers` threads, the caller's included. The body must not throw.
template <class Body>
void run_workers(int workers, const Body& body) {
  std::vector<std::thread> threads;
  threads.reserve(workers > 1 ? workers - 1 : 0);
  for (int worker = 1; worker < workers; ++worker) {
    try {
      threads.emplace_back([&body, worker] { body(worker); });
    } catch (const std::system_error&) {
      break;  // no more threads to be had: the tasks are shared among those there are
    }
  }
  body(0);
  for (std::thread& thread : threads) thread.join();
}

// Calls body(task, worker) once for each task, handing tasks out in order to whichever worker is free. Every
// result must depend on the task alone, which keeps the kernels deterministic for any number of threads.
template <class Body>
void for_each_task(int64_t tasks, int workers, const Body& body) {
  std::atomic<int64_t> next{0};
  run_workers(static_cast<int>(tasks < workers ? (tasks > 1 ? tasks : 1) : workers), [&](int worker) {
    for (int64_t task = next++; task < tasks; task = next++) body(task, worker);
  });
}

// The same over [0, count) in ranges of `grain`: body(begin, end).
template <class Body>
void for_each_range(int64_t count, int64_t grain, int workers, const Body& body) {
  for_each_task((count + grain - 1) / grain, workers, [&](int64_t task, int) {
    const int64_t begin = task * grain;
    body(begin, begin + grain < count ? begin + grain : count);
  });
}

}  // namespace tardkd::cpu
