// What the kernels need of the hardware, in one place: shared memory, conversions, vector accesses, a counter of
// blocks, warp and block reductions, launches. Every instruction that only a GPU has has a plain equivalent here, so
// that the kernels themselves also compile for csrc/cuda_on_cpu.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstring>
#include <type_traits>

#include "../core/common.h"
#include "kernels.h"

namespace tardkd::cuda {

constexpr int kThreads = 256;  // of every block
constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// Blocks that are to share a multiprocessor, for __launch_bounds__ of kernels that take much shared memory: before
// compute capability 8.0 there is room for one, which then may have more registers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define TARDKD_BLOCKS(count) 1
#else
#define TARDKD_BLOCKS(count) count
#endif

// ---- shared memory -------------------------------------------------------------------------------------------------

// A checked array in shared memory: bare pointer on a GPU, an error for an index out of range on the CPU.
template <class T>
class Shared {
 public:
  __device__ Shared() : data_(nullptr) {}
  __device__ Shared(T* data, int size) : data_(data) {
#ifdef TARDKD_CUDA_ON_CPU
    size_ = size;
#else
    (void)size;
#endif
  }
  __device__ __forceinline__ T& operator[](int i) const {
#ifdef TARDKD_CUDA_ON_CPU
    cuda_on_cpu::check_shared_index(i, 1, size_);
#endif
    return data_[i];
  }
  // Four elements from i on, for vector accesses; i is a multiple of four.
  __device__ __forceinline__ T* four(int i) const {
#ifdef TARDKD_CUDA_ON_CPU
    cuda_on_cpu::check_shared_index(i, 4, size_);
#endif
    return data_ + i;
  }

 private:
  T* data_;
#ifdef TARDKD_CUDA_ON_CPU
  int size_ = 0;
#endif
};

// An array of fixed size inside a struct in shared memory, checked in the same way.
template <class T, int N>
struct SharedArray {
  T data[N];

  __device__ __forceinline__ T& operator[](int i) {
#ifdef TARDKD_CUDA_ON_CPU
    cuda_on_cpu::check_shared_index(i, 1, N);
#endif
    return data[i];
  }
  __device__ __forceinline__ const T& operator[](int i) const { return const_cast<SharedArray&>(*this)[i]; }
  __device__ __forceinline__ T* four(int i) {
#ifdef TARDKD_CUDA_ON_CPU
    cuda_on_cpu::check_shared_index(i, 4, N);
#endif
    return data + i;
  }
};

// Deals out the block's dynamic shared memory. The host side adds up the same sizes with shared_bytes().
class SharedArena {
 public:
  __device__ SharedArena() {
#ifdef TARDKD_CUDA_ON_CPU
    next_ = cuda_on_cpu::shared_memory();
#else
    extern __shared__ __align__(16) unsigned char tardkd_shared[];
    next_ = tardkd_shared;
#endif
  }
  template <class T>
  __device__ __forceinline__ Shared<T> take(int count) {
    T* data = reinterpret_cast<T*>(next_);
    next_ += (count * int(sizeof(T)) + 15) / 16 * 16;
#ifdef TARDKD_CUDA_ON_CPU
    cuda_on_cpu::check_shared_end(next_);
#endif
    return Shared<T>(data, count);
  }
  // What is left, as a struct of SharedArrays of which `bytes` are there.
  template <class T>
  __device__ __forceinline__ T* rest(size_t bytes = sizeof(T)) {
#ifdef TARDKD_CUDA_ON_CPU
    cuda_on_cpu::check_shared_end(next_ + bytes);
#else
    (void)bytes;
#endif
    return reinterpret_cast<T*>(next_);
  }

 private:
  unsigned char* next_;
};

template <class T>
constexpr size_t shared_bytes(int64_t count) {
  return (count * sizeof(T) + 15) / 16 * 16;
}

// ---- stored types --------------------------------------------------------------------------------------------------

// Calls f(T()) with the type that stores `dtype`: float, double, __half or __nv_bfloat16.
template <class F>
__device__ __forceinline__ void with_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::float32:
      f(float());
      break;
    case DType::float64:
      f(double());
      break;
    case DType::float16:
      f(__half());
      break;
    case DType::bfloat16:
      f(__nv_bfloat16());
      break;
  }
}

template <class A>
__device__ __forceinline__ A as(float value) {
  return static_cast<A>(value);
}
template <class A>
__device__ __forceinline__ A as(double value) {
  return static_cast<A>(value);
}
template <class A>
__device__ __forceinline__ A as(__half value) {
  return static_cast<A>(__half2float(value));
}
template <class A>
__device__ __forceinline__ A as(__nv_bfloat16 value) {
  return static_cast<A>(__bfloat162float(value));
}

template <class T>
struct Stored {
  template <class A>
  static __device__ __forceinline__ T from(A value) {
    return static_cast<T>(value);
  }
};
template <>
struct Stored<__half> {
  template <class A>
  static __device__ __forceinline__ __half from(A value) {
    return __float2half_rn(float(value));
  }
};
template <>
struct Stored<__nv_bfloat16> {
  template <class A>
  static __device__ __forceinline__ __nv_bfloat16 from(A value) {
    return __float2bfloat16_rn(float(value));
  }
};

