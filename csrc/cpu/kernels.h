// The CPU kernels, one call an op. Pointers are to host memory; see core/common.h for the structs and for A. Tables
// have columns that are neighbours in memory; proposals and boxes are of float64. Every result is the same for any
// number of threads.
#pragma once

#include "../core/common.h"

namespace tardkd::cpu {

// From both pyramids to gates, three losses and their gradients, each to be multiplied by its term's factor. `grad`,
// maps of A with the student's shapes, dense in NCHW or channels_last order, is written completely, or with `add` added
// to; null when not wanted. Where the levels have norms, features are standardised first, and the gradient goes through
// that; then there is nothing to add to.
template <class A>
void region_distill(const Pyramid& student, const Pyramid& teacher, const Pyramid* grad, bool add,
                    const RegionInputs& in, const RegionOutputs<A>& out, const RoiAlignSpec& align,
                    const LossSpec& spec, int threads);

// The same from features that are already pooled. All tensors have their bins or their channels as the inner of two
// dense loops, in the same order; `grad` is of A, and absent when not wanted.
template <class A>
void pooled_distill(const PooledTensor& student, const PooledTensor& teacher, const PooledTensor& grad,
                    const RegionInputs& in, const RegionOutputs<A>& out, const LossSpec& spec, int threads);

// The same without features: the feature term is 0.
template <class A>
void head_distill(const RegionInputs& in, const RegionOutputs<A>& out, const LossSpec& spec, int threads);

// Writes the norms of all levels, (2, C_l) each, one after the other: what standardises each channel over all images
// and pixels. `epsilon` is added to the variances.
template <class A>
void channel_norms(const Pyramid& features, double epsilon, A* norms, int threads);

// Turns `grad`, the gradient for the standardised features, into the gradient for `features`, which have their norms:
// what standardises them hangs on them too. `grad` is as in region_distill.
template <class A>
void backward_through_norms(const Pyramid& features, const Pyramid& grad, int threads);

// Pools `regions` regions, `proposals` (R, 5), `levels` (R,), into `pooled`: (R, C, pooled_h, pooled_w), contiguous.
// Rows of invalid regions are zero.
template <class A>
void roi_align(const Pyramid& features, const Table& proposals, const GivenLevels& levels, int64_t regions, A* pooled,
               const RoiAlignSpec& align, int threads);

// Gradient of roi_align: `grad` as in region_distill, `grad_pooled` (R, C, pooled_h, pooled_w), contiguous.
template <class A>
void roi_align_backward(const Pyramid& grad, const Table& proposals, const GivenLevels& levels, int64_t regions,
                        const A* grad_pooled, const RoiAlignSpec& align, int threads);

// `boxes`: (count, 5) image index, x1, y1, x2, y2. Writes `loss`, one element, and `mask_sums`, (levels,).
template <class A>
void gaussian_feature_loss(const Pyramid& student, const Pyramid& teacher, const Table& boxes, int64_t count,
                           double sigma_squared, A* loss, double* mask_sums, int threads);

// Its gradient, times `upstream`; `mask_sums`, (levels,), are those of the forward pass, `grad` is as in
// region_distill.
template <class A>
void gaussian_feature_loss_backward(const Pyramid& student, const Pyramid& teacher, const Pyramid& grad,
                                    const Table& boxes, int64_t count, double sigma_squared, const double* mask_sums,
                                    double upstream, int threads);

// Writes `loss`, one element, or (R,) with Reduction::none, and `factor`, one element, by which the gradient of a
// reduced loss is to be multiplied.
template <class A>
void distribution_distill_loss(const DistributionInputs& in, A* loss, A* factor, int threads);

// Its gradient: `upstream`, (R,), of every region's term; `grad`, (R, 4, bins), is written completely.
template <class A>
void distribution_distill_loss_backward(const DistributionInputs& in, const Table& upstream, A* grad, int threads);

}  // namespace tardkd::cpu
