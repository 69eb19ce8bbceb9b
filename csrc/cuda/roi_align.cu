// RoIAlign over a whole pyramid in one launch, and its gradient two ways: by atomics from the regions' side (scatter),
// or tile by tile from the map's side in a fixed order (gather), which is repeatable and needs no zeros beforehand.
#include "../core/box.h"
#include "kernels.h"
#include "pool.cuh"

namespace tardkd::cuda {
namespace {

__device__ inline bool read_region(const Table& proposals, int64_t region, int32_t images, double* box,
                                   int32_t& image) {
  double row[5];
#pragma unroll
  for (int k = 0; k < 5; ++k)
    row[k] =
        load_any<double>(proposals.data, proposals.dtype, region * proposals.stride_row + k * proposals.stride_column);
#pragma unroll
  for (int k = 0; k < 4; ++k) box[k] = row[k + 1];
  const bool valid = is_finite(box) && row[0] >= 0.0 && row[0] < images;
  image = valid ? int32_t(row[0]) : 0;
  return valid;
}

// ---- by region: forward, and scatter -------------------------------------------------------------------------------

template <class A>
struct AlignJob {
  PyramidView maps;  // features, or gradients of A
  Table proposals;
  int64_t regions;
  void* pooled;  // written, or read for the gradient
  DType pooled_dtype;
  RoiAlignSpec align;
  int32_t groups;  // blocks a region
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
  const int64_t region = blockIdx.x / job.groups;
  if (threadIdx.x == 0) {
    double box[4];
    found[0] = read_region(job.proposals, region, job.maps.images, box, found[1]);
    if (found[0]) shared.place[0] = place_region(job.maps, box, job.align);
    shared.tables[0].at[0] = -1;
  }
  __syncthreads();
  if (!found[0]) return false;
  for_each_chunk<A>(int32_t(blockIdx.x % job.groups), job.maps.channels, [&](int32_t channel) {
    for_each_group(job.align, [&](const BinGroup& group) { body(region, found[1], channel, group, shared); });
  });
  return true;
}

template <class A>
__global__ void __launch_bounds__(kThreads, TARDKD_BLOCKS(3))
    roi_align_kernel(const __grid_constant__ AlignJob<A> job) {
  const int32_t channels = job.maps.channels;
  const bool valid = for_region(
      job, [&](int64_t region, int32_t image, int32_t channel, const BinGroup& group, PoolShared<A>& shared) {
        const RegionPlace& place = shared.place[0];
        clear_bins(shared, group);
        pool(PoolSource{&job.maps.level[place.level], nullptr, job.maps.dtype, image, channels, channel}, place, group,
             shared, shared.tables[0], A(1));
        with_stored<A>(job.maps.dtype, [&](auto stored) {
          using T = decltype(stored);
          for_pooled(region, channels, channel, job.align, group, shared,
                     [&](int64_t at, A value) { static_cast<T*>(job.pooled)[at] = Stored<T>::from(value); });
        });
        __syncthreads();
      });
  if (valid) return;
  with_stored<A>(job.maps.dtype, [&](auto stored) {
    using T = decltype(stored);
    const int64_t region = blockIdx.x / job.groups, bins = int64_t(job.align.pooled_h) * job.align.pooled_w;
    for_each_chunk<A>(int32_t(blockIdx.x % job.groups), channels, [&](int32_t channel) {
      const int32_t left = channels - channel, count = left < kChunk<A> ? left : kChunk<A>;
      T* pooled = static_cast<T*>(job.pooled) + (region * channels + channel) * bins;
      for (int64_t k = threadIdx.x; k < count * bins; k += kThreads) pooled[k] = Stored<T>::from(A(0));
    });
  });
}

template <class A>
__global__ void __launch_bounds__(kThreads, TARDKD_BLOCKS(3))
    roi_align_scatter_kernel(const __grid_constant__ AlignJob<A> job) {
  for_region(job, [&](int64_t region, int32_t image, int32_t channel, const BinGroup& group, PoolShared<A>& shared) {
    clear_bins(shared, group);  // of channels that do not exist
    __syncthreads();
    for_pooled(region, job.maps.channels, channel, job.align, group, shared,
               [&](int64_t at, A& bin) { bin = load_any<A>(job.pooled, job.pooled_dtype, at); });
    __syncthreads();
    const RegionPlace& place = shared.place[0];
    scatter(job.maps.level[place.level], image, job.maps.channels, channel, place, group, shared, shared.tables[0]);
    __syncthreads();
  });
}

template <class A, class Kernel>
Status launch_by_region(const char* name, Kernel kernel, const Pyramid& maps, const Table& proposals, int64_t regions,
                        void* pooled, DType pooled_dtype, const RoiAlignSpec& align, const Target& target) {
  const DeviceGuard guard(target.device);
  if (guard.error() != cudaSuccess) return Status{guard.error(), name};
  if (!strides_fit(maps)) return Status{cudaErrorInvalidValue, name};
  const AlignJob<A> job{
      view_of(maps), proposals, regions, pooled, pooled_dtype, align, channel_groups<A>(maps.channels)};
  return Status{launch(kernel, dim3(unsigned(regions * job.groups)), kThreads, align_shared<A>(), target.stream, job),
                name};
}

// ---- by tile of the map: gather ------------------------------------------------------------------------------------

constexpr int kTile = 8;    // pixels a side
constexpr int kWindow = 6;  // integers a region: image, level (-1: none), first and last row, first and last column

template <class A>
constexpr int kOwnPixels = kTile * kTile * kQuads<A> / kThreads;

struct GatherJob {
  PyramidView maps;
  Table proposals;
  int64_t regions;
  const bool* open;
  const void* pooled;
  DType pooled_dtype;
  int32_t* windows;  // [kWindow][regions]
  RoiAlignSpec align;
  int64_t first_block[kMaxLevels + 1];  // of each level
  int32_t chunks;
};

// Which pixels of which map a region can touch.
__global__ void __launch_bounds__(kThreads) roi_windows_kernel(const __grid_constant__ GatherJob job) {
  const int64_t region = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (region >= job.regions) return;
  int32_t window[kWindow] = {0, -1, 0, -1, 0, -1};
  double box[4];
  if ((!job.open || job.open[3 * region]) && read_region(job.proposals, region, job.maps.images, box, window[0])) {
    const RegionPlace place = place_region(job.maps, box, job.align);
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
  SharedArray<A, kGroupCells * kChunk<A>> bins;   // [bin][channel]
  SharedArray<A, 2 * kGroupBins * kTile> weight;  // [axis][bin][pixel of the tile]
  SharedArray<int32_t, kThreads> found;           // regions that touch the tile, ascending
  SharedArray<int32_t, kThreads / kWarp> counts;  // of them, by warp
  RegionPlace place;
};

struct Tile {
  int32_t level, image, y, x, channel;
};

// Adds one region's part to the pixels this thread owns: a quad of channels of kOwnPixels pixels.
template <class A>
__device__ void gather_region(const GatherJob& job, const Tile& tile, int64_t region, GatherShared<A>& shared,
                              Four<A>* own) {
  if (threadIdx.x == 0) {
    double box[4];
    int32_t image;
    read_region(job.proposals, region, job.maps.images, box, image);
    shared.place = place_region(job.maps, box, job.align);
  }
  const int32_t left = job.maps.channels - tile.channel, channels = left < kChunk<A> ? left : kChunk<A>;
  const int64_t first = region * job.maps.channels + tile.channel;
  for_each_group(job.align, [&](const BinGroup& group) {
    for (int32_t task = threadIdx.x; task < kChunk<A> * group.bins(); task += kThreads) {
      const int32_t c = task / group.bins(), bin = task % group.bins();
      const int32_t i = group.y + bin / group.columns, j = group.x + bin % group.columns;
      shared.bins[bin_at<A>(bin, c / 4) + c % 4] =
          c < channels ? load_any<A>(job.pooled, job.pooled_dtype,
                                     ((first + c) * job.align.pooled_h + i) * job.align.pooled_w + j)
                       : A(0);
    }
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

  Tile tile;
  tile.level = 0;
  while (int64_t(blockIdx.x) >= job.first_block[tile.level + 1]) ++tile.level;
  const MapView& view = job.maps.level[tile.level];
  const int32_t tiles_x = (view.map.width + kTile - 1) / kTile, tiles_y = (view.map.height + kTile - 1) / kTile;
  int64_t rest = blockIdx.x - job.first_block[tile.level];
  tile.channel = int32_t(rest % job.chunks) * kChunk<A>;
  rest /= job.chunks;
  tile.x = int32_t(rest % tiles_x) * kTile;
  rest /= tiles_x;
  tile.y = int32_t(rest % tiles_y) * kTile;
  tile.image = int32_t(rest / tiles_y);

  Four<A> own[kOwnPixels<A>] = {};
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int64_t begin = 0; begin < job.regions; begin += kThreads) {
    const int64_t region = begin + threadIdx.x;
    bool touches = false;
    if (region < job.regions) {
      const int32_t* window = job.windows + region;
      const int64_t next = job.regions;
      touches = window[next] == tile.level && window[0] == tile.image && window[2 * next] < tile.y + kTile &&
                window[3 * next] >= tile.y && window[4 * next] < tile.x + kTile && window[5 * next] >= tile.x;
    }
    const unsigned votes = __ballot_sync(kAllLanes, touches);
    if (lane == 0) shared.counts[warp] = __popc(votes);
    __syncthreads();
    int32_t before = 0, all = 0;
    for (int w = 0; w < kThreads / kWarp; ++w) {
      if (w < warp) before += shared.counts[w];
      all += shared.counts[w];
    }
    if (touches) shared.found[before + __popc(votes & ((1u << lane) - 1u))] = threadIdx.x;
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
    const int64_t at =
        tile.image * view.map.stride_n + channel * view.map.stride_c + y * view.map.stride_h + x * view.map.stride_w;
    with_stored<A>(job.maps.dtype, [&](auto stored) {
      using T = decltype(stored);
      T* data = static_cast<T*>(view.map.data) + at;
      if (!view.planar && view.vector && channel + 4 <= job.maps.channels) {
        store_four(data, own[n]);
      } else {
#pragma unroll
        for (int k = 0; k < 4; ++k)
          if (channel + k < job.maps.channels) data[k * view.map.stride_c] = Stored<T>::from(own[n].at[k]);
      }
    });
  }
}

template <class A>
Status launch_gather(GatherJob job, const Target& target) {
  const DeviceGuard guard(target.device);
  if (guard.error() != cudaSuccess) return Status{guard.error(), "roi_align_gather"};
  job.chunks = (job.maps.channels + kChunk<A> - 1) / kChunk<A>;
  for (int32_t level = 0; level < job.maps.levels; ++level) {
    const FeatureMap& map = job.maps.level[level].map;
    const int64_t tiles = int64_t((map.height + kTile - 1) / kTile) * ((map.width + kTile - 1) / kTile);
    job.first_block[level + 1] = job.first_block[level] + tiles * job.maps.images * job.chunks;
  }
  const int64_t windows = (job.regions + kThreads - 1) / kThreads, blocks = job.first_block[job.maps.levels];
  const cudaError_t error = launch(roi_windows_kernel, dim3(unsigned(windows)), kThreads, 0, target.stream, job);
  if (error != cudaSuccess) return Status{error, "roi_windows"};
  return Status{
      launch(roi_align_gather_kernel<A>, dim3(unsigned(blocks)), kThreads, sizeof(GatherShared<A>), target.stream, job),
      "roi_align_gather"};
}

}  // namespace

Status roi_align(const Pyramid& features, const Table& proposals, int64_t regions, void* pooled,
                 const RoiAlignSpec& align, const Target& target) {
  if (features.dtype == DType::float64)
    return launch_by_region<double>("roi_align", roi_align_kernel<double>, features, proposals, regions, pooled,
                                    features.dtype, align, target);
  return launch_by_region<float>("roi_align", roi_align_kernel<float>, features, proposals, regions, pooled,
                                 features.dtype, align, target);
}

template <class A>
Status roi_align_scatter(const Pyramid& grad, const Table& proposals, int64_t regions, const void* grad_pooled,
                         DType pooled_dtype, const RoiAlignSpec& align, const Target& target) {
  return launch_by_region<A>("roi_align_scatter", roi_align_scatter_kernel<A>, grad, proposals, regions,
                             const_cast<void*>(grad_pooled), pooled_dtype, align, target);
}

template Status roi_align_scatter<float>(const Pyramid&, const Table&, int64_t, const void*, DType, const RoiAlignSpec&,
                                         const Target&);
template Status roi_align_scatter<double>(const Pyramid&, const Table&, int64_t, const void*, DType,
                                          const RoiAlignSpec&, const Target&);

Status roi_align_gather(const Pyramid& grad, const Table& proposals, int64_t regions, const bool* open,
                        const void* grad_pooled, DType pooled_dtype, int32_t* windows, const RoiAlignSpec& align,
                        const Target& target) {
  GatherJob job{};
  job.maps = view_of(grad);
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
