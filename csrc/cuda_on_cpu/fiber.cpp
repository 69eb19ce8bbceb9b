#include "fiber.h"

#include <cstdint>
#include <new>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace cuda_on_cpu {

// Nothing here may touch thread-local variables: a parked fiber may wake up on another OS thread, and compilers keep
// their addresses over calls.

namespace {

void leaving(Fiber& from, Fiber& to) {
  to.came_from = &from;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&from.sanitizer, to.stack, to.size);
#endif
}

void arrived(Fiber& at) {
#ifdef __SANITIZE_ADDRESS__
  const void* stack;
  __sanitizer_finish_switch_fiber(at.sanitizer, &stack, &at.came_from->size);
  at.came_from->stack = const_cast<void*>(stack);
#else
  (void)at;
#endif
}

// The compiler's own jumps rather than setjmp and longjmp: those check and encrypt what they are given, and tell
// AddressSanitizer to forget the frames of the stack. They must not be inlined into each other's function.
__attribute__((noinline, noreturn, no_sanitize("address", "undefined"))) void jump(Fiber& to) {
  if (to.fresh) {
    to.fresh = false;
    setcontext(&to.entry);
  }
  __builtin_longjmp(to.at, 1);
}

struct Start {
  Fiber* fiber;
  void (*run)(void*);
  void* argument;
};

// makecontext passes ints.
void enter(uint32_t high, uint32_t low) {
  const Start start = *reinterpret_cast<const Start*>(uintptr_t(high) << 32 | low);
  arrived(*start.fiber);
  start.run(start.argument);
}

}  // namespace

void start(Fiber& fiber, void* stack, size_t size, void (*run)(void*), void* argument) {
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(stack, size);  // frames that were never left
#endif
  fiber.fresh = true;
  fiber.stack = stack;
  fiber.size = size;
  fiber.sanitizer = nullptr;
  // What enter() needs lies at the low end of the stack, where it is in nobody's way.
  Start* start = new (stack) Start{&fiber, run, argument};
  const uintptr_t address = reinterpret_cast<uintptr_t>(start);
  getcontext(&fiber.entry);
  fiber.entry.uc_stack.ss_sp = stack;
  fiber.entry.uc_stack.ss_size = size;
  fiber.entry.uc_link = nullptr;
  makecontext(&fiber.entry, reinterpret_cast<void (*)()>(&enter), 2, uint32_t(address >> 32), uint32_t(address));
}

__attribute__((noinline, no_sanitize("address", "undefined"))) void switch_fiber(Fiber& from, Fiber& to) {
  leaving(from, to);
  if (__builtin_setjmp(from.at) == 0) jump(to);
  arrived(from);
}

}  // namespace cuda_on_cpu