// One element of an input, which no block of the launch writes. Wherever the pointer comes from, the compiler then
// knows that it leads to global memory.
template <class T>
__device__ __forceinline__ T read(const T* from) {
#ifdef TARDKD_CUDA_ON_CPU
  return *from;
#else
  return __ldg(from);
#endif
}

// Element i of an array of `dtype`, for the few values of a region where a switch costs nothing.
template <class A>
__device__ __forceinline__ A load_any(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::float32:
      return as<A>(read(static_cast<const float*>(data) + i));
    case DType::float64:
      return as<A>(read(static_cast<const double*>(data) + i));
    case DType::float16:
      return as<A>(read(static_cast<const __half*>(data) + i));
    default:
      return as<A>(read(static_cast<const __nv_bfloat16*>(data) + i));
  }
}

// ---- four elements at a time ---------------------------------------------------------------------------------------

template <class T>
struct alignas(4 * sizeof(T) > 16 ? 16 : 4 * sizeof(T)) Four {
  T at[4];
};

// Four elements as they are read: those of 16 bits as words, which stay together until they are used, for to take them
// apart at once would wait for each read.
struct alignas(8) Words {
  uint32_t at[2];
};
template <class T>
using Raw = std::conditional_t<sizeof(T) == 2, Words, Four<T>>;

// Four elements of an input: one access of 16 bytes for float, of 8 bytes for the 16-bit types; `from` is aligned to
// that.
template <class T>
__device__ __forceinline__ Raw<T> read_four(const T* from) {
#ifdef TARDKD_CUDA_ON_CPU
  return *reinterpret_cast<const Raw<T>*>(from);
#else
  if constexpr (sizeof(T) == 2) {
    const uint2 words = __ldg(reinterpret_cast<const uint2*>(from));
    return Words{{words.x, words.y}};
  } else if constexpr (sizeof(T) == 4) {
    const float4 values = __ldg(reinterpret_cast<const float4*>(from));
    return Four<T>{{values.x, values.y, values.z, values.w}};
  } else {
    const auto* pairs = reinterpret_cast<const double2*>(from);
    const double2 low = __ldg(pairs), high = __ldg(pairs + 1);
    return Four<T>{{low.x, low.y, high.x, high.y}};
  }
#endif
}

template <class T>
__device__ __forceinline__ Raw<T> as_raw(const Four<T>& elements) {
  Raw<T> raw;
  memcpy(&raw, &elements, sizeof raw);
  return raw;
}

template <class A, class T>
__device__ __forceinline__ Four<A> take_apart(const Raw<T>& raw) {
  Four<T> stored;
  memcpy(&stored, &raw, sizeof stored);
  Four<A> values;
#pragma unroll
  for (int k = 0; k < 4; ++k) values.at[k] = as<A>(stored.at[k]);
  return values;
}

template <class T, class A>
__device__ __forceinline__ void store_four(T* to, const Four<A>& values) {
  Four<T> stored;
#pragma unroll
  for (int k = 0; k < 4; ++k) stored.at[k] = Stored<T>::from(values.at[k]);
  *reinterpret_cast<Four<T>*>(to) = stored;
}

// Four elements into shared memory, in one access, which the compiler does not make of values that it chose from.
template <class A>
__device__ __forceinline__ void put_four(A* to, const Four<A>& values) {
#ifndef TARDKD_CUDA_ON_CPU
  if constexpr (sizeof(A) == 4) {
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};"
                 :
                 : "r"(uint32_t(__cvta_generic_to_shared(to))), "f"(values.at[0]), "f"(values.at[1]), "f"(values.at[2]),
                   "f"(values.at[3])
                 : "memory");
    return;
  }
#endif
  *reinterpret_cast<Four<A>*>(to) = values;
}

// ---- warps and blocks ----------------------------------------------------------------------------------------------

// All lanes take part and get the result, the same for any order of the lanes' execution.
template <class A>
__device__ __forceinline__ A warp_sum(A value) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}
template <class A>
__device__ __forceinline__ A warp_max(A value) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const A other = __shfl_xor_sync(kAllLanes, value, step);
    value = other > value ? other : value;
  }
  return value;
}

// Sum over the block; every thread takes part and gets it. `scratch`: one element a warp. Ends with a barrier, so
// the scratch may be used again at once.
template <class A>
__device__ __forceinline__ A block_sum(A value, const Shared<A>& scratch) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  value = warp_sum(value);
  if (lane == 0) scratch[warp] = value;
  __syncthreads();
  A sum = A(0);
  for (int w = 0; w < warps; ++w) sum += scratch[w];
  __syncthreads();
  return sum;
}

// Of the threads for which `chosen` is true, how many come before this one; `count`: how many there are. All threads
// take part. `counts`: one shared element a warp, which may be used again after the block's next barrier.
template <class Counts>
__device__ __forceinline__ int32_t block_rank(bool chosen, Counts& counts, int32_t& count) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const unsigned votes = __ballot_sync(kAllLanes, chosen);
  if (lane == 0) counts[warp] = __popc(votes);
  __syncthreads();
  int32_t before = 0;
  count = 0;
  for (int w = 0; w < kThreads / kWarp; ++w) {
    if (w < warp) before += counts[w];
    count += counts[w];
  }
  return before + __popc(votes & ((1u << lane) - 1u));
}

