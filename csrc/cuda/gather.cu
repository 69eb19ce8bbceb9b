// The gradient of RoIAlign from the map's side, in two launches: the first finds for each region which pixels it
// touches and what they weigh, the second adds up, for the pixels of a map, what the regions have for them. Nothing is
// atomic, and the order of the additions depends on the regions alone: the result is the same bits again, needs no
// zeros beforehand, and can have any dtype, as it is rounded once.
#include "kernels.h"
#include "pool.cuh"
#include "tiles.cuh"

namespace tardkd::cuda {
namespace {

// A warp has a patch of pixels and a chunk of channels, a block as many patches as make a tile. A thread has the rows
// of one of the patch's columns, of kOwnQuads quads of channels: eight columns of one channel are whole sectors of
// planar memory, four quads of one pixel whole ones of any other.
constexpr int kPatchRows = 4, kPatchColumns = 8, kLaneQuads = kWarp / kPatchColumns;
constexpr int kTileWidth = 2 * kPatchColumns, kTileHeight = kThreads / kWarp / 2 * kPatchRows;
constexpr int kAtOnce = kWarp * 32;  // regions that are looked at together: a bit each, a word a lane
template <class A>
constexpr int kOwnQuads = kQuads<A> / kLaneQuads;

struct GatherTile {
  __host__ __device__ TileSize operator()(const MapView&) const { return TileSize{kTileWidth, kTileHeight}; }
};

// The pixels that a region can touch.
struct alignas(16) Window {
  int32_t map;  // see map_number; -1: none
  int32_t y, y_end, x, x_end;

  static __device__ __forceinline__ Window read_from(const Window* from) {
#ifdef TARDKD_CUDA_ON_CPU
    return *from;
#else
    const int4 first = __ldg(reinterpret_cast<const int4*>(from));
    return Window{first.x, first.y, first.z, first.w, __ldg(&from->x_end)};
#endif
  }
};

__device__ __forceinline__ Range read_range(const Range* from) {
#ifdef TARDKD_CUDA_ON_CPU
  return *from;
#else
  const int2 range = __ldg(reinterpret_cast<const int2*>(from));
  return Range{range.x, range.y};
#endif
}

__host__ __device__ inline int32_t map_number(int32_t image, int32_t level) { return image * kMaxLevels + level; }

__host__ __device__ inline int32_t round_up(int32_t value, int32_t to) { return (value + to - 1) / to * to; }

// What the first launch finds out about an axis: of each region what its pixels weigh in each bin, and the bins
// [begin, end) that read any of the `together` pixels of a group. Pixels are counted from the window's first one, or
// from the multiple of `multiple` before it, which a patch begins with.
template <class A>
struct AxisPlan {
  A* weights;     // (R, bins, extent)
  Range* ranges;  // (R, extent / together)
  int32_t bins, extent, together, groups, multiple;

  __device__ __forceinline__ A* weights_of(int32_t region) const { return weights + int64_t(region) * (bins * extent); }
  __device__ __forceinline__ Range* ranges_of(int32_t region) const { return ranges + int64_t(region) * groups; }
  __device__ __forceinline__ int32_t first(int32_t begin) const { return begin & -multiple; }
};

template <class A>
struct GatherPlan {
  Window* windows;  // (R,)
  AxisPlan<A> y, x;
};

template <class A>
struct GatherJob {
  PyramidView grad;
  Table proposals;  // (R, 5)
  int32_t regions;
  const bool* open;  // (R, 3), or null
  PooledGradient<A> pooled;
  const A* factor;  // of the whole gradient, one element; null: 1
  bool add;
  GatherPlan<A> plan;
  RoiAlignSpec align;
  TileGrid tiles;  // by chunks of channels

