// The region losses from features that are already pooled, in one launch: a block is a region.
//
// The gates are decided first; a region whose feature gate is closed reads no feature. The last block to finish adds
// the terms up in a fixed order.
#include "../core/penalty.h"
#include "kernels.h"
#include "maps.cuh"
#include "region.cuh"

namespace tardkd::cuda {
namespace {

constexpr int kBatch = 2;  // fours of either side that a thread has in flight

// A region is walked as `outer` lines of `inner` elements, in the order of the student's memory: channels of bins, or
// (channels_last) bins of channels.
template <class A>
struct PooledJob {
  PooledTensor student, teacher, grad;
  int32_t pooled_h, pooled_w;
  int32_t inner, outer;
  bool bins_inside;
  // In that order the elements of a region lie one after the other in all tensors, aligned for fours, and the two
  // sides store one type.
  bool dense;
  A per_region;
  RegionTables in;
  RegionResults<A> out;
  LossSpec spec;

  __device__ __forceinline__ int32_t count() const { return inner * outer; }
  __device__ __forceinline__ int32_t width() const { return dense ? 4 : 1; }  // elements a thread takes at a time
};

struct Position {
  int32_t outer, inner;

  __device__ __forceinline__ void next(int32_t size) {
    if (++inner == size) {
      inner = 0;
      ++outer;
    }
  }
};

// A thread's way through a region: its first element, and how far it is to each next one.
struct Walk {
  Position at, step;
  int32_t size;

  template <class A>
  __device__ __forceinline__ explicit Walk(const PooledJob<A>& job) : size(job.inner) {
    const int32_t first = job.width() * threadIdx.x, stride = job.width() * kThreads;
    at = Position{first / size, first % size};
    step = Position{stride / size, stride % size};
  }
  __device__ __forceinline__ void advance() {
    at.outer += step.outer;
    at.inner += step.inner;
    if (at.inner >= size) {
      at.inner -= size;
      ++at.outer;
    }
  }
};

// What becomes of the difference of two elements.
template <class A, FeatureLoss kKind>
struct Penalty {
  A beta, slope, sum;

  // Adds the penalty of `d` to the sum and returns its gradient.
  __device__ __forceinline__ A operator()(A d, A weight) {
    sum += weight * penalty(kKind, d, beta);
    return slope * weight * penalty_slope(kKind, d, beta);
  }
};

template <class A, class F>
__device__ __forceinline__ A penalty_sum(const LossSpec& spec, A slope, const F& add_elements) {
  const A beta = static_cast<A>(spec.beta);
  const auto run = [&](auto element) {
    add_elements(element);
    return element.sum;
  };
  switch (spec.feature_loss) {
    case FeatureLoss::squared:
      return run(Penalty<A, FeatureLoss::squared>{beta, slope, A(0)});
    case FeatureLoss::absolute:
      return run(Penalty<A, FeatureLoss::absolute>{beta, slope, A(0)});
    default:
      return run(Penalty<A, FeatureLoss::smooth_l1>{beta, slope, A(0)});
  }
}

template <class T, class A, class P>
__device__ __forceinline__ void penalise_dense(const PooledJob<A>& job, const T* student, const T* teacher, A* grad,
                                               const Shared<A>& weights, Walk walk, P& element) {
  constexpr int32_t kStep = 4 * kThreads;
  const int32_t count = job.count();
  for (int32_t begin = 4 * threadIdx.x; begin < count; begin += kBatch * kStep) {
    Four<A> s[kBatch], t[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b)
      if (begin + b * kStep < count) {
        s[b] = load_four<A>(student + begin + b * kStep);
        t[b] = load_four<A>(teacher + begin + b * kStep);
      }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (begin + b * kStep < count) {
        Four<A> gradient;
        Position at = walk.at;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          gradient.at[k] = element(s[b].at[k] - t[b].at[k], weights[job.bins_inside ? at.inner : at.outer]);
          at.next(walk.size);
        }
        if (grad) store_four(grad + begin + b * kStep, gradient);
      }
      walk.advance();
    }
  }
}

// Calls f(position) for every element, the threads side by side along the lines.
template <class A, class F>
__device__ __forceinline__ void for_each_element(const PooledJob<A>& job, Walk walk, const F& f) {
#pragma unroll 1
  for (; walk.at.outer < job.outer; walk.advance()) f(walk.at);
}

template <class A>
__device__ __forceinline__ int64_t offset(const PooledJob<A>& job, const PooledTensor& tensor, const Position& at) {
  return at.outer * tensor.strides[job.bins_inside ? 1 : 2] + at.inner * tensor.strides[job.bins_inside ? 2 : 1];
}

template <class A, class P>
__device__ __forceinline__ void penalise_strided(const PooledJob<A>& job, int64_t r, A* grad, const Shared<A>& weights,
                                                 const Walk& walk, P& element) {
  const auto load = [&](const PooledTensor& from, const Position& at) {
    return load_any<A>(from.data, from.dtype, r * from.strides[0] + offset(job, from, at));
  };
  for_each_element(job, walk, [&](const Position& at) {
    const A gradient =
        element(load(job.student, at) - load(job.teacher, at), weights[job.bins_inside ? at.inner : at.outer]);
    if (grad) grad[offset(job, job.grad, at)] = gradient;
  });
}

