// What a block decides about its region before it reads any feature, and the sums over all regions at the end.
//
// One block per region and group of channels; every function is called by all threads of a block of kThreads, except
// where a warp is named.
#pragma once

#include "../core/classification.h"
#include "../core/penalty.h"
#include "../core/region.h"
#include "kernels.h"
#include "primitives.cuh"

namespace tardkd::cuda {

// What the kernels of the region losses are given besides the features.
template <class A>
struct RegionTask {
  RegionInputs in;
  RegionOutputs<A> out;
  Scratch<A> scratch;
  LossSpec spec;
  int32_t groups;  // of channels: blocks a region
};

struct Decision {
  Gates gates;
  RegionState state;
  int32_t image;         // 0 where it is not checked or the region is invalid
  double box[4], gt[4];  // xyxy; `gt` means something for foreground regions only
  int64_t label;
};

// Shared arrays of the functions below. `sums` and `flag` are free for block_sum and last_block between their calls.
template <class A>
struct RegionShared {
  Shared<A> scores, sums;
  Shared<double> totals;
  Shared<int32_t> flag;

  __device__ void take(SharedArena& arena) {
    scores = arena.take<A>(4);
    sums = arena.take<A>(kThreads / kWarp);
    totals = arena.take<double>(kThreads / kWarp);
    flag = arena.take<int32_t>(1);
  }
  static constexpr size_t bytes() {
    return shared_bytes<A>(4) + shared_bytes<A>(kThreads / kWarp) + shared_bytes<double>(kThreads / kWarp) +
           shared_bytes<int32_t>(1);
  }
};

// ---- reading tables ------------------------------------------------------------------------------------------------

// N elements of a row from column `first` on.
template <int N, class A>
__device__ __forceinline__ void load_row(const Table& table, int64_t row, int64_t first, A (&to)[N]) {
  with_dtype(table.dtype, [&](auto stored) {
    const auto* from = static_cast<const decltype(stored)*>(table.data) + row * table.stride_row;
#pragma unroll
    for (int k = 0; k < N; ++k) to[k] = as<A>(read(from + (first + k) * table.stride_column));
  });
}

template <class A>
__device__ __forceinline__ A region_weight(const RegionInputs& in, int64_t r) {
  const Table& table = in.region_weights;
  return table.data ? load_any<A>(table.data, table.dtype, r * table.stride_row) : A(1);
}

// Factor of region r's gradients of term 0, 1, 2, without the normaliser. For open gates: the weight and the upstream
// gradient of a closed one are not to be looked at.
template <class A>
__device__ __forceinline__ A term_factor(const RegionInputs& in, int term, int64_t r) {
  const Table& up = in.upstream;
  const A upstream = up.data ? load_any<A>(up.data, up.dtype, term * up.stride_row + r * up.stride_column) : A(1);
  return upstream * region_weight<A>(in, r);
}

template <class A>
__device__ __forceinline__ A feature_factor(const RegionInputs& in, int64_t r) {
  return term_factor<A>(in, 0, r);
}

// One row of logits.
template <class A>
struct Logits {
  const void* data;
  DType dtype;
  int64_t first, stride;
  int32_t columns;

  __device__ __forceinline__ Logits(const Table& table, int64_t row, int32_t columns)
      : data(table.data),
        dtype(table.dtype),
        first(row * table.stride_row),
        stride(table.stride_column),
        columns(columns) {}

  // Those of one side of region r's box.
  __device__ __forceinline__ Logits(const Distributions& of, int64_t r, int side)
      : data(of.data),
        dtype(of.dtype),
        first(r * of.stride_region + side * of.stride_side),
        stride(of.stride_bin),
        columns(of.bins) {}

  __device__ __forceinline__ A operator[](int64_t column) const {
    return load_any<A>(data, dtype, first + column * stride);
  }

  // Deals the columns out to the lanes of a warp, kInFlight loads of each lane at a time.
  template <int kInFlight, class F>
  __device__ __forceinline__ void each(const F& f) const {
    with_dtype(dtype, [&](auto stored) {
      const auto* from = static_cast<const decltype(stored)*>(data) + first;
#pragma unroll kInFlight
      for (int k = threadIdx.x % kWarp; k < columns; k += kWarp) f(as<A>(read(from + k * stride)));
    });
  }
};

// log softmax(z / temperature) of a row.
template <class A>
struct LogSoftmax {
  A top, inverse_temperature, log_sum;

