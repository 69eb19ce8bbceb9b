// Runs CUDA kernels on a CPU, to test them where there is no GPU and to catch what a GPU lets pass.
//
// Every CUDA thread is a fiber; the fibers of a block share one OS thread. They run in a shuffled order from one
// meeting point (barrier, warp operation) to the next, so that a kernel that lacks a barrier gives wrong results under
// some seed. Threads that miss a meeting point, meet at different ones or index shared memory out of range end the
// launch with an exception.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <typeinfo>
#include <vector>

#include "vector_types.h"

namespace cuda_on_cpu {

// Where threads meet.
struct Site {
  const char* operation;
  const char* file;
  int line;
};

// ---- within a kernel ----------------------------------------------------------------------------------------------

int lane();  // of the calling thread in its warp

void block_barrier(const Site& site);

// The lanes of `mask` meet; each gets the value of the lane it names as its source.
uint64_t warp_shuffle(unsigned mask, uint64_t value, int source, const Site& site);
// The lanes of `mask` meet; each gets the set of those whose predicate is true.
unsigned warp_ballot(unsigned mask, bool predicate, const Site& site);

// The block's dynamic shared memory: of exactly the size launched with, all bits set.
unsigned char* shared_memory();
void check_shared_end(const void* end);  // of what a block took from its shared memory

[[noreturn]] void shared_index_error(int64_t i, int count, int64_t size);

// Elements [i, i + count) of a shared array of `size`, accessed at once.
inline void check_shared_index(int64_t i, int count, int64_t size) {
  if (i < 0 || i > size - count || i % count != 0) shared_index_error(i, count, size);
}

// ---- by the host ----------------------------------------------------------------------------------------------------

// Runs body() in every thread of the grid and waits. cudaErrorInvalidConfiguration where a GPU would say so; throws
// std::runtime_error if a thread breaks the rules above, after which other launches work as if nothing had been.
cudaError_t run(const std::string& kernel, dim3 grid, dim3 block, size_t shared, const std::function<void()>& body);

std::string kernel_name(const std::type_info& type);  // kernel(type of the parameter)

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, const Arguments&... arguments) {
  return run(kernel_name(typeid(void(Parameters...))), grid, block, shared, [&] { kernel(arguments...); });
}

// Everything below concerns the launches of the whole process.
std::vector<std::string> launches();  // the kernels launched since the start or reset(), which goes back to seed 0
void reset();
void set_seed(uint64_t seed);  // of the order in which blocks and threads run, from the next launch on
void set_workers(int count);   // OS threads among which the blocks are shared out; 1 at first

}  // namespace cuda_on_cpu