  // Of a region and chunk: (bins, kChunk).
  __device__ __forceinline__ A* bins_of(int32_t region, int32_t chunk) const {
    return pooled.packed + packed_at<A>(region, chunk, grad.max_channels, align);
  }
};

// ---- plan ----------------------------------------------------------------------------------------------------------

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

// The pixels of an axis that a region can touch.
__device__ inline void touched(const AxisPlace& axis, int32_t bins, int32_t& begin, int32_t& end) {
  const double far = axis.roi.start + bins * axis.roi.bin, last = axis.roi.size - 1.0;
  begin = int32_t(fmin(fmax(floor(fmin(axis.roi.start, far)), 0.0), last));
  end = int32_t(fmin(fmax(floor(fmax(axis.roi.start, far)) + 1.0, 0.0), last)) + 1;
}

// By all threads.
template <class A>
__device__ void plan_axis(const AxisPlan<A>& plan, int32_t region, const AxisPlace& axis, int32_t begin, int32_t end) {
  const int32_t first = plan.first(begin), pixels = round_up(end - first, plan.multiple);
  A* weights = plan.weights_of(region);
  for (int32_t entry = threadIdx.x; entry < plan.bins * pixels; entry += kThreads) {
    const int32_t bin = entry / pixels, pixel = entry % pixels;
    weights[bin * plan.extent + pixel] =
        first + pixel < axis.roi.size ? static_cast<A>(pixel_weight(axis, bin, first + pixel)) : A(0);
  }
  __syncthreads();
  for (int32_t group = threadIdx.x; group < pixels / plan.together; group += kThreads) {
    Range range{plan.bins, 0};
    for (int32_t bin = 0; bin < plan.bins; ++bin)
      for (int32_t k = 0; k < plan.together; ++k)
        if (weights[bin * plan.extent + group * plan.together + k] != A(0)) {
          range.begin = bin < range.begin ? bin : range.begin;
          range.end = bin + 1;
        }
    plan.ranges_of(region)[group] = range;
  }
}

template <class A>
struct alignas(16) PlanShared {
  Bins<A> bins;
  RegionPlace place;
  Window window;
};

// A block is a region.
template <class A>
__global__ void __launch_bounds__(kThreads, TARDKD_BLOCKS(3))
    roi_plan_kernel(const __grid_constant__ GatherJob<A> job) {
  SharedArena arena;
  PlanShared<A>& shared = *arena.rest<PlanShared<A>>();
  const int32_t region = int32_t(blockIdx.x);
  if (threadIdx.x == 0) {
    Window window{-1, 0, 0, 0, 0};
    double box[4];
    int32_t image;
    if ((!job.open || job.open[3 * region]) && read_region(job.proposals, job.grad, region, box, image)) {
      shared.place = place_region(job.grad, region, box, job.align);
      window.map = map_number(image, shared.place.level);
      touched(shared.place.y, job.align.pooled_h, window.y, window.y_end);
      touched(shared.place.x, job.align.pooled_w, window.x, window.x_end);
    }
    job.plan.windows[region] = window;
    shared.window = window;
  }
  __syncthreads();
  if (shared.window.map < 0) return;
  plan_axis(job.plan.y, region, shared.place.y, shared.window.y, shared.window.y_end);
  plan_axis(job.plan.x, region, shared.place.x, shared.window.x, shared.window.x_end);
  if (!job.pooled.loose) return;

  const int32_t channels = job.grad.level[shared.place.level].map.channels;
  for (int32_t chunk = 0; chunk * kChunk<A> < channels; ++chunk)
    for_each_group(job.align, [&](const BinGroup& group) {
      const int32_t channel = chunk * kChunk<A>;
      read_pooled(int64_t(region) * job.grad.max_channels + channel, chunk_channels<A>(channels, channel), job.align,
                  group, shared.bins, [&](int64_t at) { return load_any<A>(job.pooled.loose, job.pooled.dtype, at); });
      __syncthreads();
      A* to = job.bins_of(region, chunk);
      for_own_bins(shared.bins, group, [&](int32_t bin, int32_t quad, const Four<A>& values) {
        store_four(to + group.bin_of(bin, job.align) * kChunk<A> + 4 * quad, values);
      });
      __syncthreads();
    });
}

// ---- gather --------------------------------------------------------------------------------------------------------

struct GatherShared {
  SharedArray<uint32_t, kAtOnce / 32> touches;  // a bit a region: whether it touches the tile
};

// A thread's part of a patch.
template <class A>
struct Patch {
  int32_t y, x, quad;  // the first row, the thread's own column, the first of its quads of channels
  Four<A> sum[kPatchRows][kOwnQuads<A>];
};

// Adds what a region, whose window meets the patch, has for it.
template <class A>
__device__ __forceinline__ void add_region(const GatherJob<A>& job, int32_t region, const Window& window, int32_t chunk,
                                           Patch<A>& patch) {
  const AxisPlan<A>&plan_y = job.plan.y, &plan_x = job.plan.x;
  const int32_t y = patch.y - plan_y.first(window.y), x = patch.x - plan_x.first(window.x);
  const Range along_y = read_range(plan_y.ranges_of(region) + y / kPatchRows);
  const Range along_x = read_range(plan_x.ranges_of(region) + x);
  const A* weights_y = plan_y.weights_of(region) + y;
  const A* weights_x = plan_x.weights_of(region) + x;
  const A* bins = job.bins_of(region, chunk) + 4 * patch.quad;
#pragma unroll 1
  for (int32_t i = along_y.begin; i < along_y.end; ++i) {
    const Four<A> weight_y = read_four(weights_y + i * plan_y.extent);
    const int32_t row_of_bins = i * job.align.pooled_w;
#pragma unroll 1
    for (int32_t j = along_x.begin; j < along_x.end; ++j) {
      const A across = read(weights_x + j * plan_x.extent);
      const A* bin = bins + (row_of_bins + j) * kChunk<A>;
      Four<A> values[kOwnQuads<A>];
#pragma unroll
      for (int q = 0; q < kOwnQuads<A>; ++q) values[q] = read_four(bin + 4 * kLaneQuads * q);
#pragma unroll
      for (int row = 0; row < kPatchRows; ++row) {
        if (weight_y.at[row] == A(0)) continue;  // the bin does not read the row, and may be infinite
        const A weight = across * weight_y.at[row];
#pragma unroll
        for (int q = 0; q < kOwnQuads<A>; ++q)
#pragma unroll
          for (int k = 0; k < 4; ++k) patch.sum[row][q].at[k] += weight * values[q].at[k];
      }
    }
  }
}

// Calls f(where it lies, the value) for the elements of the patch that the map has, of which `data` is the first.
template <class A, class T, class F>
__device__ __forceinline__ void for_each_element(Patch<A>& patch, T* data, const MapView& view, int32_t channels,
                                                 int32_t rows, const F& f) {
#pragma unroll
  for (int channel = 0; channel < 4 * kOwnQuads<A>; ++channel) {
    const int32_t offset = channel / 4 * 4 * kLaneQuads + channel % 4;
    if (offset >= channels) continue;
    T* at = advance(data, offset, view.stride_c);
#pragma unroll
    for (int row = 0; row < kPatchRows; ++row, at += view.stride_h)
      if (row < rows) f(at, patch.sum[row][channel / 4].at[channel % 4]);
  }
}

// Writes the patch, or adds it to what is there.
template <class A>
__device__ __forceinline__ void write_patch(const GatherJob<A>& job, const Tile& tile, Patch<A>& patch) {
  const MapView& view = job.grad.level[tile.level];
  const int32_t channel = tile.channel + 4 * patch.quad;
  if (patch.x >= view.map.width) return;
  const int32_t rows = view.map.height - patch.y, channels = view.map.channels - channel;
  const A factor = job.factor ? read(job.factor) : A(1);
  with_stored<A>(job.grad.dtype, [&](auto stored) {
    using T = decltype(stored);
    T* data = static_cast<T*>(view.map.data) + offset_in(view.map, tile.image, channel, patch.y, patch.x);
#pragma unroll
    for (int row = 0; row < kPatchRows; ++row)
#pragma unroll
      for (int q = 0; q < kOwnQuads<A>; ++q)
#pragma unroll
        for (int k = 0; k < 4; ++k) patch.sum[row][q].at[k] *= factor;
    if (job.add)
      for_each_element(patch, data, view, channels, rows, [](const T* at, A& value) { value += as<A>(*at); });
    if (view.planar || !view.vector || channels < 4 * kLaneQuads * (kOwnQuads<A> - 1) + 4) {
      for_each_element(patch, data, view, channels, rows, [](T* at, A value) { *at = Stored<T>::from(value); });
      return;
    }
#pragma unroll
    for (int row = 0; row < kPatchRows; ++row, data += view.stride_h)
      if (row < rows) {
#pragma unroll
        for (int q = 0; q < kOwnQuads<A>; ++q) store_four(data + 4 * kLaneQuads * q, patch.sum[row][q]);
      }
  });
}

template <class A>
__global__ void __launch_bounds__(kThreads, sizeof(A) == 4 ? TARDKD_BLOCKS(3) : 2)
    roi_align_gather_kernel(const __grid_constant__ GatherJob<A> job) {
  SharedArena arena;
  GatherShared& shared = *arena.rest<GatherShared>();
  const int32_t warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const Tile tile = tile_of(job.tiles, job.grad, kChunk<A>, GatherTile());
  const int32_t map = map_number(tile.image, tile.level);
  Patch<A> patch{};
  patch.y = tile.y + warp / 2 * kPatchRows;
  patch.x = tile.x + warp % 2 * kPatchColumns + lane / kLaneQuads;
  patch.quad = lane % kLaneQuads;
  bool any = false;

#pragma unroll 1
  for (int32_t begin = 0; begin < job.regions; begin += kAtOnce) {
    const int32_t count = job.regions - begin < kAtOnce ? job.regions - begin : kAtOnce;
#pragma unroll 1
    for (int32_t word = warp; word < kAtOnce / 32; word += kThreads / kWarp) {
      bool touches = false;
      if (32 * word + lane < count) {
        const Window window = Window::read_from(job.plan.windows + begin + 32 * word + lane);
        touches = window.map == map && window.y < tile.y + kTileHeight && window.y_end > tile.y &&
                  window.x < tile.x + kTileWidth && window.x_end > tile.x;
      }
      const uint32_t votes = __ballot_sync(kAllLanes, touches);
      if (lane == 0) shared.touches[word] = votes;
    }
    __syncthreads();
    const uint32_t own = shared.touches[lane];
    for (uint32_t words = __ballot_sync(kAllLanes, own != 0); words; words &= words - 1) {
      const int32_t word = __ffs(int(words)) - 1;
      for (uint32_t bits = __shfl_sync(kAllLanes, own, word); bits; bits &= bits - 1) {
        const int32_t region = begin + 32 * word + __ffs(int(bits)) - 1;
        const Window window = Window::read_from(job.plan.windows + region);
        const int32_t x = patch.x & -kPatchColumns;
        if (window.y >= patch.y + kPatchRows || window.y_end <= patch.y || window.x >= x + kPatchColumns ||
            window.x_end <= x)
          continue;
        any = true;
        add_region(job, region, window, tile.channel / kChunk<A>, patch);
      }
    }
    __syncthreads();  // before the next regions overwrite
  }
  if (any || !job.add) write_patch(job, tile, patch);
}

// ---- launching -----------------------------------------------------------------------------------------------------

// Elements of A that the plan takes, and where its parts lie in memory of that many that begins at `at`.
template <class A>
int64_t lay_out(const Pyramid& grad, int64_t regions, const RoiAlignSpec& align, A* at, GatherPlan<A>& plan) {
  int64_t count = 0;
  const auto take = [&](int64_t bytes) {
    void* const part = at ? at + count : nullptr;
    count += (bytes + 15) / 16 * 16 / int64_t(sizeof(A));
    return part;
  };
  int32_t height = 0, width = 0;
  for (int32_t level = 0; level < grad.levels; ++level) {
    height = grad.level[level].height > height ? grad.level[level].height : height;
    width = grad.level[level].width > width ? grad.level[level].width : width;
  }
  plan.windows = static_cast<Window*>(take(regions * int64_t(sizeof(Window))));
  const auto axis = [&](int32_t bins, int32_t size, int32_t together, int32_t multiple) {
    const int32_t extent = round_up(size, multiple);
    A* weights = static_cast<A*>(take(regions * bins * extent * int64_t(sizeof(A))));
    Range* ranges = static_cast<Range*>(take(regions * (extent / together) * int64_t(sizeof(Range))));
    return AxisPlan<A>{weights, ranges, bins, extent, together, extent / together, multiple};
  };
  plan.y = axis(align.pooled_h, height, kPatchRows, kPatchRows);
  plan.x = axis(align.pooled_w, width, 1, kPatchColumns);
  return count;
}

}  // namespace

template <class A>
int64_t gather_plan(const Pyramid& grad, int64_t regions, const RoiAlignSpec& align) {
  GatherPlan<A> plan;
  return lay_out<A>(grad, regions, align, nullptr, plan);
}

template <class A>
Status roi_align_gather(const Pyramid& grad, bool add, const Table& proposals, const GivenLevels& levels,
                        int64_t regions, const bool* open, const PooledGradient<A>& pooled, const A* factor, A* plan,
                        const RoiAlignSpec& align, const Target& target) {
  if (!strides_fit(grad) || regions > 0x7fffffff - kAtOnce) return Status{cudaErrorInvalidValue, "roi_align_gather"};
  GatherJob<A> job{};
  job.grad = view_of(grad, level_choice(grad, levels));
  job.proposals = proposals;
  job.regions = int32_t(regions);
  job.open = open;
  job.pooled = pooled;
  job.factor = factor;
  job.add = add;
  lay_out(grad, regions, align, plan, job.plan);
  job.align = align;
  job.tiles = tile_grid(job.grad, kChunk<A>, GatherTile());
  const Status status = launch_on(target, "roi_plan", roi_plan_kernel<A>, regions, sizeof(PlanShared<A>), job);
  if (status.error) return status;
  return launch_on(target, "roi_align_gather", roi_align_gather_kernel<A>, job.tiles.first_block[job.grad.levels],
                   sizeof(GatherShared), job);
}

#define TARDKD_INSTANTIATE(A)                                                                                       \
  template int64_t gather_plan<A>(const Pyramid&, int64_t, const RoiAlignSpec&);                                    \
  template Status roi_align_gather<A>(const Pyramid&, bool, const Table&, const GivenLevels&, int64_t, const bool*, \
                                      const PooledGradient<A>&, const A*, A*, const RoiAlignSpec&, const Target&)
TARDKD_INSTANTIATE(float);
TARDKD_INSTANTIATE(double);

}  // namespace tardkd::cuda