  __device__ __forceinline__ A operator()(A z) const { return (z - top) * inverse_temperature - log_sum; }
};

// By one warp. Not inlined: it is used four times, and what it does takes longer than a call.
template <class A>
__device__ __noinline__ LogSoftmax<A> log_softmax(Logits<A> z, A inverse_temperature) {
  A top = z[0], sum = A(0);
  z.template each<4>([&](A value) { top = value > top ? value : top; });
  top = warp_max(top);
  z.template each<1>([&](A value) { sum += exp((value - top) * inverse_temperature); });
  return LogSoftmax<A>{top, inverse_temperature, log(warp_sum(sum))};
}

// ---- decision ------------------------------------------------------------------------------------------------------

// A model's score of the region's own class, as `given` or else the probability, 0 where none is needed; by one warp.
template <class A>
__device__ A own_score(const Table& given, const Logits<A>& z, int64_t r, const Decision& region,
                       const LossSpec& spec) {
  if (given.data) return region.state.valid ? load_any<A>(given.data, given.dtype, r * given.stride_row) : A(0);
  if (spec.activation == Activation::softmax) {
    if (!region.state.valid) return A(0);
    const LogSoftmax<A> log_p = log_softmax(z, A(1));
    return exp(log_p(z[region.label]));
  }
  return region.state.foreground ? sigmoid(z[sigmoid_column(region.label, spec.background)]) : A(0);
}

// The four deltas of the region's own class; `first`, their column.
template <class A>
__device__ int64_t own_deltas(const Table& deltas, int32_t columns, int64_t r, const Decision& region, int32_t classes,
                              Background background, A (&own)[4]) {
  const int64_t first = delta_column(region.label, columns, classes, background);
  load_row(deltas, r, first, own);
  return first;
}

// Classification term and the gradient of the student's logits; by one warp.
template <class A>
__device__ void write_classification(const RegionTask<A>& task, int64_t r, bool open) {
  const RegionInputs& in = task.in;
  const RegionOutputs<A>& out = task.out;
  const LossSpec& spec = task.spec;
  const int lane = threadIdx.x % kWarp, columns = in.logit_columns;
  A* grad = out.grad_logits ? out.grad_logits + r * columns : nullptr;
  A sum = A(0);
  if (open) {
    const Logits<A> teacher(in.teacher_logits, r, columns), student(in.student_logits, r, columns);
    const A temperature = static_cast<A>(spec.temperature), inverse = A(1) / temperature;
    const A slope = grad ? temperature * term_factor<A>(in, 1, r) : A(0);
    if (spec.activation == Activation::softmax) {
      const LogSoftmax<A> log_t = log_softmax(teacher, inverse), log_s = log_softmax(student, inverse);
#pragma unroll 1
      for (int k = lane; k < columns; k += kWarp) {
        const A t = log_t(teacher[k]), s = log_s(student[k]), p = exp(t);
        sum += kl_term(p, t, s);
        if (grad) grad[k] = slope * (exp(s) - p);
      }
    } else {
#pragma unroll 1
      for (int k = lane; k < columns; k += kWarp) {
        const A t = teacher[k] * inverse, s = student[k] * inverse;
        sum += binary_kl(t, s);
        if (grad) grad[k] = slope * (sigmoid(s) - sigmoid(t));
      }
    }
    sum = warp_sum(sum) * temperature * temperature * region_weight<A>(in, r);
  } else if (grad) {
    for (int k = lane; k < columns; k += kWarp) grad[k] = A(0);
  }
  if (lane == 0) task.scratch.partial[r] = sum;
}

// Regression term and the gradient of the student's deltas; by one warp.
template <class A>
__device__ void write_regression(const RegionTask<A>& task, int64_t r, const Decision& region) {
  const RegionInputs& in = task.in;
  const RegionOutputs<A>& out = task.out;
  const LossSpec& spec = task.spec;
  const int lane = threadIdx.x % kWarp, columns = in.student_delta_columns;
  int64_t first = 0;
  A slopes[4] = {}, sum = A(0);
  if (region.gates.regression) {
    const int32_t classes = num_classes(in.logit_columns, spec.activation);
    A student[4], teacher[4];
    first = own_deltas(in.student_deltas, columns, r, region, classes, spec.background, student);
    own_deltas(in.teacher_deltas, in.teacher_delta_columns, r, region, classes, spec.background, teacher);
    const BoxFrame<A> frame(region.box, spec);
    A difference[4];
    frame.subtract(student, teacher, difference);
    const A beta = static_cast<A>(spec.beta), factor = out.grad_deltas ? term_factor<A>(in, 2, r) : A(0);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      sum += penalty(FeatureLoss::smooth_l1, difference[k], beta);
      slopes[k] = factor * penalty_slope(FeatureLoss::smooth_l1, difference[k], beta);
    }
    frame.pull_back(slopes);
    sum *= region_weight<A>(in, r);
  }
  if (out.grad_deltas)
    for (int column = lane; column < columns; column += kWarp) {
      A value = A(0);
#pragma unroll
      for (int k = 0; k < 4; ++k)
        if (column == first + k) value = slopes[k];
      out.grad_deltas[r * columns + column] = value;
    }
  if (lane == 0) task.scratch.partial[in.regions + r] = sum;
}

