// The region losses from features that are already pooled, in one launch: a block is a region.
//
// The gates are decided first; a region whose feature gate is closed reads no feature. The last block to finish adds
// the terms up in a fixed order.
#include "../core/penalty.h"
#include "index.cuh"
#include "kernels.h"
#include "maps.cuh"
#include "region.cuh"

namespace tardkd::cuda {
namespace {

constexpr int kBatch = 2;  // fours of either side that a thread has in flight

// A region is walked as `outer` lines of `inner` elements, in the order of the student's memory: channels of bins, or
// (channels_last) bins of channels.
template <class A>
struct PooledJob : RegionTask<A> {
  PooledTensor student, teacher, grad;
  Divider inner;
  int32_t outer;
  bool bins_inside;
  // In that order the elements of a region lie one after the other in all tensors, aligned for fours, and the two
  // sides store one type.
  bool dense;
  A per_region;

  __device__ __forceinline__ int32_t count() const { return int32_t(inner.divisor) * outer; }
};

// An element of a region: its line, and its place in the line.
struct Position {
  int32_t outer, inner;

  __device__ __forceinline__ Position(const Divider& inner_size, int32_t element) {
    const Split at = inner_size.split(element);
    outer = at.quotient;
    inner = at.remainder;
  }
  __device__ __forceinline__ void next(const Divider& inner_size) {
    if (++inner == int32_t(inner_size.divisor)) {
      inner = 0;
      ++outer;
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

// The difference of the two sides' elements at a position.
template <bool kNorm, class A>
__device__ __forceinline__ A difference(const PooledJob<A>& job, A student, A teacher, const Position& at) {
  if constexpr (kNorm) {
    const int32_t channels = job.student.channels, channel = job.bins_inside ? at.outer : at.inner;
    const ChannelNorm<A> of_student(job.student.norm, channels, channel);
    const ChannelNorm<A> of_teacher(job.teacher.norm, channels, channel);
    student = *of_student.scale * (student - *of_student.mean);
    teacher = *of_teacher.scale * (teacher - *of_teacher.mean);
  }
  return student - teacher;
}

template <bool kNorm, class T, class A, class P>
__device__ __forceinline__ void penalise_dense(const PooledJob<A>& job, const T* student, const T* teacher, A* grad,
                                               const Shared<A>& weights, P& element) {
  constexpr int32_t kStep = 4 * kThreads;
  const int32_t count = job.count();
  for (int32_t begin = 4 * threadIdx.x; begin < count; begin += kBatch * kStep) {
    Raw<T> s[kBatch], t[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b)
      if (begin + b * kStep < count) {
        s[b] = read_four(student + begin + b * kStep);
        t[b] = read_four(teacher + begin + b * kStep);
      }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (begin + b * kStep < count) {
        const Four<A> own = take_apart<A, T>(s[b]), other = take_apart<A, T>(t[b]);
        Four<A> gradient;
        Position at(job.inner, begin + b * kStep);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          gradient.at[k] = element(difference<kNorm>(job, own.at[k], other.at[k], at),
                                   weights[job.bins_inside ? at.inner : at.outer]);
          at.next(job.inner);
        }
        if (grad) store_four(grad + begin + b * kStep, gradient);
      }
    }
  }
}

// Calls f(position) for every element, the threads side by side along the lines.
template <class A, class F>
__device__ __forceinline__ void for_each_element(const PooledJob<A>& job, const F& f) {
#pragma unroll 1
  for (int32_t element = threadIdx.x; element < job.count(); element += kThreads) f(Position(job.inner, element));
}

template <class A>
__device__ __forceinline__ int64_t offset(const PooledJob<A>& job, const PooledTensor& tensor, const Position& at) {
  return at.outer * tensor.strides[job.bins_inside ? 1 : 2] + at.inner * tensor.strides[job.bins_inside ? 2 : 1];
}

template <bool kNorm, class A, class P>
__device__ __forceinline__ void penalise_strided(const PooledJob<A>& job, int64_t r, A* grad, const Shared<A>& weights,
                                                 P& element) {
  const auto load = [&](const PooledTensor& from, const Position& at) {
    return load_any<A>(from.data, from.dtype, r * from.strides[0] + offset(job, from, at));
  };
  for_each_element(job, [&](const Position& at) {
    const A gradient = element(difference<kNorm>(job, load(job.student, at), load(job.teacher, at), at),
                               weights[job.bins_inside ? at.inner : at.outer]);
    if (grad) grad[offset(job, job.grad, at)] = gradient;
  });
}

// Feature term of region r, which is open: the weighted mean penalty; writes the gradient.
template <bool kNorm, class A>
__device__ A open_region(const PooledJob<A>& job, int64_t r, const Decision& region, A* grad, const Shared<A>& weights,
                         const RegionShared<A>& heads) {
  const int32_t pooled_h = job.student.pooled_h, pooled_w = job.student.pooled_w;
  for (int bin = threadIdx.x; bin < pooled_h * pooled_w; bin += kThreads)
    weights[bin] = bin_weight<A>(region, job.spec, bin / pooled_w, bin % pooled_w, pooled_h, pooled_w);
  __syncthreads();
  const A slope = grad ? feature_factor<A>(job.in, r) * job.per_region : A(0);
  const A sum = penalty_sum(job.spec, slope, [&](auto& element) {
    if (!job.dense) {
      penalise_strided<kNorm>(job, r, grad, weights, element);
      return;
    }
    with_stored<A>(job.student.dtype, [&](auto stored) {
      using T = decltype(stored);
      const T* student = static_cast<const T*>(job.student.data) + r * job.student.strides[0];
      const T* teacher = static_cast<const T*>(job.teacher.data) + r * job.teacher.strides[0];
      penalise_dense<kNorm>(job, student, teacher, grad, weights, element);
    });
  });
  return block_sum(sum, heads.sums) * job.per_region * region_weight<A>(job.in, r);
}

template <class A>
__device__ void clear(const PooledJob<A>& job, A* grad) {
  if (job.dense)
    for (int32_t e = 4 * threadIdx.x; e < job.count(); e += 4 * kThreads) store_four(grad + e, Four<A>{});
  else
    for_each_element(job, [&](const Position& at) { grad[offset(job, job.grad, at)] = A(0); });
}

template <bool kNorm, class A>
__device__ __forceinline__ void run_block(const PooledJob<A>& job) {
  SharedArena arena;
  RegionShared<A> heads;
  heads.take(arena);
  const Shared<A> weights = arena.take<A>(job.student.pooled_h * job.student.pooled_w);
  const int64_t r = blockIdx.x;
  run_region<A>(job, r, 0, heads, [&] {
    const Decision region = decide_region<A>(job, r, true, heads);
    A* grad = job.grad.data ? static_cast<A*>(job.grad.data) + r * job.grad.strides[0] : nullptr;
    if (region.gates.feature) return open_region<kNorm>(job, r, region, grad, weights, heads);
    if (grad) clear(job, grad);
    return A(0);
  });
}

// At most 64 registers a thread for float, so that four blocks share a multiprocessor; double is there for checks.
template <class A>
__global__ void __launch_bounds__(kThreads, sizeof(A) == 4 ? 4 : 2)
    pooled_distill_kernel(const __grid_constant__ PooledJob<A> job) {
  run_block<false>(job);
}

// The same of standardised features; the gradient is that for them.
template <class A>
__global__ void __launch_bounds__(kThreads, sizeof(A) == 4 ? 4 : 2)
    pooled_distill_norm_kernel(const __grid_constant__ PooledJob<A> job) {
  run_block<true>(job);
}

// Are the elements of every region one after the other in the order of the walk, aligned for accesses of four?
template <class A>
bool in_fours(const PooledTensor& tensor, const PooledJob<A>& job) {
  const int64_t step = tensor.strides[job.bins_inside ? 2 : 1], line = tensor.strides[job.bins_inside ? 1 : 2];
  const uintptr_t aligned_to = bytes_of(tensor.dtype) == 2 ? 8 : 16;
  return (job.inner.divisor == 1 || step == 1) && (job.outer == 1 || line == int64_t(job.inner.divisor)) &&
         tensor.strides[0] % 4 == 0 && reinterpret_cast<uintptr_t>(tensor.data) % aligned_to == 0;
}

}  // namespace

template <class A>
Status pooled_distill(const PooledTensor& student, const PooledTensor& teacher, const PooledTensor& grad,
                      const RegionInputs& in, const RegionOutputs<A>& out, const Scratch<A>& scratch,
                      const LossSpec& spec, const Target& target) {
  const int32_t channels = student.channels, bins = student.pooled_h * student.pooled_w;
  PooledJob<A> job{};
  job.student = student;
  job.teacher = teacher;
  job.grad = grad;
  job.bins_inside = student.strides[2] <= student.strides[1];
  const int32_t inner = job.bins_inside ? bins : channels;
  if (inner > 0) job.inner = Divider(inner);
  job.outer = inner == 0 ? 0 : job.bins_inside ? channels : bins;
  job.dense = student.dtype == teacher.dtype && channels * bins % 4 == 0 && in_fours(student, job) &&
              in_fours(teacher, job) && (!grad.data || in_fours(grad, job));
  job.per_region = A(1) / (A(channels) * A(bins));
  job.in = in;
  job.out = out;
  job.scratch = scratch;
  job.spec = spec;
  job.groups = 1;
  // Without regions one block still writes the losses.
  const auto kernel = student.norm ? pooled_distill_norm_kernel<A> : pooled_distill_kernel<A>;
  return launch_on(target, "pooled_distill", kernel, in.regions > 0 ? in.regions : 1,
                   RegionShared<A>::bytes() + shared_bytes<A>(bins), job);
}

#define TARDKD_INSTANTIATE(A)                                                                                         \
  template Status pooled_distill<A>(const PooledTensor&, const PooledTensor&, const PooledTensor&,                    \
                                    const RegionInputs&, const RegionOutputs<A>&, const Scratch<A>&, const LossSpec&, \
                                    const Target&)
TARDKD_INSTANTIATE(float);
TARDKD_INSTANTIATE(double);

}  // namespace tardkd::cuda
