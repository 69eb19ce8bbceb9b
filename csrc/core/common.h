// Types shared by every back end: enums, plain parameter structs, and the host/device marker. Nothing here needs CUDA
// or torch headers; the structs are passed to kernels by value. A stands for the type that a kernel accumulates in:
// float, or double when a feature tensor is float64.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define TARDKD_HD __host__ __device__ __forceinline__
#else
#define TARDKD_HD inline
#endif

namespace tardkd {

constexpr int kMaxLevels = 8;

enum class DType : int32_t { float32, float64, float16, bfloat16 };
// The order of the enumerators is the order of the names in tardkd/ops/spec.py.
enum class FeatureLoss : int32_t { squared, absolute, smooth_l1 };
enum class BinWeight : int32_t { uniform, gaussian };
enum class FeatureGate : int32_t { all, foreground, classification, regression, either };
enum class ClassificationGate : int32_t { all, foreground, teacher_better };
enum class RegressionGate : int32_t { foreground, vs_proposal, vs_student };
enum class Activation : int32_t { softmax, sigmoid };
enum class Background : int32_t { first, last };
enum class Reduction : int32_t { mean, sum, none };
enum class BoxCoding : int32_t { deltas, boxes };  // what the tables of deltas hold; boxes: xyxy

// One level of a feature pyramid: (N, C, height, width) with strides in elements.
struct FeatureMap {
  void* data;
  int64_t stride_n, stride_c, stride_h, stride_w;
  int32_t height, width;
  double scale;  // map pixels per student-input pixel
  int32_t channels;
  const void* norm;  // see ChannelNorm; null where the map is taken as it is
};

// What standardises the channels of a level: x becomes scale (x - mean), of variance 1 over all images and
// pixels. A level has an array (2, channels) of A, the scales and then the means.
template <class A>
struct ChannelNorm {
  const A *scale, *mean;

  // Of the channels from `first` on.
  TARDKD_HD ChannelNorm(const void* norm, int32_t channels, int32_t first = 0)
      : scale(static_cast<const A*>(norm) + first), mean(scale + channels) {}
};

// Element of a map, counted from its first one.
TARDKD_HD int64_t offset_in(const FeatureMap& map, int64_t n, int64_t c, int64_t y, int64_t x) {
  return n * map.stride_n + c * map.stride_c + y * map.stride_h + x * map.stride_w;
}

// Whether two maps show the same pixels. Their memory may be ordered in different ways.
inline bool same_extent(const FeatureMap& a, const FeatureMap& b) {
  return a.height == b.height && a.width == b.width && a.scale == b.scale;
}

// A feature pyramid, or the gradients of one; the finest level comes first.
struct Pyramid {
  FeatureMap level[kMaxLevels];
  int32_t levels, images;
  int32_t max_channels;  // of the level that has most
  DType dtype;
};

// Regions that are already pooled: (R, channels, pooled_h, pooled_w). The two axes of the bins are walked as one, so
// there are three strides, in elements: of regions, channels and bins. Null data stands for a tensor that is absent.
struct PooledTensor {
  void* data;
  DType dtype;
  int32_t channels, pooled_h, pooled_w;
  int64_t strides[3];
  const void* norm;  // see ChannelNorm, over all regions and bins; null where the features are taken as they are
};

// (rows, columns), or (rows,) where the column's stride has no meaning; strides in elements. Null data stands for a
// table that is absent.
struct Table {
  const void* data;
  DType dtype;
  int64_t stride_row, stride_column;
};

// Row `row` of a table that stores T and whose columns are neighbours in memory.
template <class T>
TARDKD_HD const T* dense_row(const Table& table, int64_t row) {
  return static_cast<const T*>(table.data) + row * table.stride_row;
}

// The levels of a pyramid that regions are pooled from, given from outside. Null data: the level rule decides.
struct GivenLevels {
  const int64_t* data;  // (R,)
  int64_t stride;
  int32_t count;  // levels of the pyramid

  // Whether the level of region r exists.
  TARDKD_HD bool has(int64_t r) const { return !data || (data[r * stride] >= 0 && data[r * stride] < count); }
  bool operator==(const GivenLevels& other) const { return data == other.data && stride == other.stride; }
};

struct RoiAlignSpec {
  int32_t pooled_h, pooled_w;
  int32_t sampling_ratio;  // <= 0: adaptive, ceil(region size / pooled size)
  bool aligned;
  double canonical_scale, canonical_level;
};

struct LossSpec {
  FeatureLoss feature_loss;
  BinWeight bin_weight;
  FeatureGate feature_gate;
  ClassificationGate classification_gate;
  RegressionGate regression_gate;
  Background background;
  Activation activation;
  Reduction reduction;
  BoxCoding box_coding;
  double temperature;
  double beta;            // smooth-L1 threshold of boxes and features
  double box_weights[4];  // dx, dy, dw, dh
};

// Everything about the R regions of a call except their features, as it lies in the caller's tensors.
//
// The CUDA kernels read tables of any strides and of any floating type, boxes of float32 or float64. The CPU kernels
// read tables whose columns are neighbours: boxes of float64, the others of the accumulation type A.
struct RegionInputs {
  int64_t regions;
  int32_t images;  // negative where the proposals' image index is not looked at (pooled features)
  int32_t logit_columns;
  int32_t student_delta_columns, teacher_delta_columns;  // each 4, 4 K or 4 (K + 1) for K classes
  Table proposals;                                       // (R, 5) image index, x1, y1, x2, y2
  Table student_logits, teacher_logits;                  // (R, logit_columns)
  Table student_deltas;                                  // (R, student_delta_columns), see BoxCoding
  Table teacher_deltas;                                  // (R, teacher_delta_columns)
  Table gt_boxes;                                        // (R, 4) x1, y1, x2, y2
  Table region_weights;                                  // (R,), or absent for ones
  Table student_scores, teacher_scores;                  // (R,), or absent for the logits' p(y)
  Table upstream;                                        // (3, R) gradients of the unreduced terms, or absent for ones
  GivenLevels student_levels, teacher_levels;            // (R,), for regions that are pooled here
  int32_t level_channels[kMaxLevels];                    // of both sides, where the levels of both are given
  const int64_t* labels;                                 // (R,)
  int64_t label_stride;
};

// Logits of the distributions that a head has for the four sides of each region's box: (R, 4, bins); strides in
// elements.
struct Distributions {
  void* data;
  DType dtype;
  int32_t bins;
  int64_t stride_region, stride_side, stride_bin;
};

// Everything about a call of the distribution loss, as it lies in the caller's tensors. The CUDA kernels read any
// strides and floating types; the CPU kernels read distributions that are dense, and those and weights of type A.
struct DistributionInputs {
  int64_t regions;
  Distributions student, teacher;  // of as many bins
  const bool* gates;               // (R,)
  int64_t gate_stride;
  Table region_weights;  // (R,), or absent for ones
  double temperature;
  Reduction reduction;
};

// Results, dense. A null gradient pointer means that the gradient is not wanted.
template <class A>
struct RegionOutputs {
  A* losses[3];    // feature, classification, regression: one element each, or (R,) with Reduction::none
  bool* gates;     // (R, 3) feature, classification, regression
  A* scores;       // (R, 4) p_T(y) and p_S(y), or as given; IoU of the teacher's box, IoU it was compared with
  A* factors;      // (3,) by which each term's gradient is to be multiplied yet: 1 / gate count with Reduction::mean
  A* grad_logits;  // (R, logit_columns)
  A* grad_deltas;  // (R, student_delta_columns)
};

}  // namespace tardkd
