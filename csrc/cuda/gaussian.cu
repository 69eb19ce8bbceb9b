// Gaussian-mask loss over whole pyramids, one pass over the features, and its gradient, another.
//
// A block is a tile of one map and a group of channels. It makes the tile's mask in shared memory from the boxes that
// meet it, one exponential a box, row and column, and reads features only where the mask is not zero.
#include "kernels.h"
#include "../core/box.h"
#include "maps.cuh"

namespace tardkd::cuda {
namespace {

constexpr int kTileWidth = 32, kTileHeight = 8;  // pixels; one a thread
constexpr int kGroup = 64;                       // channels a block
constexpr int kBoxes = 32;                       // boxes whose Gaussians are held at a time
static_assert(kTileWidth * kTileHeight == kThreads, "a thread makes the mask of one pixel");

struct GaussianJob {
  PyramidView student, teacher, grad;
  Table boxes;
  int64_t count;
  double sigma_squared;
  int64_t first_block[kMaxLevels + 1];  // of each level
  int32_t groups;                       // of channels
};

template <class A>
struct alignas(16) TileShared {
  SharedArray<A, kThreads> mask;
  SharedArray<A, kBoxes * kTileWidth> along_x;
  SharedArray<A, kBoxes * kTileHeight> along_y;
  SharedArray<int32_t, kThreads> found;  // boxes that meet the tile
  SharedArray<int32_t, kThreads / kWarp> counts;
};

struct Tile {
  int32_t level, image, y, x, channel;
};

__device__ inline Tile tile_of(const GaussianJob& job, int64_t block) {
  Tile tile;
  tile.level = 0;
  while (block >= job.first_block[tile.level + 1]) ++tile.level;
  const FeatureMap& map = job.student.level[tile.level].map;
  const int32_t columns = (map.width + kTileWidth - 1) / kTileWidth;
  const int32_t rows = (map.height + kTileHeight - 1) / kTileHeight;
  int64_t rest = block - job.first_block[tile.level];
  tile.channel = int32_t(rest % job.groups) * kGroup;
  rest /= job.groups;
  tile.x = int32_t(rest % columns) * kTileWidth;
  rest /= columns;
  tile.y = int32_t(rest % rows) * kTileHeight;
  tile.image = int32_t(rest / rows);
  return tile;
}

// A box in the map's pixels; false if it lies on another image, has no area or is not finite.
__device__ inline bool read_box(const GaussianJob& job, int64_t index, const Tile& tile, double* box) {
  double row[5];
#pragma unroll
  for (int k = 0; k < 5; ++k)
    row[k] = load_any<double>(job.boxes.data, job.boxes.dtype,
                              index * job.boxes.stride_row + k * job.boxes.stride_column);
  if (!(row[0] >= tile.image && row[0] < tile.image + 1.0)) return false;
  if (!is_finite(row + 1) || !(row[3] > row[1]) || !(row[4] > row[2])) return false;
#pragma unroll
  for (int k = 0; k < 4; ++k) box[k] = row[k + 1] * job.student.level[tile.level].map.scale;
  return true;
}

// The tile's mask, each thread its pixel; returns whether any of it is not zero. All threads; ends with a barrier.
template <class A>
__device__ bool make_mask(const GaussianJob& job, const Tile& tile, TileShared<A>& shared) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const FeatureMap& map = job.student.level[tile.level].map;
  const int32_t y = threadIdx.x / kTileWidth, x = threadIdx.x % kTileWidth;
  const bool on_map = tile.y + y < map.height && tile.x + x < map.width;
  A mask = A(0);
  for (int64_t begin = 0; begin < job.count; begin += kThreads) {
    double box[4];
    const bool meets = begin + threadIdx.x < job.count && read_box(job, begin + threadIdx.x, tile, box) &&
                       box[0] <= tile.x + kTileWidth - 1 && box[2] >= tile.x && box[1] <= tile.y + kTileHeight - 1 &&
                       box[3] >= tile.y;
    const unsigned votes = __ballot_sync(kAllLanes, meets);
    if (lane == 0) shared.counts[warp] = __popc(votes);
    __syncthreads();
    int32_t before = 0, found = 0;
    for (int w = 0; w < kThreads / kWarp; ++w) {
      if (w < warp) before += shared.counts[w];
      found += shared.counts[w];
    }
    if (meets) shared.found[before + __popc(votes & ((1u << lane) - 1u))] = threadIdx.x;
    __syncthreads();
    for (int32_t first = 0; first < found; first += kBoxes) {
      const int32_t boxes = found - first < kBoxes ? found - first : kBoxes;
      for (int32_t task = threadIdx.x; task < boxes * (kTileWidth + kTileHeight); task += kThreads) {
        const int32_t b = task / (kTileWidth + kTileHeight), at = task % (kTileWidth + kTileHeight);
        read_box(job, begin + shared.found[first + b], tile, box);
        const bool is_x = at < kTileWidth;
        const double value = is_x ? axis_gaussian(tile.x + at, box[0], box[2], job.sigma_squared)
                                  : axis_gaussian(tile.y + at - kTileWidth, box[1], box[3], job.sigma_squared);
        if (is_x)
          shared.along_x[b * kTileWidth + at] = static_cast<A>(value);
        else
          shared.along_y[b * kTileHeight + at - kTileWidth] = static_cast<A>(value);
      }
      __syncthreads();
      for (int32_t b = 0; b < boxes; ++b) {
        const A value = shared.along_y[b * kTileHeight + y] * shared.along_x[b * kTileWidth + x];
        mask = value > mask ? value : mask;
      }
      __syncthreads();
    }
  }
  mask = on_map ? mask : A(0);
  shared.mask[threadIdx.x] = mask;
  const unsigned votes = __ballot_sync(kAllLanes, mask > A(0));
  if (lane == 0) shared.counts[warp] = votes != 0;
  __syncthreads();
  bool any = false;
  for (int w = 0; w < kThreads / kWarp; ++w) any = any || shared.counts[w] != 0;
  return any;
}

// Calls body(pixel of the tile, channel of the group, number, along the row?) for runs of up to four neighbours, so
// that a warp walks through memory in order: pixels of a row where the map is planar, else channels.
template <class Body>
__device__ __forceinline__ void for_each_run(const GaussianJob& job, const Tile& tile, bool planar, const Body& body) {
  const FeatureMap& map = job.student.level[tile.level].map;
  const int32_t left = job.student.channels - tile.channel, channels = left < kGroup ? left : kGroup;
  if (planar) {
    constexpr int kRuns = kThreads / 4;  // of the tile
    const int32_t pixel = threadIdx.x % kRuns * 4, y = tile.y + pixel / kTileWidth, x = tile.x + pixel % kTileWidth;
    const int32_t number = map.width - x < 4 ? map.width - x : 4;
    if (y >= map.height || number <= 0) return;
    for (int32_t channel = threadIdx.x / kRuns; channel < channels; channel += kThreads / kRuns)
      body(pixel, channel, number, true);
  } else {
    constexpr int kRuns = kGroup / 4;  // of the group
    const int32_t channel = threadIdx.x % kRuns * 4;
    const int32_t number = channels - channel < 4 ? channels - channel : 4;
    if (number <= 0) return;
    for (int32_t pixel = threadIdx.x / kRuns; pixel < kThreads; pixel += kThreads / kRuns)
      if (tile.y + pixel / kTileWidth < map.height && tile.x + pixel % kTileWidth < map.width)
        body(pixel, channel, number, false);
  }
}

// Where a run begins in a map, and the step between its elements.
struct Run {
  int64_t at, step;
  bool vector;
};

__device__ __forceinline__ Run run_at(const MapView& view, const Tile& tile, int32_t pixel, int32_t channel,
                                      int32_t number, bool along_row) {
  const FeatureMap& map = view.map;
  return Run{tile.image * map.stride_n + (tile.channel + channel) * map.stride_c +
                 (tile.y + pixel / kTileWidth) * map.stride_h + (tile.x + pixel % kTileWidth) * map.stride_w,
             along_row ? map.stride_w : map.stride_c, view.vector && view.planar == along_row && number == 4};
}

template <class A>
__device__ __forceinline__ Four<A> load_run(const MapView& view, DType dtype, const Run& run, int32_t number) {
  Four<A> values{};
  with_stored<A>(dtype, [&](auto stored) {
    const auto* from = static_cast<const decltype(stored)*>(view.map.data) + run.at;
    if (run.vector) {
      values = load_four<A>(from);
    } else {
#pragma unroll
      for (int k = 0; k < 4; ++k)
        if (k < number) values.at[k] = as<A>(from[k * run.step]);
    }
  });
  return values;
}

// Student less teacher, and the mask, of one run.
template <class A>
struct Masked {
  Four<A> difference, mask;
  bool open;
};

template <class A>
__device__ __forceinline__ Masked<A> load_masked(const GaussianJob& job, const Tile& tile, TileShared<A>& shared,
                                                 int32_t pixel, int32_t channel, int32_t number, bool along_row) {
  Masked<A> run{};
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    run.mask.at[k] = shared.mask[along_row ? pixel + k : pixel];
    run.open = run.open || run.mask.at[k] > A(0);
  }
  if (!run.open) return run;
  const MapView &student = job.student.level[tile.level], &teacher = job.teacher.level[tile.level];
  const Run from = run_at(student, tile, pixel, channel, number, along_row);
  const Run other = run_at(teacher, tile, pixel, channel, number, along_row);
  const Four<A> s = load_run<A>(student, job.student.dtype, from, number);
  const Four<A> t = load_run<A>(teacher, job.teacher.dtype, other, number);
#pragma unroll
  for (int k = 0; k < 4; ++k)  // where the mask is zero the features are not looked at: they may be NaN
    run.difference.at[k] = run.mask.at[k] > A(0) ? s.at[k] - t.at[k] : A(0);
  return run;
}

