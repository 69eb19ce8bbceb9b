// RoIAlign of one region and a chunk of channels by one block, for any footprint. (Its gradient: gather.cu.)
//
// RoIAlign is a product of one small weight matrix per axis (core/axis.h). A block
//   1. places the region's samples along both axes: a list of the map rows and columns they touch, and the weight of
//      each in each bin (AxisTable);
//   2. copies strips of those rows into shared memory, each pixel read once, subtracting the teacher's on the way where
//      both sides share their geometry (stage);
//   3. adds weighted pixels up to bins (accumulate): one thread owns four channels of a bin, so nothing is atomic.
// An axis with more samples than fit a table is worked off in batches, which add up because pooling is linear; so is an
// output of many bins, in groups of bins.
#pragma once

#include <type_traits>

#include "../core/region.h"
#include "index.cuh"
#include "maps.cuh"

namespace tardkd::cuda {

template <class A>
constexpr int kChunk = 128 / int(sizeof(A));  // channels at a time: a pixel is 128 bytes of the tile
template <class A>
constexpr int kQuads = kChunk<A> / 4;  // a thread works on four of them
template <class A>
constexpr int kTilePixels = sizeof(A) == 4 ? 256 : 128;
constexpr int kSamples = kWarp;        // of an axis at a time, one a lane
constexpr int kPixels = 2 * kSamples;  // rows or columns they can touch
constexpr int kGroupBins = 7;          // bins of an axis at a time
constexpr int kGroupCells = kGroupBins * kGroupBins;

// ---- where a region lies -------------------------------------------------------------------------------------------

struct AxisPlace {
  RoiAxis roi;
  int32_t first, last;  // samples [first, last) can lie on the map; the others contribute nothing
};

struct RegionPlace {
  int32_t level;
  AxisPlace y, x;
};

// Without the samples beyond the map an absurdly large box takes no longer than the whole map.
__device__ inline AxisPlace place_axis(const RoiAxis& roi, int32_t pooled) {
  AxisPlace place;
  place.roi = roi;
  const double samples = double(place.roi.grid > 0 ? place.roi.grid : 0) * pooled;
  const double step = place.roi.bin / (place.roi.grid > 0 ? place.roi.grid : 1);
  double first = 0.0, last = samples;
  if (step != 0.0) {
    const double a = (-1.0 - place.roi.start) / step, b = (place.roi.size - place.roi.start) / step;
    first = fmax(floor(fmin(a, b)) - 2.0, 0.0);
    last = fmin(ceil(fmax(a, b)) + 2.0, samples);
  }
  place.first = first < samples ? int32_t(first) : int32_t(samples);
  place.last = last > first ? int32_t(last) : place.first;
  return place;
}

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

// Where region `r` lies. `box`: (4,) x1, y1, x2, y2.
__device__ inline RegionPlace place_region(const PyramidView& pyramid, int64_t r, const double* box,
                                           const RoiAlignSpec& align) {
  RegionPlace place;
  place.level = level_of(pyramid.choice, r, box, align);
  const FeatureMap& map = pyramid.level[place.level].map;
  place.y = place_axis(roi_axis_y(box, map, align), align.pooled_h);
  place.x = place_axis(roi_axis_x(box, map, align), align.pooled_w);
  return place;
}

// ---- tables --------------------------------------------------------------------------------------------------------

// Samples [first, first + count) of an axis, count <= kSamples, and the bins [bin, bin + bins) they may belong to.
struct Batch {
  RoiAxis roi;
  int32_t first, count, bin, bins;
};

// Bins or staged pixels [begin, end).
struct alignas(8) Range {
  int32_t begin, end;
};

// One axis of a batch of samples. `staged` pixels are counted along the rows or columns that are copied.
template <class A>
struct AxisTable {
  Batch batch;
  int32_t count;                                    // staged pixels
  bool widened;                                     // they are neighbours, from one multiple of four to another
  SharedArray<int32_t, kPixels> pixel;              // map coordinate of a staged pixel
  SharedArray<A, kGroupBins * kPixels> weight;      // [bin][staged]
  SharedArray<Range, kGroupBins> bin_range;         // staged pixels that a bin reads
  SharedArray<int32_t, 2 * kSamples> sample_pixel;  // staged pixels of a sample, -1: none
  SharedArray<A, 2 * kSamples> sample_weight;
};

// One warp: where each sample's two pixels are staged. Samples ascend (from the other end for an inverted region), so a
// pixel is new if no earlier lane has touched it. `widen`: where few pixels between the first and the last one are not
// touched, these are staged as well, and so many more that rows can be read in quads, which start and end on multiples
// of four; otherwise only touched pixels are staged, and `pad` fills up to whole quads.
template <class A>
__device__ inline void place_samples(bool widen, bool pad, AxisTable<A>& table) {
  const Batch& batch = table.batch;
  const int lane = threadIdx.x % kWarp;
  AxisSample at{0, 0, 0.0, 0.0};
  bool valid = lane < batch.count;
  if (valid) {
    const int32_t sample = batch.first + (batch.roi.bin < 0.0 ? batch.count - 1 - lane : lane);
    valid = axis_sample(batch.roi, sample / batch.roi.grid, sample % batch.roi.grid, at);
  }
  // Samples closer together than rounding errors may descend by one pixel: they are as well at the earlier one's.
  int32_t highest = valid ? at.lo : -1;
  for (int step = 1; step < kWarp; step *= 2) {
    const int32_t other = __shfl_up_sync(kAllLanes, highest, step);
    if (lane >= step && other > highest) highest = other;
  }
  if (valid && at.lo < highest) at = AxisSample{highest, highest, at.weight_lo + at.weight_hi, 0.0};

  const bool two = valid && at.weight_hi != 0.0;
  int32_t last = valid ? (two ? at.hi : at.lo) : -1;  // touched by this lane or an earlier one
  for (int step = 1; step < kWarp; step *= 2) {
    const int32_t other = __shfl_up_sync(kAllLanes, last, step);
    if (lane >= step && other > last) last = other;
  }
  int32_t before = __shfl_up_sync(kAllLanes, last, 1);
  if (lane == 0) before = -1;
  const bool new_lo = valid && at.lo > before, new_hi = two && at.hi > before;
  const unsigned los = __ballot_sync(kAllLanes, new_lo), his = __ballot_sync(kAllLanes, new_hi);
  const unsigned earlier = (1u << lane) - 1u;
  const int32_t staged_before = __popc(los & earlier) + __popc(his & earlier);
  int32_t lo = new_lo ? staged_before : staged_before - 1 - (before - at.lo);
  int32_t hi = new_hi ? staged_before + (new_lo ? 1 : 0) : staged_before - 1;

  int32_t count = __popc(los) + __popc(his);
  const int32_t first_lane = los ? __ffs(los) - 1 : 0;
  const int32_t lowest = __shfl_sync(kAllLanes, at.lo, first_lane), top = __shfl_sync(kAllLanes, last, kWarp - 1);
  const int32_t from = lowest & ~3, to = top | 3;
  const bool widened = widen && count > 0 && 2 * (top - lowest + 1) <= 3 * count && to - from < kPixels;
  if (widened) {
    lo = at.lo - from;
    hi = at.hi - from;
    count = to - from + 1;
    for (int32_t k = lane; k < count; k += kWarp) table.pixel[k] = from + k;
  } else {
    if (new_lo) table.pixel[lo] = at.lo;
    if (new_hi) table.pixel[hi] = at.hi;
    const int32_t padded = pad ? (count + 3) & ~3 : count;
    if (lane < padded - count) table.pixel[count + lane] = lowest;
    count = padded;
  }
  table.sample_pixel[2 * lane] = valid ? lo : -1;
  table.sample_pixel[2 * lane + 1] = two ? hi : -1;
  table.sample_weight[2 * lane] = static_cast<A>(at.weight_lo);
  table.sample_weight[2 * lane + 1] = static_cast<A>(at.weight_hi);
  if (lane == 0) {
    table.count = count;
    table.widened = widened;
  }
}

// All threads: the weight of every staged pixel in every bin, and which pixels a bin reads.
template <class A>
__device__ inline void fill_weights(AxisTable<A>& table) {
  const Batch& batch = table.batch;
  const int32_t count = table.count;
  for (int32_t entry = threadIdx.x; entry < batch.bins * count; entry += kThreads) {
    const int32_t bin = entry / count, staged = entry % count;
    int64_t begin = int64_t(batch.bin + bin) * batch.roi.grid - batch.first, end = begin + batch.roi.grid;
    if (begin < 0) begin = 0;
    if (end > batch.count) end = batch.count;
    A weight = A(0);
    int32_t low = count, high = 0;
    for (int32_t k = int32_t(begin); k < end; ++k) {
      const int32_t lane = batch.roi.bin < 0.0 ? batch.count - 1 - k : k;
      for (int side = 0; side < 2; ++side) {
        const int32_t pixel = table.sample_pixel[2 * lane + side];
        if (pixel < 0) continue;
        if (pixel == staged) weight += table.sample_weight[2 * lane + side];
        low = pixel < low ? pixel : low;
        high = pixel >= high ? pixel + 1 : high;
      }
    }
    table.weight[bin * kPixels + staged] = weight;
    if (staged == 0) table.bin_range[bin] = Range{low < high ? low : 0, high};
  }
}

// Bins [y, y + rows) x [x, x + columns) of the output.
struct BinGroup {
  int32_t y, rows, x, columns;
  __device__ __forceinline__ int32_t bins() const { return rows * columns; }
  // Of all bins, the group's one of number `bin`.
  __device__ __forceinline__ int32_t bin_of(int32_t bin, const RoiAlignSpec& align) const {
    return (y + bin / columns) * align.pooled_w + x + bin % columns;
  }
};

// Bins of an axis that make a group: as equal as they can be and at most kGroupBins.
__host__ __device__ inline int32_t group_size(int32_t pooled) {
  const int32_t groups = (pooled + kGroupBins - 1) / kGroupBins;
  return (pooled + groups - 1) / groups;
}

// Both axes of one side; they stay as they are until another batch is asked for.
template <class A>
struct Tables {
  AxisTable<A> y, x;
  Divider by_columns;  // takes a staged pixel's number apart
  bool planar;         // the order of memory that they were made for

