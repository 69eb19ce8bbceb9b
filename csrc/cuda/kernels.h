// Launchers of the CUDA kernels. Plain C++: included where no CUDA headers are.
//
// Every launcher works on the caller's stream, allocates nothing and does not wait for the device. Pointers are to
// memory of that device; see core/common.h for the structs and for A. Tables may have any strides and any floating
// type; proposals and boxes are of float32 or float64.
#pragma once

#include "../core/common.h"

namespace tardkd::cuda {

// Where to run: `stream` is a cudaStream_t of that device.
struct Target {
  int32_t device;
  void* stream;
};

// A cudaError_t (0: none) and the kernel whose launch met it. Errors of the kernel itself appear later, as ever.
struct Status {
  int32_t error = 0;
  const char* kernel = nullptr;
};

const char* error_text(int32_t error);

// Memory on the device that a kernel needs while it runs.
template <class T>
struct Scratch {
  T* partial;     // sums of single blocks; region_partials() or gaussian_partials() elements
  int32_t* done;  // one zero, and zero again afterwards
};

// Elements of Scratch::partial for the region losses of `regions` regions and at most `channels` channels of a level.
int64_t region_partials(int64_t regions, int32_t channels);

// From both pyramids to gates, three losses and their gradients in one launch. Where the levels have norms, the
// features are standardised and the gradient is that for the standardised ones. `grad_pooled`: PooledGradient::packed,
// with respect to the student's pooled features of regions with an open feature gate, for roi_align_gather; the other
// regions are left untouched. Null: it is not wanted.
template <class A>
Status region_distill(const Pyramid& student, const Pyramid& teacher, A* grad_pooled, const RegionInputs& in,
                      const RegionOutputs<A>& out, const Scratch<A>& scratch, const RoiAlignSpec& align,
                      const LossSpec& spec, const Target& target);

// The same from features that are already pooled. `grad`: of A, written completely; absent when not wanted.
template <class A>
Status pooled_distill(const PooledTensor& student, const PooledTensor& teacher, const PooledTensor& grad,
                      const RegionInputs& in, const RegionOutputs<A>& out, const Scratch<A>& scratch,
                      const LossSpec& spec, const Target& target);

// The same without features: the feature term is 0.
template <class A>
Status head_distill(const RegionInputs& in, const RegionOutputs<A>& out, const Scratch<A>& scratch,
                    const LossSpec& spec, const Target& target);

// Pools `regions` regions of every level, `proposals` (R, 5), `levels` (R,), in one launch into `pooled`: (R, C,
// pooled_h, pooled_w), contiguous, of the features' dtype. Rows of invalid regions are zero.
Status roi_align(const Pyramid& features, const Table& proposals, const GivenLevels& levels, int64_t regions,
                 void* pooled, const RoiAlignSpec& align, const Target& target);

// The gradient of pooled features. `packed`: (R, chunks, pooled_h * pooled_w, 128 bytes of A), of which a chunk has as
// many channels as 128 bytes hold, and there are as many chunks as the level with most channels needs. `loose`: (R, C,
// pooled_h, pooled_w) of `dtype`, contiguous, of which `packed` is made first; null: it is made.
template <class A>
struct PooledGradient {
  A* packed;
  const void* loose;
  DType dtype;
};

// Gradient of roi_align, times `factor`, one element, or null for one, without atomics, in an order that depends on the
// regions alone: bitwise repeatable. Every element of `grad`, of any dtype, is written, or added to. Regions whose row
// of `open` (R, 3; column 0) is false are left out; null: none. `plan`: scratch of gather_plan() elements. Two
// launches.
template <class A>
Status roi_align_gather(const Pyramid& grad, bool add, const Table& proposals, const GivenLevels& levels,
                        int64_t regions, const bool* open, const PooledGradient<A>& pooled, const A* factor, A* plan,
                        const RoiAlignSpec& align, const Target& target);
template <class A>
int64_t gather_plan(const Pyramid& grad, int64_t regions, const RoiAlignSpec& align);

// Gaussian-mask loss, one pass. `boxes`: (count, 5) image index, x1, y1, x2, y2. Writes `mask_sums`, (levels,), and
// `loss`, one element.
template <class A>
Status gaussian_feature_loss(const Pyramid& student, const Pyramid& teacher, const Table& boxes, int64_t count,
                             double sigma_squared, const Scratch<double>& scratch, double* mask_sums, A* loss,
                             const Target& target);

// Its gradient: `grad`, maps of any dtype with the student's shapes, is written completely; `mask_sums`, (levels,), are
// those of the forward pass, `upstream` is one element.
template <class A>
Status gaussian_feature_loss_backward(const Pyramid& student, const Pyramid& teacher, const Pyramid& grad,
                                      const Table& boxes, int64_t count, double sigma_squared, const double* mask_sums,
                                      const A* upstream, const Target& target);

// Divergence of the distributions of boxes' sides, one pass, with 4 R elements of Scratch::partial. Writes `loss`, one
// element, or (R,) with Reduction::none, and `factor`, one element, by which the gradient of a reduced loss is to be
// multiplied.
template <class A>
Status distribution_distill_loss(const DistributionInputs& in, const Scratch<A>& scratch, A* loss, A* factor,
                                 const Target& target);

// Its gradient: `upstream`, (R,), of every region's term; `grad`, (R, 4, bins), contiguous, is written completely.
template <class A>
Status distribution_distill_loss_backward(const DistributionInputs& in, const Table& upstream, A* grad,
                                          const Target& target);

// A contiguous gradient of A and what it is to be multiplied by, both single elements of A; null `factor`: one. `to`,
// of any dtype, may be the gradient itself.
struct Scaling {
  void* to;
  DType dtype;
  const void* gradient;
  int64_t count;
  const void *upstream, *factor;
};

constexpr int kMaxScalings = 3;  // the terms of a loss

// All of them in one launch.
template <class A>
Status scale_gradients(const Scaling* scalings, int count, const Target& target);

// Elements of Scratch::partial for the Gaussian-mask loss.
int64_t gaussian_partials(const Pyramid& student);

}  // namespace tardkd::cuda
