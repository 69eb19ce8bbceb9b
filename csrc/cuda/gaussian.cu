// Gaussian-mask loss over whole pyramids, one pass over the features, and its gradient, another.
//
// A block is a tile of one map and a group of channels. It makes the tile's mask in shared memory from the boxes that
// meet it, one exponential a box, row and column, and reads features only where the mask is not zero.
#include <cstring>
#include <type_traits>

#include "../core/box.h"
#include "index.cuh"
#include "kernels.h"
#include "maps.cuh"
#include "tiles.cuh"

namespace tardkd::cuda {
namespace {

constexpr int kGroup = 64;  // channels a block
constexpr int kBoxes = 32;  // boxes whose Gaussians are held at a time
constexpr int kSteps = 16;  // of a thread through the block's elements, four at a time
static_assert(kGroup == 4 * kSteps, "the steps cover the block");

// A tile has kThreads pixels, one a thread while the mask is made: long rows where a row's pixels are neighbours in
// memory, else as many rows as steps.
constexpr int kPlanarWidth = 32, kPlanarHeight = kThreads / kPlanarWidth;
constexpr int kPixelWidth = kThreads / kSteps, kPixelHeight = kSteps;

struct GaussianJob {
  PyramidView student, teacher, grad;
  Table boxes;  // (count, 5)
  int64_t count;
  double sigma_squared;
  TileGrid tiles;          // by groups of channels
  bool quads[kMaxLevels];  // all maps of a level are of one type and one order, and accessible in fours throughout
};

template <class A>
struct alignas(16) TileShared {
  SharedArray<A, kThreads> mask;
  SharedArray<A, kBoxes * kPlanarWidth> along_x;
  SharedArray<A, kBoxes * kPixelHeight> along_y;
  SharedArray<double, 4 * kThreads> boxes;  // of those looked at together, the ones that meet the tile
  SharedArray<int32_t, kThreads / kWarp> counts;
};

// Both sizes are powers of two.
struct MaskTile {
  __host__ __device__ TileSize operator()(const MapView& view) const {
    return TileSize{view.planar ? kPlanarWidth : kPixelWidth, view.planar ? kPlanarHeight : kPixelHeight};
  }
};

// ---- mask -----------------------------------------------------------------------------------------------------------

// A box in the map's pixels; false if it lies on another image, has no area or is not finite.
template <class T>
__device__ inline bool read_box(const GaussianJob& job, int64_t index, const Tile& tile, double (&box)[4]) {
  const T* from = static_cast<const T*>(job.boxes.data) + index * job.boxes.stride_row;
  double row[5];
#pragma unroll
  for (int k = 0; k < 5; ++k) row[k] = from[k * job.boxes.stride_column];
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
  const int32_t y = threadIdx.x / tile.width, x = threadIdx.x % tile.width;
  const bool on_map = tile.y + y < map.height && tile.x + x < map.width;
  A mask = A(0);
  for (int64_t begin = 0; begin < job.count; begin += kThreads) {
    double box[4];
    const int64_t index = begin + threadIdx.x;
    const bool meets = index < job.count &&
                       (job.boxes.dtype == DType::float64 ? read_box<double>(job, index, tile, box)
                                                          : read_box<float>(job, index, tile, box)) &&
                       box[0] <= tile.x + tile.width - 1 && box[2] >= tile.x && box[1] <= tile.y + tile.height - 1 &&
                       box[3] >= tile.y;
    int32_t found;
    const int32_t at = block_rank(meets, shared.counts, found);
    if (meets) {
#pragma unroll
      for (int k = 0; k < 4; ++k) shared.boxes[4 * at + k] = box[k];
    }
    __syncthreads();
    for (int32_t first = 0; first < found; first += kBoxes) {
      const int32_t boxes = found - first < kBoxes ? found - first : kBoxes, axes = tile.width + tile.height;
      const Divider by_axes = Divider::in_block(axes);
      for (int32_t task = threadIdx.x; task < boxes * axes; task += kThreads) {
        const Split split = by_axes.split(task);
        const int32_t b = split.quotient, at = split.remainder, box_at = 4 * (first + b);
        if (at < tile.width)
          shared.along_x[b * tile.width + at] = static_cast<A>(
              axis_gaussian(tile.x + at, shared.boxes[box_at], shared.boxes[box_at + 2], job.sigma_squared));
        else
          shared.along_y[b * tile.height + at - tile.width] = static_cast<A>(axis_gaussian(
              tile.y + at - tile.width, shared.boxes[box_at + 1], shared.boxes[box_at + 3], job.sigma_squared));
      }
      __syncthreads();
      for (int32_t b = 0; b < boxes; ++b) {
        const A value = shared.along_y[b * tile.height + y] * shared.along_x[b * tile.width + x];
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
  int32_t any = 0;
  for (int w = 0; w < kThreads / kWarp; ++w) any |= shared.counts[w];
  return any != 0;
}

// ---- features -------------------------------------------------------------------------------------------------------

// A thread's walk through the block's elements, four at a time. In a planar map it stays at its pixels and steps
// through the channels, else it stays at its channels and steps down the rows. Its four are neighbours (`quads`), or
// the lanes are and the four lie apart: either way a warp reads memory in order.
struct Walk {
  bool planar;
  int32_t pixel, channel;              // of the first element, in the tile and in the group
  int32_t pixel_apart, channel_apart;  // from one of the four to the next
  int32_t steps;

  __device__ __forceinline__ Walk(const GaussianJob& job, const Tile& tile, bool planar, bool quads) : planar(planar) {
    const int32_t threads = (planar ? kThreads : kGroup) / 4;  // side by side
    const int32_t along = threadIdx.x % threads * (quads ? 4 : 1), across = threadIdx.x / threads;
    const int32_t apart = quads ? 1 : threads;
    pixel = planar ? along : across;
    pixel_apart = planar ? apart : 0;
    channel = planar ? across : along;
    channel_apart = planar ? 0 : apart;
    const FeatureMap& map = job.student.level[tile.level].map;
    const int32_t left = planar ? (map.channels - tile.channel - channel + 3) / 4 : map.height - tile.y;
    steps = left < kSteps ? left : kSteps;
  }
  // Whether element k exists, in any step.
  __device__ __forceinline__ bool exists(const GaussianJob& job, const Tile& tile, int k) const {
    const FeatureMap& map = job.student.level[tile.level].map;
    const int32_t at = pixel + k * pixel_apart;
    return tile.y + at / tile.width < map.height && tile.x + at % tile.width < map.width &&
           tile.channel + channel + k * channel_apart < map.channels;
  }
};

// That walk through the memory of one map, in bytes.
struct Way {
  char* at;
  int64_t step, apart;

  __device__ __forceinline__ Way(const FeatureMap& map, int32_t bytes, const Tile& tile, const Walk& walk) {
    const int32_t y = tile.y + walk.pixel / tile.width, x = tile.x + walk.pixel % tile.width;
    at = static_cast<char*>(map.data) + bytes * offset_in(map, tile.image, tile.channel + walk.channel, y, x);
    step = bytes * (walk.planar ? 4 * map.stride_c : map.stride_h);
    apart = bytes * (walk.channel_apart * map.stride_c + walk.pixel_apart / kPlanarWidth * map.stride_h);
  }
};

// The elements of a block of which all maps store T: every thread walks its quads. Returns the sum of M d^2; with
// kGradient, slope M d is written for every element.
template <bool kGradient, bool kPlanar, class T, class A>
__device__ __forceinline__ A walk_quads(const GaussianJob& job, const Tile& tile, TileShared<A>& shared, A slope) {
  constexpr int kBatch = sizeof(T) == 2 ? 4 : sizeof(T) == 4 ? 2 : 1;  // quads of either side in flight: 64 bytes
  const Walk walk(job, tile, kPlanar, true);
  if (!walk.exists(job, tile, 0)) return A(0);
  Way student(job.student.level[tile.level].map, sizeof(T), tile, walk);
  Way teacher(job.teacher.level[tile.level].map, sizeof(T), tile, walk);
  Way grad(job.grad.level[tile.level].map, sizeof(T), tile, walk);
  Four<A> own;
  bool any = false;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    own.at[k] = shared.mask[walk.pixel + (kPlanar ? k : 0)];
    any = any || own.at[k] > A(0);
  }
  if (kPlanar && !kGradient && !any) return A(0);

  A sum = A(0);
#pragma unroll 1
  for (int32_t step = 0; step < walk.steps; step += kBatch) {
    Raw<T> s[kBatch], t[kBatch];
    A masks[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const bool here = step + b < walk.steps;
      masks[b] = !kPlanar && here ? shared.mask[walk.pixel + (step + b) * kPixelWidth] : A(0);
      const bool open = kPlanar ? here && any : masks[b] > A(0);
      s[b] = open ? read_four(reinterpret_cast<const T*>(student.at + b * student.step)) : Raw<T>{};
      t[b] = open ? read_four(reinterpret_cast<const T*>(teacher.at + b * teacher.step)) : Raw<T>{};
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const Four<A> of_student = take_apart<A, T>(s[b]), of_teacher = take_apart<A, T>(t[b]);
      Four<A> gradient;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const A mask = kPlanar ? own.at[k] : masks[b];
        // Where the mask is zero the features are not looked at: they may be NaN.
        const A d = mask > A(0) ? of_student.at[k] - of_teacher.at[k] : A(0);
        sum += mask * d * d;
        gradient.at[k] = mask > A(0) ? slope * mask * d : A(0);
      }
      if (kGradient && step + b < walk.steps) store_four(reinterpret_cast<T*>(grad.at + b * grad.step), gradient);
    }
    student.at += kBatch * student.step;
    teacher.at += kBatch * teacher.step;
    grad.at += kBatch * grad.step;
  }
  return sum;
}

// One element, as it is stored.
template <class A>
using Bits = std::conditional_t<sizeof(A) == 8, uint64_t, uint32_t>;

template <class A>
__device__ __forceinline__ Bits<A> load_bits(const char* from, DType dtype) {
  return bytes_of(dtype) == 2 ? *reinterpret_cast<const uint16_t*>(from) : *reinterpret_cast<const Bits<A>*>(from);
}

template <class A>
__device__ __forceinline__ A value_of(Bits<A> bits, DType dtype) {
  A value;
  with_stored<A>(dtype, [&](auto stored) {
    memcpy(&stored, &bits, sizeof stored);
    value = as<A>(stored);
  });
  return value;
}

// The same element by element, for any types and strides.
template <bool kGradient, class A>
__device__ __forceinline__ A walk_elements(const GaussianJob& job, const Tile& tile, TileShared<A>& shared, A slope) {
  const DType student_dtype = job.student.dtype, teacher_dtype = job.teacher.dtype, grad_dtype = job.grad.dtype;
  const Walk walk(job, tile, job.student.level[tile.level].planar, false);
  Way student(job.student.level[tile.level].map, bytes_of(student_dtype), tile, walk);
  Way teacher(job.teacher.level[tile.level].map, bytes_of(teacher_dtype), tile, walk);
  Way grad(job.grad.level[tile.level].map, bytes_of(grad_dtype), tile, walk);
  bool exists[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) exists[k] = walk.exists(job, tile, k);

  A sum = A(0);
#pragma unroll 1
  for (int32_t step = 0; step < walk.steps; ++step) {
    Bits<A> s[4], t[4];
    A masks[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      masks[k] = exists[k] ? shared.mask[walk.pixel + (walk.planar ? k * walk.pixel_apart : step * kPixelWidth)] : A(0);
      s[k] = masks[k] > A(0) ? load_bits<A>(student.at + k * student.apart, student_dtype) : 0;
      t[k] = masks[k] > A(0) ? load_bits<A>(teacher.at + k * teacher.apart, teacher_dtype) : 0;
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const A d = value_of<A>(s[k], student_dtype) - value_of<A>(t[k], teacher_dtype);  // 0 where neither was read
      sum += masks[k] * d * d;
      if (kGradient && exists[k])
        with_stored<A>(grad_dtype, [&](auto stored) {
          using T = decltype(stored);
          *reinterpret_cast<T*>(grad.at + k * grad.apart) =
              Stored<T>::from(masks[k] > A(0) ? slope * masks[k] * d : A(0));
        });
    }
    student.at += student.step;
    teacher.at += teacher.step;
    grad.at += grad.step;
  }
  return sum;
}

template <bool kGradient, class A>
__device__ __forceinline__ A walk_block(const GaussianJob& job, const Tile& tile, TileShared<A>& shared, A slope) {
  if (!job.quads[tile.level]) return walk_elements<kGradient>(job, tile, shared, slope);
  A sum;
  with_stored<A>(job.student.dtype, [&](auto stored) {
    using T = decltype(stored);
    sum = job.student.level[tile.level].planar ? walk_quads<kGradient, true, T>(job, tile, shared, slope)
                                               : walk_quads<kGradient, false, T>(job, tile, shared, slope);
  });
  return sum;
}

// By the last block: the levels' mask sums and the mean of their losses.
__device__ inline double finish(const GaussianJob& job, const double* partial, double* mask_sums,
                                const Shared<double>& sums) {
  const int64_t* first_block = job.tiles.first_block;
  const int64_t blocks = first_block[job.student.levels];
  double total = 0.0;
  for (int32_t level = 0; level < job.student.levels; ++level) {
    double loss_sum = 0.0, mask_sum = 0.0;
    for (int64_t block = first_block[level] + threadIdx.x; block < first_block[level + 1]; block += kThreads) {
      loss_sum += load_fresh(&partial[block]);
      mask_sum += load_fresh(&partial[blocks + block]);
    }
    loss_sum = block_sum(loss_sum, sums);
    mask_sum = block_sum(mask_sum, sums);
    if (threadIdx.x == 0) mask_sums[level] = mask_sum;
    total += loss_sum / (2.0 * (mask_sum > 1.0 ? mask_sum : 1.0));
  }
  return total / job.student.levels;
}

// ---- kernels --------------------------------------------------------------------------------------------------------

// At most 64 registers a thread for float, so that four blocks share a multiprocessor; double is there for checks.
template <class A>
__global__ void __launch_bounds__(kThreads, sizeof(A) == 4 ? 4 : 2)
    gaussian_loss_kernel(const __grid_constant__ GaussianJob job, const Scratch<double> scratch, double* mask_sums,
                         A* loss) {
  SharedArena arena;
  const Shared<double> sums = arena.take<double>(kThreads / kWarp);
  const Shared<int32_t> flag = arena.take<int32_t>(1);
  TileShared<A>& shared = *arena.rest<TileShared<A>>();

  const int64_t blocks = job.tiles.first_block[job.student.levels];
  if (blockIdx.x < blocks) {
    const Tile tile = tile_of(job.tiles, job.student, kGroup, MaskTile());
    A sum = A(0), mask = A(0);
    if (make_mask(job, tile, shared)) {
      sum = walk_block<false>(job, tile, shared, A(0));
      if (tile.channel == 0) mask = shared.mask[threadIdx.x];
    }
    const double loss_sum = block_sum(double(sum), sums), mask_sum = block_sum(double(mask), sums);
    if (threadIdx.x == 0) {
      scratch.partial[blockIdx.x] = loss_sum;
      scratch.partial[blocks + blockIdx.x] = mask_sum;
    }
  }
  if (!last_block(scratch.done, int32_t(gridDim.x), flag)) return;
  const double total = finish(job, scratch.partial, mask_sums, sums);
  if (threadIdx.x == 0) *loss = static_cast<A>(total);
}

template <class A>
__global__ void __launch_bounds__(kThreads, sizeof(A) == 4 ? 4 : 2)
    gaussian_gradient_kernel(const __grid_constant__ GaussianJob job, const double* mask_sums, const A* upstream) {
  SharedArena arena;
  TileShared<A>& shared = *arena.rest<TileShared<A>>();
  const Tile tile = tile_of(job.tiles, job.student, kGroup, MaskTile());
  const double mask_sum = mask_sums[tile.level];
  const A slope = static_cast<A>(*upstream / ((mask_sum > 1.0 ? mask_sum : 1.0) * job.student.levels));
  make_mask(job, tile, shared);
  walk_block<true>(job, tile, shared, slope);
}

// Without `grad`: for the loss.
GaussianJob make_job(const Pyramid& student, const Pyramid& teacher, const Pyramid* grad, const Table& boxes,
                     int64_t count, double sigma_squared) {
  GaussianJob job{};
  job.student = view_of(student);
  job.teacher = view_of(teacher);
  if (grad) job.grad = view_of(*grad);
  job.boxes = boxes;
  job.count = count;
  job.sigma_squared = sigma_squared;
  job.tiles = tile_grid(job.student, kGroup, MaskTile());
  for (int32_t level = 0; level < student.levels; ++level) {
    const MapView &s = job.student.level[level], &t = job.teacher.level[level];
    const MapView& g = grad ? job.grad.level[level] : s;
    job.quads[level] = s.vector && t.vector && g.vector && s.planar == t.planar && s.planar == g.planar &&
                       (s.planar || s.map.channels % 4 == 0) && teacher.dtype == student.dtype &&
                       (!grad || grad->dtype == student.dtype);
  }
  return job;
}

}  // namespace

int64_t gaussian_partials(const Pyramid& student) {
  return 2 * make_job(student, student, nullptr, Table{}, 0, 1.0).tiles.first_block[student.levels];
}

template <class A>
Status gaussian_feature_loss(const Pyramid& student, const Pyramid& teacher, const Table& boxes, int64_t count,
                             double sigma_squared, const Scratch<double>& scratch, double* mask_sums, A* loss,
                             const Target& target) {
  const GaussianJob job = make_job(student, teacher, nullptr, boxes, count, sigma_squared);
  const int64_t blocks = job.tiles.first_block[student.levels];
  const size_t shared = shared_bytes<double>(kThreads / kWarp) + shared_bytes<int32_t>(1) + sizeof(TileShared<A>);
  // Without pixels one block still writes the loss.
  return launch_on(target, "gaussian_feature_loss", gaussian_loss_kernel<A>, blocks > 0 ? blocks : 1, shared, job,
                   scratch, mask_sums, loss);
}

template <class A>
Status gaussian_feature_loss_backward(const Pyramid& student, const Pyramid& teacher, const Pyramid& grad,
                                      const Table& boxes, int64_t count, double sigma_squared, const double* mask_sums,
                                      const A* upstream, const Target& target) {
  const GaussianJob job = make_job(student, teacher, &grad, boxes, count, sigma_squared);
  return launch_on(target, "gaussian_feature_loss_backward", gaussian_gradient_kernel<A>,
                   job.tiles.first_block[student.levels], sizeof(TileShared<A>), job, mask_sums, upstream);
}

#define TARDKD_INSTANTIATE(A)                                                                                     \
  template Status gaussian_feature_loss<A>(const Pyramid&, const Pyramid&, const Table&, int64_t, double,         \
                                           const Scratch<double>&, double*, A*, const Target&);                   \
  template Status gaussian_feature_loss_backward<A>(const Pyramid&, const Pyramid&, const Pyramid&, const Table&, \
                                                    int64_t, double, const double*, const A*, const Target&)
TARDKD_INSTANTIATE(float);
TARDKD_INSTANTIATE(double);

}  // namespace tardkd::cuda