  // Before they hold anything.
  __device__ __forceinline__ void clear() { y.batch.bin = -1; }
  __device__ __forceinline__ bool hold(int32_t bin_y, int32_t bin_x, int32_t first_y, int32_t first_x,
                                       bool planar) const {
    return y.batch.bin == bin_y && x.batch.bin == bin_x && y.batch.first == first_y && x.batch.first == first_x &&
           this->planar == planar;
  }
};

// By all threads, after a barrier: the tables of the batches that they hold.
template <class A>
__device__ __noinline__ void build_tables(bool vector, Tables<A>& tables) {
  const int warp = threadIdx.x / kWarp;
  if (warp == 0) place_samples(false, false, tables.y);
  if (warp == 1) place_samples(tables.planar && vector, tables.planar, tables.x);
  __syncthreads();
  if (threadIdx.x == 0 && tables.x.count > 0) tables.by_columns = Divider::in_block(tables.x.count);
  fill_weights(tables.y);
  fill_weights(tables.x);
  __syncthreads();
}

// Calls body() with the tables of each batch of samples that the group's bins have. All threads of the block.
template <class A, class Body>
__device__ __forceinline__ void for_each_batch(const RegionPlace& place, const MapView& view, const BinGroup& group,
                                               Tables<A>& tables, const Body& body) {
  const auto range = [](const AxisPlace& axis, int32_t bin, int32_t bins, int32_t& first, int32_t& last) {
    const int64_t begin = int64_t(bin) * axis.roi.grid, end = int64_t(bin + bins) * axis.roi.grid;
    first = begin > axis.first ? int32_t(begin) : axis.first;
    last = end < axis.last ? int32_t(end) : axis.last;
  };
  int32_t first_y, last_y, first_x, last_x;
  range(place.y, group.y, group.rows, first_y, last_y);
  range(place.x, group.x, group.columns, first_x, last_x);
  for (int32_t sy = first_y; sy < last_y; sy += kSamples)
    for (int32_t sx = first_x; sx < last_x; sx += kSamples) {
      if (!tables.hold(group.y, group.x, sy, sx, view.planar)) {
        __syncthreads();  // nobody reads the previous ones any more
        if (threadIdx.x == 0) {
          const int32_t count_y = last_y - sy < kSamples ? last_y - sy : kSamples;
          const int32_t count_x = last_x - sx < kSamples ? last_x - sx : kSamples;
          tables.y.batch = Batch{place.y.roi, sy, count_y, group.y, group.rows};
          tables.x.batch = Batch{place.x.roi, sx, count_x, group.x, group.columns};
          tables.planar = view.planar;
        }
        __syncthreads();
        build_tables(view.vector, tables);
      }
      body();
    }
}

// ---- the tile and the bins in shared memory ------------------------------------------------------------------------

// Where four channels of a row of 128 bytes lie. Staggered, so that threads on different rows hit different banks.
template <class A>
__device__ __forceinline__ int32_t quad_at(int32_t row, int32_t quad, int32_t stagger) {
  return row * kChunk<A> + ((quad ^ (stagger & (kQuads<A> - 1))) * 4);
}
template <class A>
__device__ __forceinline__ int32_t tile_at(int32_t pixel, int32_t quad) {
  return quad_at<A>(pixel, quad, pixel >> 2);
}
template <class A>
__device__ __forceinline__ int32_t bin_at(int32_t bin, int32_t quad) {
  return quad_at<A>(bin, quad, bin);
}

// [bin][channel] of a group of bins and a chunk of channels, in shared memory; see bin_at.
template <class A>
using Bins = SharedArray<A, kGroupCells * kChunk<A>>;

// The block's shared memory. The teacher's tables come last: where one set serves both sides they are not there.
template <class A>
struct alignas(16) PoolShared {
  SharedArray<A, kTilePixels<A> * kChunk<A>> tile;  // [pixel][channel] the strip at work
  Bins<A> bins;                                     // pooled values, then their gradient
  RegionPlace place[2];
  Tables<A> tables[2];
};

template <class A>
__host__ __device__ size_t pool_shared_bytes(int sides) {
  return sizeof(PoolShared<A>) - (2 - sides) * sizeof(Tables<A>);
}

// ---- staging -------------------------------------------------------------------------------------------------------

// What a thread reads of one image of a map: one channel of planar memory, or four of which its pixels are quads. What
// is read stays as it is stored until both sides are read: to take 16-bit elements apart at once would wait for each
// read.
template <class A, class T>
struct Source {
  using Element = T;

