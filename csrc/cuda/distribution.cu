// The divergence of the distributions that two heads have for the sides of boxes. A warp is one side of a region's box.
//
// A region whose gate is closed reads no logit. The last block to finish adds the terms up in a fixed order.
#include "../core/classification.h"
#include "kernels.h"
#include "primitives.cuh"
#include "region.cuh"

namespace tardkd::cuda {
namespace {

constexpr int kSides = 4;
constexpr int kWarps = kThreads / kWarp;

template <class A>
struct LossTask {
  DistributionInputs in;
  Scratch<A> scratch;
  A *loss, *factor;
};

template <class A>
struct GradientTask {
  DistributionInputs in;
  Table upstream;  // (R,)
  A* grad;         // (R, 4, bins)
};

__device__ __forceinline__ bool is_open(const DistributionInputs& in, int64_t r) {
  return in.gates[r * in.gate_stride];
}

template <class A>
__device__ __forceinline__ A weight(const DistributionInputs& in, int64_t r) {
  const Table& table = in.region_weights;
  return table.data ? load_any<A>(table.data, table.dtype, r * table.stride_row) : A(1);
}

// A side of region r's box as both heads see it, at the call's temperature; by one warp.
template <class A>
struct Side {
  Logits<A> teacher, student;
  LogSoftmax<A> log_t, log_s;

  __device__ __forceinline__ Side(const DistributionInputs& in, int64_t r, int side, A temperature)
      : teacher(in.teacher, r, side),
        student(in.student, r, side),
        log_t(log_softmax(teacher, A(1) / temperature)),
        log_s(log_softmax(student, A(1) / temperature)) {}
};

// By the last block: the sum of the sides of every region, which are the rows of `partial`, and of all regions.
template <class A>
__device__ void finish(const LossTask<A>& task, const Shared<double>& totals) {
  const DistributionInputs& in = task.in;
  double sum = 0.0, open = 0.0;
  for (int64_t r = threadIdx.x; r < in.regions; r += kThreads) {
    double value = 0.0;
    for (int side = 0; side < kSides; ++side) value += load_fresh(&task.scratch.partial[kSides * r + side]);
    if (in.reduction == Reduction::none) task.loss[r] = static_cast<A>(value);
    sum += value;
    open += is_open(in, r);
  }
  sum = block_sum(sum, totals);
  open = block_sum(open, totals);
  const double normaliser = in.reduction == Reduction::mean && open > 1.0 ? open : 1.0;
  if (threadIdx.x == 0) {
    if (in.reduction != Reduction::none) *task.loss = static_cast<A>(sum / normaliser);
    *task.factor = static_cast<A>(1.0 / normaliser);
  }
}

template <class A>
__global__ void __launch_bounds__(kThreads) distribution_loss_kernel(const __grid_constant__ LossTask<A> task) {
  SharedArena arena;
  const Shared<double> totals = arena.take<double>(kWarps);
  const Shared<int32_t> flag = arena.take<int32_t>(1);
  const DistributionInputs& in = task.in;
  const int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp, r = row / kSides;
  const int lane = threadIdx.x % kWarp;
  if (r < in.regions) {
    A sum = A(0);
    if (is_open(in, r)) {
      const A temperature = static_cast<A>(in.temperature);
      const Side<A> side(in, r, int(row % kSides), temperature);
#pragma unroll 1
      for (int k = lane; k < in.student.bins; k += kWarp) {
        const A t = side.log_t(side.teacher[k]);
        sum += kl_term(exp(t), t, side.log_s(side.student[k]));
      }
      sum = warp_sum(sum) * temperature * temperature * weight<A>(in, r) / A(kSides);
    }
    if (lane == 0) task.scratch.partial[row] = sum;
  }
  if (last_block(task.scratch.done, int32_t(gridDim.x), flag)) finish(task, totals);
}

template <class A>
__global__ void __launch_bounds__(kThreads) distribution_gradient_kernel(const __grid_constant__ GradientTask<A> task) {
  const DistributionInputs& in = task.in;
  const int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp, r = row / kSides;
  if (r >= in.regions) return;
  const int lane = threadIdx.x % kWarp;
  A* grad = task.grad + row * in.student.bins;
  if (!is_open(in, r)) {
    for (int k = lane; k < in.student.bins; k += kWarp) grad[k] = A(0);
    return;
  }
  const A temperature = static_cast<A>(in.temperature);
  const A upstream = load_any<A>(task.upstream.data, task.upstream.dtype, r * task.upstream.stride_row);
  const A slope = temperature * upstream * weight<A>(in, r) / A(kSides);
  const Side<A> side(in, r, int(row % kSides), temperature);
#pragma unroll 1
  for (int k = lane; k < in.student.bins; k += kWarp)
    grad[k] = slope * (exp(side.log_s(side.student[k])) - exp(side.log_t(side.teacher[k])));
}

// Blocks for all sides of all regions.
int64_t blocks_of(const DistributionInputs& in) { return (kSides * in.regions + kWarps - 1) / kWarps; }

}  // namespace

template <class A>
Status distribution_distill_loss(const DistributionInputs& in, const Scratch<A>& scratch, A* loss, A* factor,
                                 const Target& target) {
  const LossTask<A> task{in, scratch, loss, factor};
  // Without regions one block still writes the loss.
  return launch_on(target, "distribution_distill_loss", distribution_loss_kernel<A>, in.regions > 0 ? blocks_of(in) : 1,
                   shared_bytes<double>(kWarps) + shared_bytes<int32_t>(1), task);
}

template <class A>
Status distribution_distill_loss_backward(const DistributionInputs& in, const Table& upstream, A* grad,
                                          const Target& target) {
  const GradientTask<A> task{in, upstream, grad};
  return launch_on(target, "distribution_distill_loss_backward", distribution_gradient_kernel<A>, blocks_of(in), 0,
                   task);
}

#define TARDKD_INSTANTIATE(A)                                                                                        \
  template Status distribution_distill_loss<A>(const DistributionInputs&, const Scratch<A>&, A*, A*, const Target&); \
  template Status distribution_distill_loss_backward<A>(const DistributionInputs&, const Table&, A*, const Target&)
TARDKD_INSTANTIATE(float);
TARDKD_INSTANTIATE(double);

}  // namespace tardkd::cuda