// Feature term of region r, which is open: the weighted mean penalty; writes the gradient.
template <class A>
__device__ A open_region(const PooledJob<A>& job, int64_t r, const Decision& region, A* grad, const Shared<A>& weights,
                         const RegionScratch<A>& scratch) {
  for (int bin = threadIdx.x; bin < job.pooled_h * job.pooled_w; bin += kThreads)
    weights[bin] = bin_weight<A>(region, job.spec, bin, job.pooled_h, job.pooled_w);
  __syncthreads();
  const Walk walk(job);
  const A slope = grad ? feature_factor<A>(job.in, r) * job.per_region : A(0);
  const A sum = penalty_sum(job.spec, slope, [&](auto& element) {
    if (!job.dense) {
      penalise_strided(job, r, grad, weights, walk, element);
      return;
    }
    with_stored<A>(job.student.dtype, [&](auto stored) {
      using T = decltype(stored);
      const T* student = static_cast<const T*>(job.student.data) + r * job.student.strides[0];
      const T* teacher = static_cast<const T*>(job.teacher.data) + r * job.teacher.strides[0];
      penalise_dense(job, student, teacher, grad, weights, walk, element);
    });
  });
  return block_sum(sum, scratch.sums) * job.per_region * region_weight<A>(job.in, r);
}

template <class A>
__device__ void clear(const PooledJob<A>& job, A* grad) {
  if (job.dense)
    for (int32_t e = 4 * threadIdx.x; e < job.count(); e += 4 * kThreads) store_four(grad + e, Four<A>{});
  else
    for_each_element(job, Walk(job), [&](const Position& at) { grad[offset(job, job.grad, at)] = A(0); });
}

// At most 64 registers a thread for float, so that four blocks share a multiprocessor; double is there for checks.
template <class A>
__global__ void __launch_bounds__(kThreads, sizeof(A) == 4 ? 4 : 2)
    pooled_distill_kernel(const __grid_constant__ PooledJob<A> job) {
  SharedArena arena;
  RegionScratch<A> scratch;
  scratch.take(arena);
  const Shared<A> weights = arena.take<A>(job.pooled_h * job.pooled_w);

  const int64_t r = blockIdx.x, regions = job.in.regions;
  if (r < regions) {
    const Decision region = decide_region(job.in, job.out, job.spec, r, true, scratch);
    A* grad = job.grad.data ? static_cast<A*>(job.grad.data) + r * job.grad.strides[0] : nullptr;
    A term = A(0);
    if (region.gates.feature)
      term = open_region(job, r, region, grad, weights, scratch);
    else if (grad)
      clear(job, grad);
    if (threadIdx.x == 0) job.out.partial[2 * regions + r] = term;
  }
  if (last_block(job.out.done, gridDim.x, scratch.flag)) finish_losses(job.in, job.out, job.spec, 1, scratch);
}

// Are the elements of every region one after the other in the order of the walk, aligned for accesses of four?
template <class A>
bool in_fours(const PooledTensor& tensor, const PooledJob<A>& job) {
  const int64_t step = tensor.strides[job.bins_inside ? 2 : 1], line = tensor.strides[job.bins_inside ? 1 : 2];
  const uintptr_t aligned_to = bytes_of(tensor.dtype) == 2 ? 8 : 16;
  return (job.inner == 1 || step == 1) && (job.outer == 1 || line == job.inner) && tensor.strides[0] % 4 == 0 &&
         reinterpret_cast<uintptr_t>(tensor.data) % aligned_to == 0;
}

}  // namespace

template <class A>
Status pooled_distill(const PooledTensor& student, const PooledTensor& teacher, const PooledTensor& grad,
                      int32_t channels, int32_t pooled_h, int32_t pooled_w, const RegionTables& in,
                      const RegionResults<A>& out, const LossSpec& spec, const Target& target) {
  const DeviceGuard guard(target.device);
  if (guard.error() != cudaSuccess) return Status{guard.error(), "pooled_distill"};
  const int32_t bins = pooled_h * pooled_w;
  PooledJob<A> job{};
  job.student = student;
  job.teacher = teacher;
  job.grad = grad;
  job.pooled_h = pooled_h;
  job.pooled_w = pooled_w;
  job.bins_inside = student.strides[2] <= student.strides[1];
  job.inner = job.bins_inside ? bins : channels;
  job.outer = job.bins_inside ? channels : bins;
  job.dense = student.dtype == teacher.dtype && channels * bins % 4 == 0 && in_fours(student, job) &&
              in_fours(teacher, job) && (!grad.data || in_fours(grad, job));
  job.per_region = A(1) / (A(channels) * A(bins));
  job.in = in;
  job.out = out;
  job.spec = spec;
  // Without regions one block still writes the losses.
  const unsigned blocks = in.regions > 0 ? unsigned(in.regions) : 1u;
  const size_t shared = RegionScratch<A>::bytes() + shared_bytes<A>(bins);
  return Status{launch(pooled_distill_kernel<A>, dim3(blocks), kThreads, shared, target.stream, job), "pooled_distill"};
}

template Status pooled_distill<float>(const PooledTensor&, const PooledTensor&, const PooledTensor&, int32_t, int32_t,
                                      int32_t, const RegionTables&, const RegionResults<float>&, const LossSpec&,
                                      const Target&);
template Status pooled_distill<double>(const PooledTensor&, const PooledTensor&, const PooledTensor&, int32_t, int32_t,
                                       int32_t, const RegionTables&, const RegionResults<double>&, const LossSpec&,
                                       const Target&);

}  // namespace tardkd::cuda
