// Types shared by every back end: enums, plain parameter structs, and the host/device marker.
// Nothing here needs CUDA or torch headers; the structs are passed to kernels by value.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define TARDKD_HD __host__ __device__ __forceinline__
#else
#define TARDKD_HD inline
#endif

namespace tardkd {

constexpr int kMaxLevels = 8;

// The order of the enumerators is the order of the names in tardkd/ops/checks.py.
enum class DType : int32_t { float32, float64, float16, bfloat16 };
enum class FeatureLoss : int32_t { squared, absolute, smooth_l1 };
enum class BinWeight : int32_t { uniform, gaussian };
enum class FeatureGate : int32_t { all, foreground, classification, regression, either };
enum class ClassificationGate : int32_t { all, foreground, teacher_better };
enum class RegressionGate : int32_t { foreground, vs_proposal, vs_student };
enum class Activation : int32_t { softmax, sigmoid };
enum class Background : int32_t { first, last };
enum class Reduction : int32_t { mean, sum, none };

// One level of a feature pyramid, (N, C, H, W) with strides in elements.
struct FeatureMap {
  void* data;
  int64_t stride_n, stride_c, stride_h, stride_w;
  int32_t height, width;
  double scale;  // map pixels per student-input pixel
};

struct Pyramid {
  FeatureMap level[kMaxLevels];
  int32_t levels, images, channels;
  DType dtype;
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
  double temperature;
  double beta;            // smooth-L1 threshold of deltas and features
  double box_weights[4];  // dx, dy, dw, dh
};

// Everything about the regions except their features. A is float, or double when a feature pyramid is.
template <class A>
struct RegionInputs {
  int64_t regions;
  int32_t images;  // < 0: the image index is not checked (pooled features)
  int32_t logit_columns;
  int32_t student_delta_columns, teacher_delta_columns;  // each 4, 4 K or 4 (K + 1)
  const double* proposals;                               // (R, 5) image index, x1, y1, x2, y2
  const A* student_logits;                               // (R, logit_columns)
  const A* teacher_logits;                               // (R, logit_columns)
  const A* student_deltas;                               // (R, student_delta_columns)
  const A* teacher_deltas;                               // (R, teacher_delta_columns)
  const int64_t* labels;                                 // (R,)
  const double* gt_boxes;                                // (R, 4)
  const A* region_weights;                               // (R,) or null
  const A* upstream;                                     // (3, R) gradients of the unreduced terms, or null for ones
};

// Results. A null gradient pointer means that gradient is not wanted.
template <class A>
struct RegionOutputs {
  A* losses[3];    // feature, classification, regression: a scalar each, or (R,) with Reduction::none
  bool* gates;     // (R, 3) feature, classification, regression
  A* scores;       // (R, 4) p_T(y), p_S(y), IoU of the teacher's box, IoU it was compared with
  A* factors;      // (3,) by which each term's gradient is to be multiplied yet: 1 / gate count with Reduction::mean
  A* grad_logits;  // (R, logit_columns)
  A* grad_deltas;  // (R, student_delta_columns)
};

}  // namespace tardkd
