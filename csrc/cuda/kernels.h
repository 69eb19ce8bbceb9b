// Launchers of the CUDA kernels. Plain C++: included where no CUDA headers are.
//
// Every launcher works on the caller's stream, allocates nothing and does not wait for the device. A is the
// accumulation type: float, or double when a feature tensor is float64.
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

// (rows, columns) or, with columns ignored, (rows,); strides in elements. Data null: absent.
struct Table {
  const void* data;
  DType dtype;
  int64_t stride_row, stride_column;
};

// Everything about the regions except their features, as it lies in the caller's tensors.
struct RegionTables {
  int64_t regions;
  int32_t images;  // < 0: the image index is not checked (pooled features)
  int32_t logit_columns;
  int32_t student_delta_columns, teacher_delta_columns;  // each 4, 4 K or 4 (K + 1)
  Table proposals;                                       // (R, 5) image index, x1, y1, x2, y2; float32 or float64
  Table student_logits, teacher_logits, student_deltas, teacher_deltas;  // of any floating type
  Table gt_boxes;                                                        // (R, 4) float32 or float64
  Table region_weights;                                                  // (R,) or absent
  Table upstream;  // (3, R) gradients of the unreduced terms, or absent for ones
  const int64_t* labels;
  int64_t label_stride;
};

// Results, dense. A null gradient pointer means that gradient is not wanted.
template <class A>
struct RegionResults {
  A* losses[3];    // feature, classification, regression: a scalar each, or (R,) with Reduction::none
  bool* gates;     // (R, 3)
  A* scores;       // (R, 4)
  A* factors;      // (3,) what the gradients below, made without the division by the counts, are to be multiplied by
  A* grad_logits;  // (R, logit_columns)
  A* grad_deltas;  // (R, student_delta_columns)
  A* partial;      // scratch, region_partials() elements
  int32_t* done;   // scratch, one zero
};

// Elements of RegionResults::partial for C channels.
int64_t region_partials(int64_t regions, int32_t channels);

// Both pyramids to gates, three losses and their gradients in one launch. At most one of the two:
// `grad`: maps of A with the student's shapes, filled with zeros, to which the gradients are added by atomics;
// `grad_pooled`: (R, C, pooled_h, pooled_w) of A; the gradient with respect to the student's pooled features of
// regions with an open feature gate, for roi_align_gather; the other regions are left untouched.
template <class A>
Status region_distill(const Pyramid& student, const Pyramid& teacher, const Pyramid* grad, A* grad_pooled,
                      const RegionTables& in, const RegionResults<A>& out, const RoiAlignSpec& align,
                      const LossSpec& spec, const Target& target);

// (R, C, bins), strides in elements.
struct PooledTensor {
  void* data;
  DType dtype;
  int64_t strides[3];
};

// The same from features that are already pooled. `grad`: of A, written completely; data null when not wanted.
template <class A>
Status pooled_distill(const PooledTensor& student, const PooledTensor& teacher, const PooledTensor& grad,
                      int32_t channels, int32_t pooled_h, int32_t pooled_w, const RegionTables& in,
                      const RegionResults<A>& out, const LossSpec& spec, const Target& target);

// Pools regions of every level in one launch into (R, C, pooled_h, pooled_w), contiguous, of the features' dtype;
// rows of invalid regions are zero.
Status roi_align(const Pyramid& features, const Table& proposals, int64_t regions, void* pooled,
                 const RoiAlignSpec& align, const Target& target);

// Gradient of roi_align by atomics: `grad`, maps of A filled with zeros. `grad_pooled` (R, C, pooled_h, pooled_w),
// contiguous, any dtype.
template <class A>
Status roi_align_scatter(const Pyramid& grad, const Table& proposals, int64_t regions, const void* grad_pooled,
                         DType pooled_dtype, const RoiAlignSpec& align, const Target& target);

// The same without atomics, in an order that depends on the regions alone: bitwise repeatable, and every element of
// `grad`, of any dtype, is written. Regions whose row of `open` (R, 3; column 0) is false are left out; null: none.
// `windows`: scratch, 6 R integers. Two launches.
Status roi_align_gather(const Pyramid& grad, const Table& proposals, int64_t regions, const bool* open,
                        const void* grad_pooled, DType pooled_dtype, int32_t* windows, const RoiAlignSpec& align,
                        const Target& target);

// Gaussian-mask loss, one pass. `boxes`: (count, 5) image index, x1, y1, x2, y2, float32 or float64.
// `partial`: scratch, gaussian_partials() doubles; `done`: scratch, one zero. `mask_sums`: (levels,), written.
template <class A>
Status gaussian_feature_loss(const Pyramid& student, const Pyramid& teacher, const Table& boxes, int64_t count,
                             double sigma_squared, double* partial, int32_t* done, double* mask_sums, A* loss,
                             const Target& target);

// Its gradient: `grad`, maps of any dtype with the student's shapes, written completely; `upstream` one element of A.
template <class A>
Status gaussian_feature_loss_backward(const Pyramid& student, const Pyramid& teacher, const Pyramid& grad,
                                      const Table& boxes, int64_t count, double sigma_squared, const double* mask_sums,
                                      const A* upstream, const Target& target);

int64_t gaussian_partials(const Pyramid& student);

}  // namespace tardkd::cuda