  const T* data;                         // of the first of these channels
  int32_t stride_c, stride_h, stride_w;  // see strides_fit
  int32_t channels;                      // that exist from there on
  bool vector;

  __device__ Source(const MapView& view, int32_t image, int32_t all_channels, int32_t channel)
      : data(static_cast<const T*>(view.map.data) + image * view.map.stride_n + channel * view.map.stride_c),
        stride_c(view.stride_c),
        stride_h(view.stride_h),
        stride_w(view.stride_w),
        channels(all_channels - channel),
        vector(view.vector) {}

  // Four staged pixels of one channel, from the one on that is `staged`.
  __device__ __forceinline__ Raw<T> read_pixels(AxisTable<A>& columns, int32_t y, int32_t staged) const {
    Four<T> elements;
    const T* row = advance(data, y, stride_h);
#pragma unroll
    for (int k = 0; k < 4; ++k) elements.at[k] = read(advance(row, columns.pixel[staged + k], stride_w));
    return as_raw(elements);
  }
  // The same where they are neighbours in memory, from column x on.
  __device__ __forceinline__ Raw<T> read_neighbours(int32_t y, int32_t x) const {
    return read_four(advance(data, y, stride_h) + x);
  }
  __device__ __forceinline__ Four<A> pixels(const Raw<T>& raw) const { return take_apart<A, T>(raw); }