// Decides region r. With `write` (by one block of each region) the gates, the scores, the gradients of both heads and
// their terms (rows 0 and 1 of `partial`, weighted, 0 where closed) are written too. The three things a gate asks for
// are found by three warps at once; there is one barrier, after which every thread decides for itself, and the heads'
// results are written by two warps while the others go on. A second call takes a barrier in between.
template <class A>
__device__ Decision decide_region(const RegionTask<A>& task, int64_t r, bool write, const RegionShared<A>& shared) {
  const RegionInputs& in = task.in;
  const RegionOutputs<A>& out = task.out;
  const LossSpec& spec = task.spec;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int32_t classes = num_classes(in.logit_columns, spec.activation);
  Decision region;
  double proposal[5];
  load_row(in.proposals, r, 0, proposal);
  load_row(in.gt_boxes, r, 0, region.gt);
  region.label = read(in.labels + r * in.label_stride);
  region.state =
      with_levels(region_state(proposal, in.images, region.label, region.gt, classes, spec.background), in, r);
  region.image = region.state.valid && in.images >= 0 ? static_cast<int32_t>(proposal[0]) : 0;
#pragma unroll
  for (int k = 0; k < 4; ++k) region.box[k] = proposal[k + 1];

  if (warp < 2) {
    const Logits<A> z(warp == 0 ? in.teacher_logits : in.student_logits, r, in.logit_columns);
    const A score = own_score(warp == 0 ? in.teacher_scores : in.student_scores, z, r, region, spec);
    if (lane == 0) shared.scores[warp] = score;
  } else if (warp == 2) {
    A scores[4] = {};
    if (region.state.foreground) {
      A student[4], teacher[4];
      own_deltas(in.student_deltas, in.student_delta_columns, r, region, classes, spec.background, student);
      own_deltas(in.teacher_deltas, in.teacher_delta_columns, r, region, classes, spec.background, teacher);
      box_scores(region.box, region.gt, student, teacher, spec, scores);
    }
    if (lane < 2) shared.scores[2 + lane] = lane == 0 ? scores[2] : scores[3];
  }
  __syncthreads();

  A scores[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) scores[k] = shared.scores[k];
  region.gates = decide_gates(region.state, scores, spec);

  if (write && warp == 0) write_classification(task, r, region.gates.classification);
  if (write && warp == 1) write_regression(task, r, region);
  if (write && warp == 2) {
    if (lane < 4) out.scores[4 * r + lane] = shared.scores[lane];
    if (lane == 0) {
      out.gates[3 * r] = region.gates.feature;
      out.gates[3 * r + 1] = region.gates.classification;
      out.gates[3 * r + 2] = region.gates.regression;
    }
  }
  return region;
}

// Weight of bin (i, j) of a region with an open feature gate.
template <class A>
__device__ __forceinline__ A bin_weight(const Decision& region, const LossSpec& spec, int32_t i, int32_t j,
                                        int32_t pooled_h, int32_t pooled_w) {
  if (spec.bin_weight == BinWeight::uniform) return A(1);
  return static_cast<A>(gaussian_bin_weight(!region.state.foreground, region.box, region.gt, i, j, pooled_h, pooled_w));
}

// ---- sums over the regions -----------------------------------------------------------------------------------------

// By the last block, once all of `partial` and the gates are written: the losses, and the factors that stand for the
// normalisers. Rows of `partial`, R elements each: the weighted classification term, the weighted regression term, and
// for each group of channels its share of the weighted feature term; 0 where the gate is closed. The
// order of the additions depends on the number of regions alone.
template <class A>
__device__ void finish_losses(const RegionTask<A>& task, const RegionShared<A>& shared) {
  const RegionOutputs<A>& out = task.out;
  const Reduction reduction = task.spec.reduction;
  const int64_t regions = task.in.regions;
  const A* partial = task.scratch.partial;
  double sums[3] = {}, open[3] = {};
  for (int64_t r = threadIdx.x; r < regions; r += kThreads) {
    double feature = 0.0;
    for (int group = 0; group < task.groups; ++group) feature += load_fresh(&partial[(2 + group) * regions + r]);
    const double values[3] = {feature, double(load_fresh(&partial[r])), double(load_fresh(&partial[regions + r]))};
#pragma unroll
    for (int term = 0; term < 3; ++term) {
      sums[term] += values[term];
      open[term] += load_fresh(&out.gates[3 * r + term]);
      if (reduction == Reduction::none) out.losses[term][r] = static_cast<A>(values[term]);
    }
  }
#pragma unroll
  for (int term = 0; term < 3; ++term) {
    const double sum = block_sum(sums[term], shared.totals), count = block_sum(open[term], shared.totals);
    const double normaliser = reduction == Reduction::mean && count > 1.0 ? count : 1.0;
    if (threadIdx.x == 0) {
      if (reduction != Reduction::none) *out.losses[term] = static_cast<A>(sum / normaliser);
      out.factors[term] = static_cast<A>(1.0 / normaliser);
    }
  }
}

// The frame of the kernels of the region losses, for one region and group of channels. term() decides the region's
// gates and returns the group's share of the weighted feature term; the last block to finish adds everything up.
template <class A, class Term>
__device__ __forceinline__ void run_region(const RegionTask<A>& task, int64_t region, int32_t group,
                                           const RegionShared<A>& shared, const Term& term) {
  if (region < task.in.regions) {
    const A sum = term();
    if (threadIdx.x == 0) task.scratch.partial[(2 + group) * task.in.regions + region] = sum;
  }
  if (last_block(task.scratch.done, int32_t(gridDim.x), shared.flag)) finish_losses(task, shared);
}

}  // namespace tardkd::cuda