template <class A>
__global__ void __launch_bounds__(kThreads, 4) gaussian_loss_kernel(const __grid_constant__ GaussianJob job,
                                                                 double* partial, int32_t* done, double* mask_sums,
                                                                 A* loss) {
  SharedArena arena;
  const Shared<double> sums = arena.take<double>(kThreads / kWarp);
  const Shared<int32_t> flag = arena.take<int32_t>(1);
  TileShared<A>& shared = *arena.rest<TileShared<A>>();

  const int64_t blocks = job.first_block[job.student.levels];
  if (blockIdx.x < blocks) {
    const Tile tile = tile_of(job, blockIdx.x);
    A sum = A(0), mask = A(0);
    if (make_mask(job, tile, shared)) {
      for_each_run(job, tile, job.student.level[tile.level].planar,
                   [&](int32_t pixel, int32_t channel, int32_t number, bool along_row) {
                     const Masked<A> run = load_masked(job, tile, shared, pixel, channel, number, along_row);
#pragma unroll
                     for (int k = 0; k < 4; ++k) sum += run.mask.at[k] * run.difference.at[k] * run.difference.at[k];
                   });
      if (tile.channel == 0) mask = shared.mask[threadIdx.x];
    }
    const double loss_sum = block_sum(double(sum), sums), mask_sum = block_sum(double(mask), sums);
    if (threadIdx.x == 0) {
      partial[blockIdx.x] = loss_sum;
      partial[blocks + blockIdx.x] = mask_sum;
    }
  }
  if (!last_block(done, int32_t(gridDim.x), flag)) return;
  double total = 0.0;
  for (int32_t level = 0; level < job.student.levels; ++level) {
    double loss_sum = 0.0, mask_sum = 0.0;
    for (int64_t block = job.first_block[level] + threadIdx.x; block < job.first_block[level + 1]; block += kThreads) {
      loss_sum += load_fresh(&partial[block]);
      mask_sum += load_fresh(&partial[blocks + block]);
    }
    loss_sum = block_sum(loss_sum, sums);
    mask_sum = block_sum(mask_sum, sums);
    if (threadIdx.x == 0) mask_sums[level] = mask_sum;
    total += loss_sum / (2.0 * (mask_sum > 1.0 ? mask_sum : 1.0));
  }
  if (threadIdx.x == 0) *loss = static_cast<A>(total / job.student.levels);
}

