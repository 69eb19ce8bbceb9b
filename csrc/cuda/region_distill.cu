// The flagship: both pyramids to gates, three losses and their gradients in one launch, of which that of the features
// is left for its last step, from bins to pixels (gather.cu), until it is known what it is to be multiplied by.
//
// A block is one region and a group of channels. It decides the region's gates first; a region whose feature gate is
// closed reads no feature. What the blocks find is added up by the last of them to finish, in a fixed order.
#include "../core/penalty.h"
#include "kernels.h"
#include "pool.cuh"
#include "region.cuh"

namespace tardkd::cuda {
namespace {

template <class A>
struct RegionFeatures {
  PyramidView sides[2];  // student, teacher
  A* grad_pooled;        // packed, see packed_at; or null
  int32_t tables;        // 1 if one set serves both sides: same geometry and layout
};

// In this order: with the task in front ptxas for sm_80 spills.
template <class A>
struct RegionJob : RegionFeatures<A>, RegionTask<A> {
  RoiAlignSpec align;
};

// bins = RoIAlign(student) - RoIAlign(teacher) of one chunk: one pass where the difference can be taken on load, else
// one for each side.
template <bool kNorm, class A>
__device__ __forceinline__ void pool_difference(const RegionJob<A>& job, int32_t image, int32_t channel,
                                                const BinGroup& group, PoolShared<A>& shared) {
  const bool on_load = job.tables == 1 && job.sides[0].dtype == job.sides[1].dtype;
  clear_bins(shared, group);
#pragma unroll 1
  for (int side = 0; side < (on_load ? 1 : 2); ++side) {
    const int table = side < job.tables ? side : 0, level = shared.place[table].level;
    const PoolSource source{job.sides[side].level[level],
                            job.sides[1].level[shared.place[job.tables - 1].level],
                            on_load,
                            job.sides[side].dtype,
                            image,
                            job.sides[0].level[shared.place[0].level].map.channels,
                            channel};
    pool<kNorm>(source, shared.place[table], group, shared, shared.tables[table], side == 0 ? A(1) : A(-1));
  }
}

template <class A>
struct alignas(16) FeatureShared {
  Decision decision;
  A slope;  // of a bin whose weight and whose penalty's slope are 1
  SharedArray<A, kGroupCells> bin_weight;
  PoolShared<A> pool;  // last: its end may be missing
};

template <class A>
__host__ __device__ size_t feature_shared_bytes(int32_t tables) {
  return sizeof(FeatureShared<A>) - sizeof(PoolShared<A>) + pool_shared_bytes<A>(tables);
}

// This block's share of the weighted feature term, with the gradient on the way.
template <bool kNorm, class A>
__device__ __forceinline__ A feature_term(const RegionJob<A>& job, int32_t region, int32_t channel_group,
                                          FeatureShared<A>& shared, const RegionShared<A>& heads) {
  PoolShared<A>& bins = shared.pool;
  if (threadIdx.x % kWarp == 0 && threadIdx.x / kWarp < job.tables) {
    const int side = threadIdx.x / kWarp;
    bins.place[side] = place_region(job.sides[side], region, shared.decision.box, job.align);
    bins.tables[side].clear();
  }
  __syncthreads();

  const int32_t channels = job.sides[0].level[bins.place[0].level].map.channels;
  const A elements = A(channels) * A(job.align.pooled_h * job.align.pooled_w);
  if (threadIdx.x == 0) shared.slope = feature_factor<A>(job.in, region) / elements;
  A sum = A(0);
  for_each_chunk<A>(channel_group, channels, [&](int32_t channel) {
    for_each_group(job.align, [&](const BinGroup& group) {
      if (threadIdx.x < group.bins()) {
        const int32_t i = group.y + threadIdx.x / group.columns, j = group.x + threadIdx.x % group.columns;
        shared.bin_weight[threadIdx.x] =
            bin_weight<A>(shared.decision, job.spec, i, j, job.align.pooled_h, job.align.pooled_w);
      }
      pool_difference<kNorm>(job, shared.decision.image, channel, group, bins);
      const A beta = static_cast<A>(job.spec.beta);
      A* const grad = job.grad_pooled ? job.grad_pooled + packed_at<A>(region, channel / kChunk<A>,
                                                                       job.sides[0].max_channels, job.align)
                                      : nullptr;
      for_own_bins(bins.bins, group, [&](int32_t bin, int32_t quad, const Four<A>& values) {
        const A weight = shared.bin_weight[bin];
        Four<A> gradient;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          sum += weight * penalty(job.spec.feature_loss, values.at[k], beta);
          gradient.at[k] = shared.slope * weight * penalty_slope(job.spec.feature_loss, values.at[k], beta);
        }
        if (grad) store_four(grad + group.bin_of(bin, job.align) * kChunk<A> + 4 * quad, gradient);
      });
      __syncthreads();
    });
  });
  return block_sum(sum, heads.sums) * (region_weight<A>(job.in, region) / elements);
}

template <bool kNorm, class A>
__device__ __forceinline__ void run_block(const RegionJob<A>& job) {
  SharedArena arena;
  RegionShared<A> heads;
  heads.take(arena);
  FeatureShared<A>& shared = *arena.rest<FeatureShared<A>>(feature_shared_bytes<A>(job.tables));
  const RegionBlock block = region_block(job.groups);
  run_region<A>(job, block.region, block.group, heads, [&] {
    const Decision region = decide_region<A>(job, block.region, block.group == 0, heads);
    if (!region.gates.feature) return A(0);
    if (threadIdx.x == 0) shared.decision = region;
    __syncthreads();
    return feature_term<kNorm>(job, block.region, block.group, shared, heads);
  });
}

template <class A>
__global__ void __launch_bounds__(kThreads, TARDKD_BLOCKS(3))
    region_distill_kernel(const __grid_constant__ RegionJob<A> job) {
  run_block<false>(job);
}

// The same of standardised features; the gradient is that for them. With a third block there would be too few
// registers.
template <class A>
__global__ void __launch_bounds__(kThreads, TARDKD_BLOCKS(2))
    region_distill_norm_kernel(const __grid_constant__ RegionJob<A> job) {
  run_block<true>(job);
}

// Even without channels there are losses of the heads.
template <class A>
int32_t blocks_of_region(int32_t channels) {
  return channel_groups<A>(channels) > 0 ? channel_groups<A>(channels) : 1;
}

// Whether one set of tables serves both sides.
bool same_geometry(const PyramidView& a, const PyramidView& b) {
  if (a.levels != b.levels) return false;
  for (int32_t level = 0; level < a.levels; ++level) {
    const MapView &x = a.level[level], &y = b.level[level];
    if (!same_extent(x.map, y.map) || x.planar != y.planar) return false;
  }
  return true;
}

}  // namespace

