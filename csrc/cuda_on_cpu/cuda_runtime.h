// Stands in for CUDA's header when the kernels are compiled for a CPU: the part of the language and of the runtime
// that they use. Test only; see scheduler.h.
#pragma once

#include <math.h>  // not <cmath>: exp(float) and the like are found in the global namespace, as in CUDA

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>

#include "scheduler.h"
#include "vector_types.h"

#define TARDKD_CUDA_ON_CPU
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__  // nothing: the standard library writes __attribute__((__noinline__))
#define __align__(n) alignas(n)
#define __launch_bounds__(...)
#define __grid_constant__

// ---- where a thread is --------------------------------------------------------------------------------------------

inline thread_local uint3 threadIdx{}, blockIdx{};
inline thread_local dim3 blockDim{}, gridDim{};

// ---- meeting points -----------------------------------------------------------------------------------------------

// The default arguments are those of the place of the call.
#define CUDA_ON_CPU_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(CUDA_ON_CPU_HERE) { cuda_on_cpu::block_barrier({"__syncthreads", file, line}); }

inline unsigned __ballot_sync(unsigned mask, int predicate, CUDA_ON_CPU_HERE) {
  return cuda_on_cpu::warp_ballot(mask, predicate != 0, {"__ballot_sync", file, line});
}
inline int __any_sync(unsigned mask, int predicate, CUDA_ON_CPU_HERE) {
  return cuda_on_cpu::warp_ballot(mask, predicate != 0, {"__any_sync", file, line}) != 0;
}
inline int __all_sync(unsigned mask, int predicate, CUDA_ON_CPU_HERE) {
  return cuda_on_cpu::warp_ballot(mask, predicate != 0, {"__all_sync", file, line}) == mask;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, CUDA_ON_CPU_HERE) {
  cuda_on_cpu::warp_ballot(mask, false, {"__syncwarp", file, line});
}

namespace cuda_on_cpu {
template <class T>
T shuffle(unsigned mask, T value, int source, const Site& site) {
  static_assert(std::is_arithmetic<T>::value && sizeof(T) >= 4, "no shuffle of this type in CUDA");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = warp_shuffle(mask, bits, source, site);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}
}  // namespace cuda_on_cpu

// Segments of `width` lanes, a power of two. A lane without a source in its segment keeps its own value.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, CUDA_ON_CPU_HERE) {
  const int first = cuda_on_cpu::lane() & ~(width - 1);
  return cuda_on_cpu::shuffle(mask, value, first | (source & (width - 1)), {"__shfl_sync", file, line});
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_ON_CPU_HERE) {
  const int lane = cuda_on_cpu::lane(), first = lane & ~(width - 1), source = lane - int(delta);
  return cuda_on_cpu::shuffle(mask, value, source < first ? lane : source, {"__shfl_up_sync", file, line});
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_ON_CPU_HERE) {
  const int lane = cuda_on_cpu::lane(), last = lane | (width - 1), source = lane + int(delta);
  return cuda_on_cpu::shuffle(mask, value, source > last ? lane : source, {"__shfl_down_sync", file, line});
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, CUDA_ON_CPU_HERE) {
  const int lane = cuda_on_cpu::lane(), last = lane | (width - 1), source = lane ^ lanes;
  return cuda_on_cpu::shuffle(mask, value, source > last ? lane : source, {"__shfl_xor_sync", file, line});
}

// ---- memory -------------------------------------------------------------------------------------------------------

inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

inline int atomicAdd(int* to, int value) { return __atomic_fetch_add(to, value, __ATOMIC_RELAXED); }
inline unsigned atomicAdd(unsigned* to, unsigned value) { return __atomic_fetch_add(to, value, __ATOMIC_RELAXED); }
inline unsigned long long atomicAdd(unsigned long long* to, unsigned long long value) {
  return __atomic_fetch_add(to, value, __ATOMIC_RELAXED);
}

namespace cuda_on_cpu {
template <class T>
T atomic_add(T* to, T value) {
  T before, after;
  __atomic_load(to, &before, __ATOMIC_RELAXED);
  do after = before + value;
  while (!__atomic_compare_exchange(to, &before, &after, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return before;
}
}  // namespace cuda_on_cpu

inline float atomicAdd(float* to, float value) { return cuda_on_cpu::atomic_add(to, value); }
inline double atomicAdd(double* to, double value) { return cuda_on_cpu::atomic_add(to, value); }

// ---- arithmetic -----------------------------------------------------------------------------------------------------

using std::max;
using std::min;

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }

// ---- runtime: everything is done when launch() returns --------------------------------------------------------------

using cudaStream_t = struct CUstream_st*;

namespace cuda_on_cpu {
// What the runtime knows of the devices: one, unless a test says otherwise. No kernel asks for any of it.
struct Devices {
  int count = 1, current = 0;
  bool has_context[8] = {};  // of which device
  cudaError_t last_error = cudaSuccess;
  cudaError_t kernel_error = cudaSuccess;  // of every kernel that is asked about
};
inline Devices devices;
}  // namespace cuda_on_cpu

inline cudaError_t cudaGetDevice(int* device) { return *device = cuda_on_cpu::devices.current, cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) {
  cuda_on_cpu::Devices& devices = cuda_on_cpu::devices;
  if (device < 0 || device >= devices.count) return devices.last_error = cudaErrorInvalidDevice;
  devices.current = device;
  devices.has_context[device] = true;
  return cudaSuccess;
}
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = cuda_on_cpu::devices.count, cudaSuccess; }
inline cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 0, cudaSuccess; }
struct cudaFuncAttributes {};
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) {
  return cuda_on_cpu::devices.last_error = cuda_on_cpu::devices.kernel_error;
}
inline cudaError_t cudaGetLastError() { return std::exchange(cuda_on_cpu::devices.last_error, cudaSuccess); }

inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorNoKernelImageForDevice:
      return "no kernel image is available for execution on the device";
  }
  return "unrecognized error code";
}