template <class A>
__global__ void __launch_bounds__(kThreads, 4) gaussian_gradient_kernel(const __grid_constant__ GaussianJob job,
                                                                     const double* mask_sums, const A* upstream) {
  SharedArena arena;
  TileShared<A>& shared = *arena.rest<TileShared<A>>();
  const Tile tile = tile_of(job, blockIdx.x);
  const double mask_sum = mask_sums[tile.level];
  const A slope = static_cast<A>(*upstream / ((mask_sum > 1.0 ? mask_sum : 1.0) * job.student.levels));
  make_mask(job, tile, shared);
  const MapView& grad = job.grad.level[tile.level];
  for_each_run(job, tile, grad.planar, [&](int32_t pixel, int32_t channel, int32_t number, bool along_row) {
    const Masked<A> loaded = load_masked(job, tile, shared, pixel, channel, number, along_row);
    Four<A> values;
#pragma unroll
    for (int k = 0; k < 4; ++k) values.at[k] = loaded.open ? slope * loaded.mask.at[k] * loaded.difference.at[k] : A(0);
    const Run run = run_at(grad, tile, pixel, channel, number, along_row);
    with_stored<A>(job.grad.dtype, [&](auto stored) {
      using T = decltype(stored);
      T* to = static_cast<T*>(grad.map.data) + run.at;
      if (run.vector) {
        store_four(to, values);
      } else {
#pragma unroll
        for (int k = 0; k < 4; ++k)
          if (k < number) to[k * run.step] = Stored<T>::from(values.at[k]);
      }
    });
  });
}