// What another block has written in this launch: from the L2 cache; a multiprocessor's own may hold what was before.
template <class T>
__device__ __forceinline__ T load_fresh(const T* from) {
#ifdef TARDKD_CUDA_ON_CPU
  return *from;
#else
  return __ldcg(from);
#endif
}
__device__ __forceinline__ bool load_fresh(const bool* from) {
  return load_fresh(reinterpret_cast<const unsigned char*>(from)) != 0;
}

// Adds one to `count` and returns what it was, releasing what this thread knows to be written, which after a barrier is
// what its block wrote, and acquiring what those have released that added before. With __threadfence() in its place
// ptxas makes every floating-point addition of the kernel return the value from before, on sm_90.
__device__ __forceinline__ int32_t count_arrival(int32_t* count) {
#ifdef TARDKD_CUDA_ON_CPU
  return __atomic_fetch_add(count, 1, __ATOMIC_ACQ_REL);
#else
  int32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;"
               : "=r"(before)
               : "l"(__cvta_generic_to_global(count))
               : "memory");
  return before;
#endif
}

// True in all threads of the last of `blocks` blocks to call this, once what every block wrote before is visible to
// load_fresh. `done` counts; it starts at zero and is zero again afterwards. `flag`: one shared element.
__device__ __forceinline__ bool last_block(int32_t* done, int32_t blocks, const Shared<int32_t>& flag) {
  __syncthreads();
  if (threadIdx.x == 0) {
    const bool last = count_arrival(done) == blocks - 1;
    flag[0] = last;
    if (last) *done = 0;
  }
  __syncthreads();
  return flag[0] != 0;
}

// ---- launching -----------------------------------------------------------------------------------------------------

// Whether this process has used the device. If not, to make it current would create its context, which takes hundreds
// of megabytes of its memory.
inline bool is_in_use(int device) {
#ifdef TARDKD_CUDA_ON_CPU
  return cuda_on_cpu::devices.has_context[device];
#else
  using GetState = int (*)(int device, unsigned* flags, int* active);
  static const GetState get_state = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    cudaGetDriverEntryPointByVersion("cuDevicePrimaryCtxGetState", &function, 7000, cudaEnableDefault, &found);
#elif CUDART_VERSION >= 12000
    cudaGetDriverEntryPoint("cuDevicePrimaryCtxGetState", &function, cudaEnableDefault, &found);
#else
    (void)found;
    cudaGetDriverEntryPoint("cuDevicePrimaryCtxGetState", &function, cudaEnableDefault);
#endif
    cudaGetLastError();
    return reinterpret_cast<GetState>(function);
  }();
  unsigned flags = 0;
  int active = 1;  // also where it cannot be found out
  if (get_state) get_state(device, &flags, &active);
  return active != 0;
#endif
}

// Makes `device` current for the scope, and the caller's again after it, unless that has never been used: as torch's
// guard does. An error is reported by error() alone and does not surface in a later call.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    error_ = cudaGetDevice(&before_);
    if (error_ == cudaSuccess && before_ != device) {
      restore_ = is_in_use(before_);
      error_ = cudaSetDevice(device);
    }
    if (error_ != cudaSuccess) {
      cudaGetLastError();
      restore_ = false;
    }
  }
  ~DeviceGuard() {
    if (restore_ && cudaSetDevice(before_) != cudaSuccess) cudaGetLastError();
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  cudaError_t error() const { return error_; }

 private:
  int before_ = 0;
  bool restore_ = false;
  cudaError_t error_;
};

// kernel<<<grid, threads, shared, stream>>>(arguments...), with the extra step that more than 48 KiB of shared memory
// takes. A grid without blocks is no launch and no error.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared, void* stream,
                   const Arguments&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
#ifdef TARDKD_CUDA_ON_CPU
  (void)stream;
  return cuda_on_cpu::launch(kernel, grid, dim3(threads), shared, arguments...);
#else
  if (shared > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
    if (error != cudaSuccess) {
      cudaGetLastError();  // it is reported here and must not surface in an unrelated call
      return error;
    }
  }
  kernel<<<grid, threads, shared, static_cast<cudaStream_t>(stream)>>>(arguments...);
  return cudaGetLastError();
#endif
}

// Launches a kernel that is called `name` in messages: `blocks` blocks of kThreads threads, on the target's device.
template <class... Parameters, class... Arguments>
Status launch_on(const Target& target, const char* name, void (*kernel)(Parameters...), int64_t blocks, size_t shared,
                 const Arguments&... arguments) {
  if (blocks > 0x7fffffff) return Status{cudaErrorInvalidConfiguration, name};
  const DeviceGuard guard(target.device);
  if (guard.error() != cudaSuccess) return Status{guard.error(), name};
  return Status{launch(kernel, dim3(unsigned(blocks)), kThreads, shared, target.stream, arguments...), name};
}

}  // namespace tardkd::cuda
