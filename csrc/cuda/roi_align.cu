// RoIAlign over a whole pyramid in one launch: a block is a region and a group of channels.
#include "kernels.h"
#include "pool.cuh"

namespace tardkd::cuda {
namespace {

template <class A>
struct AlignJob {
  PyramidView pyramid;
  Table proposals;  // (R, 5)
  void* pooled;     // (R, C, pooled_h, pooled_w), of the features' type
  RoiAlignSpec align;
  int32_t groups;  // of channels: blocks a region
};

template <class A>
size_t align_shared() {
  return shared_bytes<int32_t>(2) + pool_shared_bytes<A>(1);
}

template <class A>
__global__ void __launch_bounds__(kThreads, TARDKD_BLOCKS(3))
    roi_align_kernel(const __grid_constant__ AlignJob<A> job) {
  SharedArena arena;
  const Shared<int32_t> found = arena.take<int32_t>(2);  // whether the region is valid, its image
  PoolShared<A>& shared = *arena.rest<PoolShared<A>>(pool_shared_bytes<A>(1));
  const RegionBlock block = region_block(job.groups);
  const int32_t channels = job.pyramid.max_channels;
  if (threadIdx.x == 0) {
    double box[4];
    found[0] = read_region(job.proposals, job.pyramid, block.region, box, found[1]);
    if (found[0]) shared.place[0] = place_region(job.pyramid, block.region, box, job.align);
    shared.tables[0].clear();
  }
  __syncthreads();
  for_each_chunk<A>(block.group, channels, [&](int32_t channel) {
    for_each_group(job.align, [&](const BinGroup& group) {
      clear_bins(shared, group);
      if (found[0]) {
        const RegionPlace& place = shared.place[0];
        const MapView& map = job.pyramid.level[place.level];
        pool(PoolSource{map, map, false, job.pyramid.dtype, found[1], channels, channel}, place, group, shared,
             shared.tables[0], A(1));
      } else {
        __syncthreads();
      }
      with_stored<A>(job.pyramid.dtype, [&](auto stored) {
        using T = decltype(stored);
        write_pooled(int64_t(block.region) * channels + channel, chunk_channels<A>(channels, channel), job.align, group,
                     shared.bins,
                     [&](int64_t at, A value) { static_cast<T*>(job.pooled)[at] = Stored<T>::from(value); });
      });
      __syncthreads();
    });
  });
}

template <class A>
Status pool_regions(const Pyramid& features, const Table& proposals, const GivenLevels& levels, int64_t regions,
                    void* pooled, const RoiAlignSpec& align, const Target& target) {
  if (!strides_fit(features)) return Status{cudaErrorInvalidValue, "roi_align"};
  const AlignJob<A> job{view_of(features, level_choice(features, levels)), proposals, pooled, align,
                        channel_groups<A>(features.max_channels)};
  return launch_on(target, "roi_align", roi_align_kernel<A>, regions * job.groups, align_shared<A>(), job);
}

}  // namespace

Status roi_align(const Pyramid& features, const Table& proposals, const GivenLevels& levels, int64_t regions,
                 void* pooled, const RoiAlignSpec& align, const Target& target) {
  return features.dtype == DType::float64
             ? pool_regions<double>(features, proposals, levels, regions, pooled, align, target)
             : pool_regions<float>(features, proposals, levels, regions, pooled, align, target);
}

}  // namespace tardkd::cuda
