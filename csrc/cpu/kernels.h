// The CPU kernels, one call an op. Pointers are to host memory; see core/common.h for the structs.
//
// A is float, or double when a feature tensor is float64. Every result is the same for any number of threads.
#pragma once

#include "../core/common.h"

namespace tardkd::cpu {

// Both pyramids to gates, three losses and their gradients, each to be multiplied by its term's factor. `grad`, maps of
// A with the student's shapes, dense in NCHW or channels_last order, is written completely; null when not wanted.
template <class A>
void region_distill(const Pyramid& student, const Pyramid& teacher, const Pyramid* grad, const RegionInputs<A>& in,
                    const RegionOutputs<A>& out, const RoiAlignSpec& align, const LossSpec& spec, int threads);

// Pooled regions (R, channels, bins) with strides in elements: bins or channels innermost and dense.
struct PooledTensor {
  void* data;
  DType dtype;
  int64_t strides[3];
};

// The same from features that are already pooled; `grad` as `student` but of A, data null when not wanted.
template <class A>
void pooled_distill(const PooledTensor& student, const PooledTensor& teacher, const PooledTensor& grad,
                    int32_t channels, int32_t pooled_h, int32_t pooled_w, const RegionInputs<A>& in,
                    const RegionOutputs<A>& out, const LossSpec& spec, int threads);

// (R, C, pooled_h, pooled_w) of A, contiguous; rows of invalid regions are zero.
template <class A>
void roi_align(const Pyramid& features, const double* proposals, int64_t regions, A* pooled, const RoiAlignSpec& align,
               int threads);

// Gradient of roi_align; `grad` as in region_distill.
template <class A>
void roi_align_backward(const Pyramid& grad, const double* proposals, int64_t regions, const A* grad_pooled,
                        const RoiAlignSpec& align, int threads);

// `boxes`: (count, 5) image index, x1, y1, x2, y2. `mask_sums`: (levels,), written.
template <class A>
void gaussian_feature_loss(const Pyramid& student, const Pyramid& teacher, const double* boxes, int64_t count,
                           double sigma_squared, A* loss, double* mask_sums, int threads);

// Its gradient, times `upstream`; `mask_sums` from the forward pass, `grad` as in region_distill.
template <class A>
void gaussian_feature_loss_backward(const Pyramid& student, const Pyramid& teacher, const Pyramid& grad,
                                    const double* boxes, int64_t count, double sigma_squared, const double* mask_sums,
                                    double upstream, int threads);

}  // namespace tardkd::cpu
