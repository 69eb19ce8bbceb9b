// The gradients of a loss's terms times what autograd hands down for each, in one launch: a thread has sixteen
// elements.
#include "kernels.h"
#include "maps.cuh"

namespace tardkd::cuda {
namespace {

constexpr int kFours = 4;  // of a thread, kThreads fours apart
constexpr int64_t kBlockElements = 4 * kFours * kThreads;

template <class A>
struct ScaleJob {
  Scaling scaling[kMaxScalings];
  int64_t first_block[kMaxScalings + 1];
};

template <class A>
__global__ void __launch_bounds__(kThreads) scale_kernel(const __grid_constant__ ScaleJob<A> job) {
  int index = 0;
  while (int64_t(blockIdx.x) >= job.first_block[index + 1]) ++index;
  const Scaling& scaling = job.scaling[index];
  const A* gradient = static_cast<const A*>(scaling.gradient);
  A by = read(static_cast<const A*>(scaling.upstream));
  if (scaling.factor) by *= read(static_cast<const A*>(scaling.factor));
  const int64_t begin = (blockIdx.x - job.first_block[index]) * kBlockElements;
  const bool in_fours = (reinterpret_cast<uintptr_t>(scaling.to) | reinterpret_cast<uintptr_t>(gradient)) % 16 == 0;
  with_stored<A>(scaling.dtype, [&](auto stored) {
    using T = decltype(stored);
    T* to = static_cast<T*>(scaling.to);
    if (in_fours && begin + kBlockElements <= scaling.count) {
      Four<A> values[kFours];
#pragma unroll
      for (int n = 0; n < kFours; ++n)
        values[n] = *reinterpret_cast<const Four<A>*>(gradient + begin + 4 * (n * kThreads + threadIdx.x));
#pragma unroll
      for (int n = 0; n < kFours; ++n) {
#pragma unroll
        for (int k = 0; k < 4; ++k) values[n].at[k] *= by;
        store_four(to + begin + 4 * (n * kThreads + threadIdx.x), values[n]);
      }
    } else {
      const int64_t end = begin + kBlockElements < scaling.count ? begin + kBlockElements : scaling.count;
      for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) to[i] = Stored<T>::from(gradient[i] * by);
    }
  });
}

}  // namespace

template <class A>
Status scale_gradients(const Scaling* scalings, int count, const Target& target) {
  ScaleJob<A> job{};
  int64_t blocks = 0;
  for (int index = 0; index < count; ++index) {
    job.scaling[index] = scalings[index];
    job.first_block[index] = blocks;
    blocks += (scalings[index].count + kBlockElements - 1) / kBlockElements;
  }
  for (int index = count; index <= kMaxScalings; ++index) job.first_block[index] = blocks;
  return launch_on(target, "scale_gradients", scale_kernel<A>, blocks, 0, job);
}

template Status scale_gradients<float>(const Scaling*, int, const Target&);
template Status scale_gradients<double>(const Scaling*, int, const Target&);

}  // namespace tardkd::cuda
