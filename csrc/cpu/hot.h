// The inner loops of the CPU kernels and the plain structs they work on.
//
// hot.cpp is compiled once per instruction set; the drivers (planning, threads, allocation) are compiled once, for
// the baseline, and reach the loops through the table below. So no inline function of the standard library is ever
// emitted with instructions that the machine may lack.
#pragma once

#include "../core/common.h"

namespace tardkd::cpu {

// One axis of one region as a compact list: taps [begin[b], begin[b + 1]) of `pixel` and `weight` make bin b.
// Pixels are relative to `first`; `span` pixels from there cover all taps. begin: (bins + 1,); pixel, weight: (taps,).
template <class A>
struct Axis {
  int32_t first, span;
  const int32_t* begin;
  const int32_t* pixel;
  const A* weight;
};

// A region on one side: which map, and its two axes there.
template <class A>
struct Window {
  int32_t level;
  Axis<A> y, x;
};

template <class A>
struct PooledRegion {
  int64_t region;  // row in the caller's tensors
  int32_t image;
  Window<A> student, teacher;
};

// Feature level of the region loss. Without a teacher: plain RoIAlign.
template <class A>
struct PoolJob {
  const Pyramid* student;
  const Pyramid* teacher;  // null for plain RoIAlign
  const Pyramid* grad;     // maps of A of the student's shapes, or null
  bool add;                // to what the gradient's maps hold; else they are written completely
  bool same_geometry;      // windows and storage equal on both sides: subtract on load, pool once
  int32_t pooled_h, pooled_w;
  int32_t max_span;                // widest window, for scratch
  const PooledRegion<A>* regions;  // those that are pooled, sorted by (image, student level)
  const int64_t* group_begin;      // (images * student levels + 1,) where each group of `regions` begins
  int32_t lanes;                   // channels handled together: 8, or 16 when the student is channels_last

  FeatureLoss feature_loss;
  A beta;
  const A* bin_weights;  // (`regions`, pooled_h, pooled_w), or null
  const A* slope;        // (`regions`,) factor of the gradient of the summed penalty
  A* partial;            // (channel blocks, `regions`) sums of the penalty, or null

  A* pooled;             // RoIAlign output (R, C, pooled_h, pooled_w), or null
  const A* grad_pooled;  // its upstream gradient (R, C, pooled_h, pooled_w), or null
};

// Losses on regions that are already pooled; the gradient is of A, or absent.
template <class A>
struct PooledLossJob {
  PooledTensor student, teacher, grad;
  FeatureLoss feature_loss;
  A beta;
  const A* bin_weights;  // (R, pooled_h, pooled_w) or null
  const bool* open;      // (R, 3) gates; column 0 is read
  const A* slope;        // (R,)
  A* sums;               // (R,)
};

// One level of the Gaussian-mask loss.
template <class A>
struct GaussianJob {
  FeatureMap student, teacher, grad;
  DType student_dtype, teacher_dtype;
  int32_t channels;
  A slope;  // gradient = slope * M * (F_S - F_T)
};

template <class A>
struct Kernels {
  int64_t (*pool_scratch)(const PoolJob<A>&);  // elements of A per worker
  void (*pool_task)(const PoolJob<A>&, int32_t image, int32_t level, int32_t block, A* scratch);
  void (*pooled_loss_region)(const PooledLossJob<A>&, int64_t region);
  // What standardises `channels` channels of a level from `channel` on, at most 8: see ChannelNorm.
  void (*channel_norms)(const FeatureMap&, DType, int32_t images, int32_t channel, int32_t channels, double epsilon,
                        A* scale, A* mean);
  // Of the same channels: turns the gradient for the standardised map into that for the map itself.
  void (*backward_through_norms)(const FeatureMap&, DType, const FeatureMap& grad, int32_t images, int32_t channel,
                                 int32_t channels);
  // Rows [row, row + rows) of one image; mask is (rows, width) and zero outside columns [extent[2y], extent[2y + 1])
  // of row y; extent is (rows, 2). The sum of M d^2, and the gradient there, which is written completely.
  double (*gaussian_loss)(const GaussianJob<A>&, int32_t image, int32_t row, int32_t rows, const A* mask,
                          const int32_t* extent);
  void (*gaussian_gradient)(const GaussianJob<A>&, int32_t image, int32_t row, int32_t rows, const A* mask,
                            const int32_t* extent);
};

const Kernels<float>& kernels(float);
const Kernels<double>& kernels(double);
const char* instruction_set();

}  // namespace tardkd::cpu