  // Four channels of one pixel; those that do not exist read as zero.
  __device__ __forceinline__ Raw<T> read_quad(int32_t y, int32_t x) const {
    const T* pixel = advance(advance(data, y, stride_h), x, stride_w);
    Four<T> elements{};
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if (k < channels) elements.at[k] = read(advance(pixel, k, stride_c));
    return as_raw(elements);
  }
  // The same where all exist and are neighbours in memory.
  __device__ __forceinline__ Raw<T> read_whole_quad(int32_t y, int32_t x) const {
    return read_four(advance(advance(data, y, stride_h), x, stride_w));
  }
  __device__ __forceinline__ Four<A> quad(const Raw<T>& raw) const { return take_apart<A, T>(raw); }
};

// The same of a standardised map. Channels beyond it stay zero.
template <class A, class T>
struct StandardSource : Source<A, T> {
  ChannelNorm<A> norm;  // of these channels

  __device__ StandardSource(const MapView& view, int32_t image, int32_t all_channels, int32_t channel)
      : Source<A, T>(view, image, all_channels, channel), norm(view.map.norm, all_channels, channel) {}

  __device__ __forceinline__ Four<A> pixels(const Raw<T>& raw) const {
    Four<A> values = take_apart<A, T>(raw);
    const A scale = read(norm.scale), mean = read(norm.mean);
#pragma unroll
    for (int k = 0; k < 4; ++k) values.at[k] = scale * (values.at[k] - mean);
    return values;
  }
  __device__ __forceinline__ Four<A> quad(const Raw<T>& raw) const {
    Four<A> values = take_apart<A, T>(raw);
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if (k < this->channels) values.at[k] = read(norm.scale + k) * (values.at[k] - read(norm.mean + k));
    return values;
  }
};

// What a block pools: one image and chunk of a map, or its difference to another map of the same geometry, layout and
// type.
struct PoolSource {
  const MapView &map, &other;
  bool subtract;
  DType dtype;
  int32_t image, channels, channel;
};

// left - right
template <class A>
__device__ __forceinline__ Four<A> minus(Four<A> left, const Four<A>& right) {
#pragma unroll
  for (int k = 0; k < 4; ++k) left.at[k] -= right.at[k];
  return left;
}

// Rows [row, row + rows) of the staged pixels into the tile.
//
// Planar: a warp takes eight quads of pixels x four channels, else four pixels x eight quads of channels. Either way
// it reads whole sectors of memory, its lanes write to different banks, and a thread has the same channels throughout
// and the same stagger of the tile. What does not change from pixel to pixel is asked before the loop.
template <class From, class A>
__device__ __forceinline__ void stage(const PoolSource& source, PoolShared<A>& shared, Tables<A>& tables, int32_t row,
                                      int32_t rows) {
  constexpr int kWarps = kThreads / kWarp;
  const int32_t lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, columns = tables.x.count;
  const bool planar = source.map.planar, subtract = source.subtract;
  const int32_t group = warp % kQuads<A>, quad = threadIdx.x % kQuads<A>;
  const int32_t own = source.channel + (planar ? 4 * group + lane / 8 : 4 * quad);
  const From map(source.map, source.image, source.channels, own),
      other(source.other, source.image, source.channels, own);
  const bool fours = map.vector && other.vector;

  if (planar) {
    const int32_t quads_a_row = columns / 4, quads = rows * quads_a_row;
    const Divider by_row = Divider::in_block(quads_a_row);
    const int32_t first = tile_at<A>(4 * (lane % 8), group) + lane / 8;
    const int32_t set = kWarps > kQuads<A> ? warp / kQuads<A> : 0;  // the warps of a group take turns
    const auto fill = [&](const auto& values_at) {
#pragma unroll 1
      for (int32_t begin = 8 * set; begin + lane % 8 < quads; begin += kWarps / kQuads<A> * 8) {
        const Split at = by_row.split(begin + lane % 8);
        const Four<A> values = values_at(tables.y.pixel[row + at.quotient], 4 * at.remainder);
#pragma unroll
        for (int k = 0; k < 4; ++k) shared.tile[first + (4 * begin + k) * kChunk<A>] = values.at[k];
      }
    };
    if (map.channels <= 0) {
      fill([](int32_t, int32_t) { return Four<A>{}; });
    } else if (fours && tables.x.widened) {
      const int32_t x = tables.x.pixel[0];
      fill([&](int32_t y, int32_t staged) {
        const auto mine = map.read_neighbours(y, x + staged);
        if (!subtract) return map.pixels(mine);
        const auto theirs = other.read_neighbours(y, x + staged);
        return minus(map.pixels(mine), other.pixels(theirs));
      });
    } else {
      fill([&](int32_t y, int32_t staged) {
        const auto mine = map.read_pixels(tables.x, y, staged);
        if (!subtract) return map.pixels(mine);
        const auto theirs = other.read_pixels(tables.x, y, staged);
        return minus(map.pixels(mine), other.pixels(theirs));
      });
    }
  } else {
    constexpr int kAtOnce = kThreads / kQuads<A>;  // pixels, a multiple of what the stagger repeats after
    const int32_t pixel = threadIdx.x / kQuads<A>, first = tile_at<A>(pixel, quad);
    const auto fill = [&](const auto& values_at) {
#pragma unroll 1
      for (int32_t begin = 0; begin + pixel < rows * columns; begin += kAtOnce) {
        const Split at = tables.by_columns.split(begin + pixel);
        const Four<A> values = values_at(tables.y.pixel[row + at.quotient], tables.x.pixel[at.remainder]);
        put_four(shared.tile.four(first + begin * kChunk<A>), values);
      }
    };
    if (fours && map.channels >= 4)
      fill([&](int32_t y, int32_t x) {
        const auto mine = map.read_whole_quad(y, x);
        if (!subtract) return map.quad(mine);
        const auto theirs = other.read_whole_quad(y, x);
        return minus(map.quad(mine), other.quad(theirs));
      });
    else
      fill([&](int32_t y, int32_t x) {
        const auto mine = map.read_quad(y, x);
        if (!subtract) return map.quad(mine);
        const auto theirs = other.read_quad(y, x);
        return minus(map.quad(mine), other.quad(theirs));
      });
  }
}

template <bool kNorm, class A>
__device__ __forceinline__ void stage(const PoolSource& source, PoolShared<A>& shared, Tables<A>& tables, int32_t row,
                                      int32_t rows) {
  with_stored<A>(source.dtype, [&](auto stored) {
    using T = decltype(stored);
    stage<std::conditional_t<kNorm, StandardSource<A, T>, Source<A, T>>>(source, shared, tables, row, rows);
  });
}

// Rows that fit the tile at once.
template <class A>
__device__ __forceinline__ int32_t strip_rows(const Tables<A>& tables) {
  return kTilePixels<A> / tables.x.count;
}

// ---- bins ----------------------------------------------------------------------------------------------------------

// Calls body(bin of the group, quad, the four values) for the bins that this thread owns, the same everywhere.
template <class A, class Body>
__device__ __forceinline__ void for_own_bins(Bins<A>& bins, const BinGroup& group, const Body& body) {
  const int32_t quad = threadIdx.x % kQuads<A>;
  for (int32_t bin = threadIdx.x / kQuads<A>; bin < group.bins(); bin += kThreads / kQuads<A>)
    body(bin, quad, *reinterpret_cast<Four<A>*>(bins.four(bin_at<A>(bin, quad))));
}

template <class A>
__device__ void clear_bins(PoolShared<A>& shared, const BinGroup& group) {
  for_own_bins(shared.bins, group, [](int32_t, int32_t, Four<A>& values) { values = Four<A>{}; });
}

// bins += sign * pooled tile, which holds rows [row, row + rows).
template <class A>
__device__ void accumulate(PoolShared<A>& shared, const Tables<A>& tables, const BinGroup& group, int32_t row,
                           int32_t rows, A sign) {
  const int32_t columns = tables.x.count;
  for_own_bins(shared.bins, group, [&](int32_t bin, int32_t quad, Four<A>& values) {
    const int32_t i = bin / group.columns, j = bin - i * group.columns;
    const Range along_x = tables.x.bin_range[j];
    Range along_y = tables.y.bin_range[i];
    along_y.begin = along_y.begin > row ? along_y.begin : row;
    along_y.end = along_y.end < row + rows ? along_y.end : row + rows;
    if (along_y.begin >= along_y.end || along_x.begin >= along_x.end) return;
    Four<A> sum{};
    for (int32_t y = along_y.begin; y < along_y.end; ++y) {
      Four<A> line{};
      for (int32_t x = along_x.begin; x < along_x.end; ++x) {
        const A weight = tables.x.weight[j * kPixels + x];
        if (weight == A(0)) continue;  // a pixel that nobody asked for may be infinite
        const Four<A> pixel =
            *reinterpret_cast<const Four<A>*>(shared.tile.four(tile_at<A>((y - row) * columns + x, quad)));
#pragma unroll
        for (int k = 0; k < 4; ++k) line.at[k] += weight * pixel.at[k];
      }
      const A weight = sign * tables.y.weight[i * kPixels + y];
#pragma unroll
      for (int k = 0; k < 4; ++k) sum.at[k] += weight * line.at[k];
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) values.at[k] += sum.at[k];
  });
}

// bins += sign * RoIAlign(source), over all batches and strips; of standardised maps with kNorm. All threads; ends with
// a barrier.
template <bool kNorm = false, class A>
__device__ __forceinline__ void pool(const PoolSource& source, const RegionPlace& place, const BinGroup& group,
                                     PoolShared<A>& shared, Tables<A>& tables, A sign) {
  for_each_batch(place, source.map, group, tables, [&] {
    if (tables.x.count == 0) return;
    const int32_t all = tables.y.count, strip = strip_rows(tables);
    for (int32_t row = 0; row < all; row += strip) {
      const int32_t rows = all - row < strip ? all - row : strip;
      stage<kNorm>(source, shared, tables, row, rows);
      __syncthreads();
      accumulate(shared, tables, group, row, rows, sign);
      __syncthreads();
    }
  });
  __syncthreads();
}

// ---- pooled tensors ------------------------------------------------------------------------------------------------

// Calls body(quad, bin, index, step) for the group's bins and `quads` quads of the chunk's channels, neighbouring lanes
// with neighbouring bins: `index` is where the quad's first channel lies in a tensor (R, C, pooled_h, pooled_w), `step`
// how far apart its channels are there. `first` is the chunk's first channel, counted over all regions.
template <class Body>
__device__ __forceinline__ void for_pooled(int64_t first, int32_t quads, const RoiAlignSpec& align,
                                           const BinGroup& group, const Body& body) {
  const Divider by_bins = Divider::in_block(group.bins()), by_columns = Divider::in_block(group.columns);
  const int32_t step = align.pooled_h * align.pooled_w;
  const int64_t begin = first * step + group.y * align.pooled_w + group.x;
#pragma unroll 1
  for (int32_t task = threadIdx.x; task < quads * group.bins(); task += kThreads) {
    const Split at = by_bins.split(task), bin = by_columns.split(at.remainder);
    body(at.quotient, at.remainder, begin + (4 * at.quotient * step + bin.quotient * align.pooled_w + bin.remainder),
         step);
  }
}

// Calls store(index, value) for the bins of the chunk's `channels` channels.
template <class A, class Store>
__device__ __forceinline__ void write_pooled(int64_t first, int32_t channels, const RoiAlignSpec& align,
                                             const BinGroup& group, Bins<A>& bins, const Store& store) {
  for_pooled(first, (channels + 3) / 4, align, group, [&](int32_t quad, int32_t bin, int64_t index, int32_t step) {
    const Four<A> values = *reinterpret_cast<const Four<A>*>(bins.four(bin_at<A>(bin, quad)));
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if (4 * quad + k < channels) store(index + k * step, values.at[k]);
  });
}

// Fills the bins with load(index); zeros for channels that do not exist.
template <class A, class Load>
__device__ __forceinline__ void read_pooled(int64_t first, int32_t channels, const RoiAlignSpec& align,
                                            const BinGroup& group, Bins<A>& bins, const Load& load) {
  for_pooled(first, kQuads<A>, align, group, [&](int32_t quad, int32_t bin, int64_t index, int32_t step) {
    Four<A> values{};
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if (4 * quad + k < channels) values.at[k] = load(index + k * step);
    put_four(bins.four(bin_at<A>(bin, quad)), values);
  });
}

// Of the chunk that begins with `channel`, the channels that exist.
template <class A>
__device__ __forceinline__ int32_t chunk_channels(int32_t channels, int32_t channel) {
  return channels - channel < kChunk<A> ? channels - channel : kChunk<A>;
}

// Calls body(group) for all groups of bins.
template <class Body>
__device__ __forceinline__ void for_each_group(const RoiAlignSpec& align, const Body& body) {
  const int32_t rows = group_size(align.pooled_h), columns = group_size(align.pooled_w);
  for (int32_t y = 0; y < align.pooled_h; y += rows)
    for (int32_t x = 0; x < align.pooled_w; x += columns)
      body(BinGroup{y, align.pooled_h - y < rows ? align.pooled_h - y : rows, x,
                    align.pooled_w - x < columns ? align.pooled_w - x : columns});
}

// The gradient of pooled features as gather.cu reads it: (R, chunks, bins, kChunk), chunks as many as the level that
// has most channels needs. This is where a region's and chunk's bins begin.
template <class A>
__host__ __device__ inline int64_t packed_at(int32_t region, int32_t chunk, int32_t max_channels,
                                             const RoiAlignSpec& align) {
  const int32_t chunks = (max_channels + kChunk<A> - 1) / kChunk<A>;
  return (int64_t(region) * chunks + chunk) * (align.pooled_h * align.pooled_w * kChunk<A>);
}

// ---- sharing the work ----------------------------------------------------------------------------------------------

constexpr int kChunksPerBlock = 2;

// Blocks that share the channels of a region; together they are its channel groups.
template <class A>
__host__ __device__ inline int32_t channel_groups(int32_t channels) {
  return (channels + kChunksPerBlock * kChunk<A> - 1) / (kChunksPerBlock * kChunk<A>);
}

// Which region and which of the `groups` groups of its channels this block works on. The group changes slowest: regions
// overlap, and blocks that run at one time share the second-level cache.
struct RegionBlock {
  int32_t region, group;
};

__device__ __forceinline__ RegionBlock region_block(int32_t groups) {
  const int32_t regions = gridDim.x / groups;
  return RegionBlock{int32_t(blockIdx.x % regions), int32_t(blockIdx.x / regions)};
}

// Calls body(first channel) for the chunks of a group.
template <class A, class Body>
__device__ __forceinline__ void for_each_chunk(int32_t group, int32_t channels, const Body& body) {
  const int32_t first = group * kChunksPerBlock * kChunk<A>;
  for (int32_t channel = first; channel < first + kChunksPerBlock * kChunk<A> && channel < channels;
       channel += kChunk<A>)
    body(channel);
}

}  // namespace tardkd::cuda
