// Stacks of execution within one OS thread, and switching between them without a system call.
#pragma once

#include <cstddef>

#include <ucontext.h>

namespace cuda_on_cpu {

// Default-constructed, it stands for the stack an OS thread came with; with start() for one of its own.
struct Fiber {
  void* at[5];            // where it goes on: a buffer of __builtin_setjmp
  ucontext_t entry;       // only for the first switch to it
  bool fresh = false;     // not yet switched to
  void* stack = nullptr;  // lowest address and size, for AddressSanitizer
  size_t size = 0;
  void* sanitizer = nullptr;
  Fiber* came_from = nullptr;
};

// The first switch to `fiber` will call run(argument) on this stack; run must not return. A fiber may be started
// again at any time: what ran on the stack is forgotten, without destructors.
void start(Fiber& fiber, void* stack, size_t size, void (*run)(void*), void* argument);

// Continues `to`; returns when somebody switches to `from`. Both belong to the calling OS thread.
void switch_fiber(Fiber& from, Fiber& to);

}  // namespace cuda_on_cpu
