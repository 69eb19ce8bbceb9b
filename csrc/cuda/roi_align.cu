// RoIAlign over a whole pyramid in one launch, and its gradient two ways: by atomics from the regions' side (scatter),
// or tile by tile from the map's side in a fixed order (gather), which is repeatable and needs no zeros beforehand.
#include "../core/region.h"
#include "kernels.h"
#include "pool.cuh"
#include "tiles.cuh"

namespace tardkd::cuda {
namespace {

// Reads a row of `proposals`, (R, 5), into `box`, (4,); false if it cannot be pooled.
__device__ inline bool read_region(const Table& proposals, const PyramidView& pyramid, int64_t region, double* box,
                                   int32_t& image) {
  double row[5];
#pragma unroll
  for (int k = 0; k < 5; ++k)
    row[k] =
        load_any<double>(proposals.data, proposals.dtype, region * proposals.stride_row + k * proposals.stride_column);
#pragma unroll
  for (int k = 0; k < 4; ++k) box[k] = row[k + 1];
  const bool valid = is_valid_proposal(row, pyramid.images) && pyramid.choice.given.has(region);
  image = valid ? int32_t(row[0]) : 0;
  return valid;
}

// ---- by region: forward, and scatter -------------------------------------------------------------------------------

template <class A>
struct AlignJob {
  PyramidView pyramid;  // features, or gradients of A
  Table proposals;      // (R, 5)
  void* pooled;         // (R, C, pooled_h, pooled_w), written, or read for the gradient
  DType pooled_dtype;
  RoiAlignSpec align;
  int32_t groups;  // of channels: blocks a region
};

template <class A>
size_t align_shared() {
  return shared_bytes<int32_t>(2) + pool_shared_bytes<A>(1);
}

// Calls body(image, channel, group of bins, shared) for this block's share of a valid region; false for an invalid one.
template <class A, class Body>
__device__ bool for_region(const AlignJob<A>& job, const Body& body) {
  SharedArena arena;
  const Shared<int32_t> found = arena.take<int32_t>(2);  // whether the region is valid, its image
  PoolShared<A>& shared = *arena.rest<PoolShared<A>>(pool_shared_bytes<A>(1));
  const RegionBlock block = region_block(job.groups);
  if (threadIdx.x == 0) {
    double box[4];
    found[0] = read_region(job.proposals, job.pyramid, block.region, box, found[1]);
    if (found[0]) shared.place[0] = place_region(job.pyramid, block.region, box, job.align);
    shared.tables[0].clear();
  }
  __syncthreads();
  if (!found[0]) return false;
  for_each_chunk<A>(block.group, job.pyramid.max_channels, [&](int32_t channel) {
    for_each_group(job.align, [&](const BinGroup& group) { body(block.region, found[1], channel, group, shared); });
  });
  return true;
}

template <class A>
__global__ void __launch_bounds__(kThreads, TARDKD_BLOCKS(3))
    roi_align_kernel(const __grid_constant__ AlignJob<A> job) {
  const int32_t channels = job.pyramid.max_channels;
  const bool valid = for_region(
      job, [&](int64_t region, int32_t image, int32_t channel, const BinGroup& group, PoolShared<A>& shared) {
        const RegionPlace& place = shared.place[0];
        clear_bins(shared, group);
        const MapView& map = job.pyramid.level[place.level];
        pool(PoolSource{map, map, false, job.pyramid.dtype, image, channels, channel}, place, group, shared,
             shared.tables[0], A(1));
        with_stored<A>(job.pyramid.dtype, [&](auto stored) {
          using T = decltype(stored);
          write_pooled(region * channels + channel, chunk_channels<A>(channels, channel), job.align, group, shared.bins,
                       [&](int64_t at, A value) { static_cast<T*>(job.pooled)[at] = Stored<T>::from(value); });
        });
        __syncthreads();
      });
  if (valid) return;
  with_stored<A>(job.pyramid.dtype, [&](auto stored) {
    using T = decltype(stored);
    const RegionBlock block = region_block(job.groups);
    const int64_t bins = int64_t(job.align.pooled_h) * job.align.pooled_w;
    for_each_chunk<A>(block.group, channels, [&](int32_t channel) {
      T* pooled = static_cast<T*>(job.pooled) + (int64_t(block.region) * channels + channel) * bins;
      for (int64_t k = threadIdx.x; k < chunk_channels<A>(channels, channel) * bins; k += kThreads)
        pooled[k] = Stored<T>::from(A(0));
    });
  });
}

template <class A>
__global__ void __launch_bounds__(kThreads, TARDKD_BLOCKS(3))
    roi_align_scatter_kernel(const __grid_constant__ AlignJob<A> job) {
  const int32_t channels = job.pyramid.max_channels;
  for_region(job, [&](int64_t region, int32_t image, int32_t channel, const BinGroup& group, PoolShared<A>& shared) {
    read_pooled(region * channels + channel, chunk_channels<A>(channels, channel), job.align, group, shared.bins,
                [&](int64_t at) { return load_any<A>(job.pooled, job.pooled_dtype, at); });
    __syncthreads();
    const RegionPlace& place = shared.place[0];
    scatter(job.pyramid.level[place.level], image, channels, channel, place, group, shared, shared.tables[0]);
    __syncthreads();
  });
}

template <class A, class Kernel>
Status launch_by_region(const char* name, Kernel kernel, const Pyramid& pyramid, const Table& proposals,
                        const GivenLevels& levels, int64_t regions, void* pooled, DType pooled_dtype,
                        const RoiAlignSpec& align, const Target& target) {
  if (!strides_fit(pyramid)) return Status{cudaErrorInvalidValue, name};
  const AlignJob<A> job{view_of(pyramid, level_choice(pyramid, levels)), proposals, pooled, pooled_dtype, align,
                        channel_groups<A>(pyramid.max_channels)};
  return launch_on(target, name, kernel, regions * job.groups, align_shared<A>(), job);
}

// ---- by tile of the map: gather ------------------------------------------------------------------------------------

constexpr int kTile = 8;    // pixels a side
constexpr int kWindow = 6;  // integers a region: image, level (-1: none), first and last row, first and last column

template <class A>
constexpr int kOwnPixels = kTile * kTile * kQuads<A> / kThreads;

struct GatherJob {
  PyramidView grad;
  Table proposals;  // (R, 5)
  int64_t regions;
  const bool* open;    // (R, 3), or null
  const void* pooled;  // (R, most channels of a level, pooled_h, pooled_w)
  DType pooled_dtype;
  int32_t* windows;  // (kWindow, R)
  RoiAlignSpec align;
  TileGrid tiles;  // by chunks of channels
};

// Which pixels of which map a region can touch.
__global__ void __launch_bounds__(kThreads) roi_windows_kernel(const __grid_constant__ GatherJob job) {
  const int64_t region = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (region >= job.regions) return;
  int32_t window[kWindow] = {0, -1, 0, -1, 0, -1};
  double box[4];
  if ((!job.open || job.open[3 * region]) && read_region(job.proposals, job.grad, region, box, window[0])) {
    const RegionPlace place = place_region(job.grad, region, box, job.align);
    window[1] = place.level;
    const auto pixels = [](const AxisPlace& axis, int32_t pooled, int32_t& first, int32_t& last) {
      const double end = axis.roi.start + pooled * axis.roi.bin, size = axis.roi.size;
      first = int32_t(fmin(fmax(floor(fmin(axis.roi.start, end)), 0.0), size - 1.0));
      last = int32_t(fmin(fmax(floor(fmax(axis.roi.start, end)) + 1.0, 0.0), size - 1.0));
    };
    pixels(place.y, job.align.pooled_h, window[2], window[3]);
    pixels(place.x, job.align.pooled_w, window[4], window[5]);
  }
#pragma unroll
  for (int k = 0; k < kWindow; ++k) job.windows[k * job.regions + region] = window[k];
}

// Sum of the weights that the samples of `bin` give to `pixel`.
__device__ inline double pixel_weight(const AxisPlace& axis, int32_t bin, int32_t pixel) {
  // Only samples within a pixel of it, or beyond the border next to it, can; 2 leaves room for rounding.
  const double start = axis.roi.start + bin * axis.roi.bin, step = axis.roi.bin / axis.roi.grid;
  double first = 0.0, last = axis.roi.grid;
  if (step != 0.0) {
    const double a = (pixel - 2.0 - start) / step, b = (pixel + 2.0 - start) / step;
    first = fmax(floor(fmin(a, b)) - 1.0, 0.0);
    last = fmin(ceil(fmax(a, b)) + 1.0, double(axis.roi.grid));
  }
  double weight = 0.0;
  AxisSample sample;
  for (int32_t k = first < last ? int32_t(first) : 0; k < (first < last ? int32_t(last) : 0); ++k)
    if (axis_sample(axis.roi, bin, k, sample)) {
      if (sample.lo == pixel) weight += sample.weight_lo;
      if (sample.hi == pixel && sample.hi != sample.lo) weight += sample.weight_hi;
    }
  return weight;
}

template <class A>
struct alignas(16) GatherShared {
  Bins<A> bins;
  SharedArray<A, 2 * kGroupBins * kTile> weight;  // [axis][bin][pixel of the tile]
  SharedArray<int32_t, kThreads> found;           // regions that touch the tile, ascending
  SharedArray<int32_t, kThreads / kWarp> counts;  // of them, by warp
  RegionPlace place;
};

struct GatherTile {
  __host__ __device__ TileSize operator()(const MapView&) const { return TileSize{kTile, kTile}; }
};

// Adds one region's part to the pixels this thread owns: a quad of channels of kOwnPixels pixels.
template <class A>
__device__ void gather_region(const GatherJob& job, const Tile& tile, int64_t region, GatherShared<A>& shared,
                              Four<A>* own) {
  if (threadIdx.x == 0) {
    double box[4];
    int32_t image;
    read_region(job.proposals, job.grad, region, box, image);
    shared.place = place_region(job.grad, region, box, job.align);
  }
  const int32_t channels = chunk_channels<A>(job.grad.level[tile.level].map.channels, tile.channel);
  const int64_t first = region * job.grad.max_channels + tile.channel;
  for_each_group(job.align, [&](const BinGroup& group) {
    read_pooled(first, channels, job.align, group, shared.bins,
                [&](int64_t at) { return load_any<A>(job.pooled, job.pooled_dtype, at); });
    __syncthreads();  // the place is known
    const AxisPlace &along_y = shared.place.y, &along_x = shared.place.x;
    for (int32_t task = threadIdx.x; task < (group.rows + group.columns) * kTile; task += kThreads) {
      const int32_t bin = task / kTile, pixel = task % kTile;
      const bool is_y = bin < group.rows;
      const double weight = is_y ? pixel_weight(along_y, group.y + bin, tile.y + pixel)
                                 : pixel_weight(along_x, group.x + bin - group.rows, tile.x + pixel);
      const int32_t row = is_y ? bin : kGroupBins + bin - group.rows;
      shared.weight[row * kTile + pixel] = static_cast<A>(weight);
    }
    __syncthreads();
    const int32_t quad = threadIdx.x % kQuads<A>;
#pragma unroll
    for (int n = 0; n < kOwnPixels<A>; ++n) {
      const int32_t pixel = threadIdx.x / kQuads<A> + n * (kThreads / kQuads<A>);
      for (int32_t i = 0; i < group.rows; ++i) {
        const A weight_y = shared.weight[i * kTile + pixel / kTile];
        if (weight_y == A(0)) continue;
        for (int32_t j = 0; j < group.columns; ++j) {
          const A weight = weight_y * shared.weight[(kGroupBins + j) * kTile + pixel % kTile];
          if (weight == A(0)) continue;
          const Four<A> bin =
              *reinterpret_cast<const Four<A>*>(shared.bins.four(bin_at<A>(i * group.columns + j, quad)));
#pragma unroll
          for (int k = 0; k < 4; ++k) own[n].at[k] += weight * bin.at[k];
        }
      }
    }
    __syncthreads();  // before the next group or region overwrites
  });
}

template <class A>
__global__ void __launch_bounds__(kThreads, TARDKD_BLOCKS(3))
    roi_align_gather_kernel(const __grid_constant__ GatherJob job) {
  SharedArena arena;
  GatherShared<A>& shared = *arena.rest<GatherShared<A>>();

  const Tile tile = tile_of(job.tiles, job.grad, kChunk<A>, GatherTile());
  const MapView& view = job.grad.level[tile.level];
  Four<A> own[kOwnPixels<A>] = {};
  for (int64_t begin = 0; begin < job.regions; begin += kThreads) {
    const int64_t region = begin + threadIdx.x;
    bool touches = false;
    if (region < job.regions) {
      const int32_t* window = job.windows + region;
      const int64_t next = job.regions;
      touches = window[next] == tile.level && window[0] == tile.image && window[2 * next] < tile.y + kTile &&
                window[3 * next] >= tile.y && window[4 * next] < tile.x + kTile && window[5 * next] >= tile.x;
    }
    int32_t all;
    const int32_t rank = block_rank(touches, shared.counts, all);
    if (touches) shared.found[rank] = threadIdx.x;
    __syncthreads();
    for (int32_t k = 0; k < all; ++k) gather_region(job, tile, begin + shared.found[k], shared, own);
    __syncthreads();
  }

  const int32_t quad = threadIdx.x % kQuads<A>, channel = tile.channel + 4 * quad;
#pragma unroll
  for (int n = 0; n < kOwnPixels<A>; ++n) {
    const int32_t pixel = threadIdx.x / kQuads<A> + n * (kThreads / kQuads<A>);
    const int32_t y = tile.y + pixel / kTile, x = tile.x + pixel % kTile;
    if (y >= view.map.height || x >= view.map.width) continue;
    const int64_t at = offset_in(view.map, tile.image, channel, y, x);
    with_stored<A>(job.grad.dtype, [&](auto stored) {
      using T = decltype(stored);
      T* data = static_cast<T*>(view.map.data) + at;
      if (!view.planar && view.vector && channel + 4 <= view.map.channels) {
        store_four(data, own[n]);
      } else {
#pragma unroll
        for (int k = 0; k < 4; ++k)
          if (channel + k < view.map.channels) data[k * view.map.stride_c] = Stored<T>::from(own[n].at[k]);
      }
    });
  }
}

template <class A>
Status launch_gather(GatherJob job, const Target& target) {
  job.tiles = tile_grid(job.grad, kChunk<A>, GatherTile());
  const Status status =
      launch_on(target, "roi_windows", roi_windows_kernel, (job.regions + kThreads - 1) / kThreads, 0, job);
  if (status.error) return status;
  return launch_on(target, "roi_align_gather", roi_align_gather_kernel<A>, job.tiles.first_block[job.grad.levels],
                   sizeof(GatherShared<A>), job);
}

}  // namespace

Status roi_align(const Pyramid& features, const Table& proposals, const GivenLevels& levels, int64_t regions,
                 void* pooled, const RoiAlignSpec& align, const Target& target) {
  if (features.dtype == DType::float64)
    return launch_by_region<double>("roi_align", roi_align_kernel<double>, features, proposals, levels, regions, pooled,
                                    features.dtype, align, target);
  return launch_by_region<float>("roi_align", roi_align_kernel<float>, features, proposals, levels, regions, pooled,
                                 features.dtype, align, target);
}

template <class A>
Status roi_align_scatter(const Pyramid& grad, const Table& proposals, const GivenLevels& levels, int64_t regions,
                         const void* grad_pooled, DType pooled_dtype, const RoiAlignSpec& align, const Target& target) {
  return launch_by_region<A>("roi_align_scatter", roi_align_scatter_kernel<A>, grad, proposals, levels, regions,
                             const_cast<void*>(grad_pooled), pooled_dtype, align, target);
}

template Status roi_align_scatter<float>(const Pyramid&, const Table&, const GivenLevels&, int64_t, const void*, DType,
                                         const RoiAlignSpec&, const Target&);
template Status roi_align_scatter<double>(const Pyramid&, const Table&, const GivenLevels&, int64_t, const void*, DType,
                                          const RoiAlignSpec&, const Target&);

Status roi_align_gather(const Pyramid& grad, const Table& proposals, const GivenLevels& levels, int64_t regions,
                        const bool* open, const void* grad_pooled, DType pooled_dtype, int32_t* windows,
                        const RoiAlignSpec& align, const Target& target) {
  GatherJob job{};
  job.grad = view_of(grad, level_choice(grad, levels));
  job.proposals = proposals;
  job.regions = regions;
  job.open = open;
  job.pooled = grad_pooled;
  job.pooled_dtype = pooled_dtype;
  job.windows = windows;
  job.align = align;
  return grad.dtype == DType::float64 ? launch_gather<double>(job, target) : launch_gather<float>(job, target);
}

}  // namespace tardkd::cuda
