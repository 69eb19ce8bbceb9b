// The region losses of what the heads say, without features, in one launch: a block is a region.
#include "kernels.h"
#include "region.cuh"

namespace tardkd::cuda {
namespace {

// Three blocks a multiprocessor: bound by none or by four, ptxas for sm_90 spills. Double is there for checks.
template <class A>
__global__ void __launch_bounds__(kThreads, sizeof(A) == 4 ? 3 : 2)
    head_distill_kernel(const __grid_constant__ RegionTask<A> task) {
  SharedArena arena;
  RegionShared<A> heads;
  heads.take(arena);
  const int64_t r = blockIdx.x;
  run_region<A>(task, r, 0, heads, [&] {
    decide_region<A>(task, r, true, heads);
    return A(0);
  });
}

}  // namespace

template <class A>
Status head_distill(const RegionInputs& in, const RegionOutputs<A>& out, const Scratch<A>& scratch,
                    const LossSpec& spec, const Target& target) {
  const RegionTask<A> task{in, out, scratch, spec, 1};
  // Without regions one block still writes the losses.
  return launch_on(target, "head_distill", head_distill_kernel<A>, in.regions > 0 ? in.regions : 1,
                   RegionShared<A>::bytes(), task);
}

#define TARDKD_INSTANTIATE(A)                                                                                       \
  template Status head_distill<A>(const RegionInputs&, const RegionOutputs<A>&, const Scratch<A>&, const LossSpec&, \
                                  const Target&)
TARDKD_INSTANTIATE(float);
TARDKD_INSTANTIATE(double);

}  // namespace tardkd::cuda