int32_t channel_groups(int32_t channels) { return (channels + kGroup - 1) / kGroup; }

GaussianJob make_job(const Pyramid& student, const Pyramid& teacher, const Table& boxes, int64_t count,
                     double sigma_squared) {
  GaussianJob job{};
  job.student = view_of(student);
  job.teacher = view_of(teacher);
  job.boxes = boxes;
  job.count = count;
  job.sigma_squared = sigma_squared;
  job.groups = channel_groups(student.channels);
  for (int32_t level = 0; level < student.levels; ++level) {
    const FeatureMap& map = student.level[level];
    const int64_t columns = (map.width + kTileWidth - 1) / kTileWidth;
    const int64_t rows = (map.height + kTileHeight - 1) / kTileHeight;
    job.first_block[level + 1] = job.first_block[level] + columns * rows * student.images * job.groups;
  }
  return job;
}

}  // namespace

int64_t gaussian_partials(const Pyramid& student) {
  return 2 * make_job(student, student, Table{}, 0, 1.0).first_block[student.levels];
}

template <class A>
Status gaussian_feature_loss(const Pyramid& student, const Pyramid& teacher, const Table& boxes, int64_t count,
                             double sigma_squared, double* partial, int32_t* done, double* mask_sums, A* loss,
                             const Target& target) {
  const DeviceGuard guard(target.device);
  if (guard.error() != cudaSuccess) return Status{guard.error(), "gaussian_feature_loss"};
  const GaussianJob job = make_job(student, teacher, boxes, count, sigma_squared);
  const int64_t blocks = job.first_block[student.levels];
  const size_t shared = shared_bytes<double>(kThreads / kWarp) + shared_bytes<int32_t>(1) + sizeof(TileShared<A>);
  // Without pixels one block still writes the loss.
  return Status{launch(gaussian_loss_kernel<A>, dim3(unsigned(blocks > 0 ? blocks : 1)), kThreads, shared,
                       target.stream, job, partial, done, mask_sums, loss),
                "gaussian_feature_loss"};
}

template <class A>
Status gaussian_feature_loss_backward(const Pyramid& student, const Pyramid& teacher, const Pyramid& grad,
                                      const Table& boxes, int64_t count, double sigma_squared,
                                      const double* mask_sums, const A* upstream, const Target& target) {
  const DeviceGuard guard(target.device);
  if (guard.error() != cudaSuccess) return Status{guard.error(), "gaussian_feature_loss_backward"};
  GaussianJob job = make_job(student, teacher, boxes, count, sigma_squared);
  job.grad = view_of(grad);
  return Status{launch(gaussian_gradient_kernel<A>, dim3(unsigned(job.first_block[student.levels])), kThreads,
                       sizeof(TileShared<A>), target.stream, job, mask_sums, upstream),
                "gaussian_feature_loss_backward"};
}

#define TARDKD_INSTANTIATE(A)                                                                                       \
  template Status gaussian_feature_loss<A>(const Pyramid&, const Pyramid&, const Table&, int64_t, double, double*,  \
                                           int32_t*, double*, A*, const Target&);                                   \
  template Status gaussian_feature_loss_backward<A>(const Pyramid&, const Pyramid&, const Pyramid&, const Table&,   \
                                                    int64_t, double, const double*, const A*, const Target&)
TARDKD_INSTANTIATE(float);
TARDKD_INSTANTIATE(double);

}  // namespace tardkd::cuda
