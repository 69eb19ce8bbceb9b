#include "plan.h"

#include <algorithm>

#include "../core/region.h"
#include "parallel.h"

namespace tardkd::cpu {
namespace {

constexpr int32_t kRowVector = 8;  // NCHW rows are read in vectors of eight pixels

// Upper bound of the taps of one bin: adaptive grids only grow with the map they sample.
int64_t taps_per_bin(const RoiAxis& axis, const RoiAlignSpec& align) {
  const int64_t samples = 2 * int64_t(axis.grid);
  return align.sampling_ratio > 0 ? samples : std::min<int64_t>(samples, axis.size);
}

template <class A>
struct AxisStorage {
  int32_t* begin;
  int32_t* pixel;
  A* weight;
};

// `vector` > 1: the span is widened to whole vectors inside the map, so that rows can be read without a tail.
template <class A>
Axis<A> build_axis(const RoiAxis& roi, int32_t bins, int32_t vector, AxisStorage<A> storage) {
  int32_t taps = 0, lowest = roi.size, highest = -1;
  const auto push = [&](int32_t pixel, double weight, int32_t bin_begin) {
    if (weight == 0.0) return;
    lowest = std::min(lowest, pixel);
    highest = std::max(highest, pixel);
    // Neighbouring samples share pixels; samples ascend, so a repeat is one of the last two.
    for (int32_t k = taps - 1; k >= std::max(bin_begin, taps - 2); --k)
      if (storage.pixel[k] == pixel) {
        storage.weight[k] += static_cast<A>(weight);
        return;
      }
    storage.pixel[taps] = pixel;
    storage.weight[taps++] = static_cast<A>(weight);
  };
  for (int32_t bin = 0; bin < bins; ++bin) {
    storage.begin[bin] = taps;
    for (int32_t k = 0; k < roi.grid; ++k) {
      AxisSample sample;
      if (!axis_sample(roi, bin, k, sample)) continue;
      push(sample.lo, sample.weight_lo, storage.begin[bin]);
      push(sample.hi, sample.weight_hi, storage.begin[bin]);
    }
  }
  storage.begin[bins] = taps;

  Axis<A> axis{0, 0, storage.begin, storage.pixel, storage.weight};
  if (taps == 0) return axis;
  axis.first = lowest;
  axis.span = highest - lowest + 1;
  const int32_t widened = (axis.span + vector - 1) / vector * vector;
  if (widened <= roi.size) {
    axis.span = widened;
    axis.first = std::min(axis.first, roi.size - widened);
  }
  for (int32_t k = 0; k < taps; ++k) storage.pixel[k] -= axis.first;
  return axis;
}

struct Placement {
  int64_t region;
  int32_t image;
  struct Side {
    int32_t level;
    RoiAxis y, x;
    int64_t integers, weights;  // offsets into the plan's storage
  } side[2];
};

bool is_planar(const FeatureMap& map) { return map.stride_w == 1 && map.stride_c != 1; }

}  // namespace

int32_t lanes_for(const Pyramid& student) {
  for (int32_t level = 0; level < student.levels; ++level)
    if (student.level[level].stride_c != 1 || student.level[level].channels % 16 != 0) return 8;
  return 16;
}

template <class A>
PoolPlan<A>::PoolPlan(const Pyramid& student, const Pyramid* teacher, const Table& proposals,
                      const LevelChoice& student_levels, const LevelChoice& teacher_levels, int64_t count,
                      const bool* open, const RoiAlignSpec& align, int threads) {
  const Pyramid* pyramids[2] = {&student, teacher};
  const LevelChoice* choices[2] = {&student_levels, &teacher_levels};
  const int sides = teacher ? 2 : 1;
  std::vector<Placement> placed;
  int64_t integers = 0, weights = 0;
  for (int64_t r = 0; r < count; ++r) {
    const double* proposal = dense_row<double>(proposals, r);
    if (!is_valid_proposal(proposal, student.images) || !student_levels.given.has(r) || (open && !open[3 * r]))
      continue;
    Placement place;
    place.region = r;
    place.image = static_cast<int32_t>(proposal[0]);
    for (int side = 0; side < sides; ++side) {
      const Pyramid& pyramid = *pyramids[side];
      Placement::Side& at = place.side[side];
      at.level = level_of(*choices[side], r, proposal + 1, align);
      at.y = roi_axis_y(proposal + 1, pyramid.level[at.level], align);
      at.x = roi_axis_x(proposal + 1, pyramid.level[at.level], align);
      at.integers = integers;
      at.weights = weights;
      const int64_t taps = taps_per_bin(at.y, align) * align.pooled_h + taps_per_bin(at.x, align) * align.pooled_w;
      integers += taps + align.pooled_h + align.pooled_w + 2;
      weights += taps;
    }
    placed.push_back(place);
  }

  // A counting sort by (image, student level) keeps the caller's order within a group.
  const int64_t groups = int64_t(student.images) * student.levels;
  const auto group_of = [&](const Placement& p) { return int64_t(p.image) * student.levels + p.side[0].level; };
  group_begin.assign(groups + 1, 0);
  for (const Placement& place : placed) ++group_begin[group_of(place) + 1];
  for (int64_t g = 0; g < groups; ++g) group_begin[g + 1] += group_begin[g];
  std::vector<int64_t> next(group_begin.begin(), group_begin.end() - 1), slot(placed.size());
  for (size_t p = 0; p < placed.size(); ++p) slot[p] = next[group_of(placed[p])]++;

  regions.resize(placed.size());
  integers_.resize(integers);
  weights_.resize(weights);
  for_each_range(placed.size(), 64, threads, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const Placement& place = placed[p];
      PooledRegion<A>& region = regions[slot[p]];
      region.region = place.region;
      region.image = place.image;
      for (int side = 0; side < sides; ++side) {
        const Placement::Side& at = place.side[side];
        Window<A>& window = side == 0 ? region.student : region.teacher;
        window.level = at.level;
        int32_t* ints = integers_.data() + at.integers;
        A* values = weights_.data() + at.weights;
        const int64_t taps_y = taps_per_bin(at.y, align) * align.pooled_h;
        window.y = build_axis<A>(at.y, align.pooled_h, 1, {ints, ints + align.pooled_h + 1, values});
        ints += align.pooled_h + 1 + taps_y;
        const bool planar = is_planar(pyramids[side]->level[at.level]);
        window.x = build_axis<A>(at.x, align.pooled_w, planar ? kRowVector : 1,
                                 {ints, ints + align.pooled_w + 1, values + taps_y});
      }
    }
  });
  for (const PooledRegion<A>& region : regions) {
    max_span = std::max(max_span, region.student.x.span);
    if (teacher) max_span = std::max(max_span, region.teacher.x.span);
  }
}

template struct PoolPlan<float>;
template struct PoolPlan<double>;

}  // namespace tardkd::cpu