int64_t region_partials(int64_t regions, int32_t channels) {
  return (2 + blocks_of_region<double>(channels)) * regions;  // float takes fewer
}

template <class A>
Status region_distill(const Pyramid& student, const Pyramid& teacher, A* grad_pooled, const RegionInputs& in,
                      const RegionOutputs<A>& out, const Scratch<A>& scratch, const RoiAlignSpec& align,
                      const LossSpec& spec, const Target& target) {
  if (!strides_fit(student) || !strides_fit(teacher)) return Status{cudaErrorInvalidValue, "region_distill"};
  RegionJob<A> job{};
  job.sides[0] = view_of(student, level_choice(student, in.student_levels));
  job.sides[1] = view_of(teacher, teacher_choice(job.sides[0].choice, teacher, in.teacher_levels));
  job.grad_pooled = grad_pooled;
  job.tables = same_geometry(job.sides[0], job.sides[1]) && job.sides[0].choice == job.sides[1].choice ? 1 : 2;
  job.in = in;
  job.out = out;
  job.scratch = scratch;
  job.align = align;
  job.spec = spec;
  job.groups = blocks_of_region<A>(student.max_channels);
  const size_t shared = RegionShared<A>::bytes() + feature_shared_bytes<A>(job.tables);
  // Without regions one block still writes the losses.
  const int64_t blocks = (in.regions > 0 ? in.regions : 1) * job.groups;
  const auto kernel = student.level[0].norm ? region_distill_norm_kernel<A> : region_distill_kernel<A>;
  return launch_on(target, "region_distill", kernel, blocks, shared, job);
}

#define TARDKD_INSTANTIATE(A)                                                                                         \
  template Status region_distill<A>(const Pyramid&, const Pyramid&, A*, const RegionInputs&, const RegionOutputs<A>&, \
                                    const Scratch<A>&, const RoiAlignSpec&, const LossSpec&, const Target&)
TARDKD_INSTANTIATE(float);
TARDKD_INSTANTIATE(double);

}  // namespace tardkd::cuda
