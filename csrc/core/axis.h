// RoIAlign along one axis, and the FPN level rule.
//
// torchvision's RoIAlign averages bilinear samples on a grid. A sample's bilinear weights, its validity test and
// its clamp at the border are each a product of an x part and a y part, so a region's output is Wy F Wx^T with one
// small weight matrix per axis. The functions below give the samples that make up those matrices.
#pragma once

#include <cmath>

#include "common.h"

namespace tardkd {

struct RoiAxis {
  double start;  // region start, map pixels
  double bin;    // bin size, map pixels
  int32_t grid;  // samples per bin; <= 0 for an inverted region under adaptive sampling: no samples
  int32_t size;  // map extent
};

TARDKD_HD RoiAxis roi_axis(double lo, double hi, double scale, int32_t pooled, int32_t size,
                           const RoiAlignSpec& align) {
  const double offset = align.aligned ? 0.5 : 0.0;
  const double start = lo * scale - offset;
  double extent = (hi * scale - offset) - start;
  if (!align.aligned && extent < 1.0) extent = 1.0;
  RoiAxis axis;
  axis.start = start;
  axis.bin = extent / pooled;
  axis.size = size;
  // A grid denser than 2^20 samples a bin only arises from absurd boxes; the bound keeps the integer defined.
  const double adaptive = fmin(ceil(extent / pooled), 1048576.0);
  axis.grid = align.sampling_ratio > 0 ? align.sampling_ratio : (adaptive > 0.0 ? static_cast<int32_t>(adaptive) : 0);
  return axis;
}

// The two axes of a region on a map; `box`: (4,) x1, y1, x2, y2.
TARDKD_HD RoiAxis roi_axis_y(const double* box, const FeatureMap& map, const RoiAlignSpec& align) {
  return roi_axis(box[1], box[3], map.scale, align.pooled_h, map.height, align);
}
TARDKD_HD RoiAxis roi_axis_x(const double* box, const FeatureMap& map, const RoiAlignSpec& align) {
  return roi_axis(box[0], box[2], map.scale, align.pooled_w, map.width, align);
}

// Two pixels and their weights; weights already divided by the grid so that a bin is a mean.
struct AxisSample {
  int32_t lo, hi;
  double weight_lo, weight_hi;
};

// False when the sample lies outside [-1, size] and contributes nothing.
TARDKD_HD bool axis_sample(const RoiAxis& axis, int32_t bin, int32_t k, AxisSample& sample) {
  double at = axis.start + bin * axis.bin + (k + 0.5) * axis.bin / axis.grid;
  if (!(at >= -1.0 && at <= axis.size)) return false;
  if (at < 0.0) at = 0.0;
  sample.lo = static_cast<int32_t>(at);
  if (sample.lo >= axis.size - 1) {
    sample.lo = sample.hi = axis.size - 1;
    at = sample.lo;
  } else {
    sample.hi = sample.lo + 1;
  }
  const double fraction = at - sample.lo;
  sample.weight_lo = (1.0 - fraction) / axis.grid;
  sample.weight_hi = fraction / axis.grid;
  return true;
}

// How many levels the rule of assign_level can reach. It counts octaves from the finest scale to the coarsest, so of
// several maps of one stride (torchvision's MobileNet pyramids) only the first is ever used.
TARDKD_HD int32_t reachable_levels(double finest, double coarsest, int32_t levels) {
  const double octaves = floor(log2(finest / coarsest) + 0.5);
  return octaves <= 0.0 ? 1 : (octaves + 1.0 < levels ? static_cast<int32_t>(octaves) + 1 : levels);
}

TARDKD_HD int32_t reachable_levels(const Pyramid& pyramid) {
  return reachable_levels(pyramid.level[0].scale, pyramid.level[pyramid.levels - 1].scale, pyramid.levels);
}

// Equation 1 of the FPN paper as torchvision evaluates it. `box`: (4,) x1, y1, x2, y2. `scale0` is the scale of the
// finest level; for scales that are not powers of two this is the rule applied in that side's own pixels. `levels` are
// the reachable ones.
TARDKD_HD int32_t assign_level(const double* box, double scale0, int32_t levels, const RoiAlignSpec& align) {
  const double area = (box[2] - box[0]) * (box[3] - box[1]);
  if (!(area > 0.0)) return 0;
  const double level = floor(align.canonical_level + log2(sqrt(area) / align.canonical_scale) + 1e-6 + log2(scale0));
  return level <= 0.0 ? 0 : (level >= levels - 1 ? levels - 1 : static_cast<int32_t>(level));
}

// How the level of a region is found: it is given and exists, or follows from the rule for a pyramid of these scales.
struct LevelChoice {
  GivenLevels given;
  double scale0;   // of the finest level
  int32_t levels;  // reachable ones

  bool operator==(const LevelChoice& other) const {
    return given == other.given && scale0 == other.scale0 && levels == other.levels;
  }
};

TARDKD_HD int32_t level_of(const LevelChoice& choice, int64_t r, const double* box, const RoiAlignSpec& align) {
  const GivenLevels& given = choice.given;
  return given.data ? static_cast<int32_t>(given.data[r * given.stride])
                    : assign_level(box, choice.scale0, choice.levels, align);
}

inline LevelChoice level_choice(const Pyramid& pyramid, const GivenLevels& given) {
  return LevelChoice{given, pyramid.level[0].scale, reachable_levels(pyramid)};
}

// The teacher's choice beside the student's. Where channels differ from level to level, levels of one region have to go
// together: the teacher takes the student's level unless its own is given.
inline LevelChoice teacher_choice(const LevelChoice& student_choice, const Pyramid& teacher, const GivenLevels& given) {
  bool differ = false;
  for (int32_t level = 1; level < teacher.levels; ++level)
    differ = differ || teacher.level[level].channels != teacher.level[0].channels;
  return differ && !given.data ? student_choice : level_choice(teacher, given);
}

}  // namespace tardkd
