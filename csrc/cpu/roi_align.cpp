#include <cstring>

#include "kernels.h"
#include "plan.h"
#include "pool.h"

namespace tardkd::cpu {

template <class A>
void roi_align(const Pyramid& features, const Table& proposals, const GivenLevels& levels, int64_t regions, A* pooled,
               const RoiAlignSpec& align, int threads) {
  const PoolPlan<A> plan(features, nullptr, proposals, level_choice(features, levels), LevelChoice{}, regions, nullptr,
                         align, threads);
  if (static_cast<int64_t>(plan.regions.size()) < regions)
    std::memset(pooled, 0, sizeof(A) * regions * features.max_channels * align.pooled_h * align.pooled_w);
  PoolJob<A> job = pool_job(features, plan, align);
  job.pooled = pooled;
  run_pool(job, threads);
}

template <class A>
void roi_align_backward(const Pyramid& grad, const Table& proposals, const GivenLevels& levels, int64_t regions,
                        const A* grad_pooled, const RoiAlignSpec& align, int threads) {
  const PoolPlan<A> plan(grad, nullptr, proposals, level_choice(grad, levels), LevelChoice{}, regions, nullptr, align,
                         threads);
  PoolJob<A> job = pool_job(grad, plan, align);
  job.grad = &grad;
  job.grad_pooled = grad_pooled;
  run_pool(job, threads);
}

#define TARDKD_INSTANTIATE(A)                                                                                          \
  template void roi_align<A>(const Pyramid&, const Table&, const GivenLevels&, int64_t, A*, const RoiAlignSpec&, int); \
  template void roi_align_backward<A>(const Pyramid&, const Table&, const GivenLevels&, int64_t, const A*,             \
                                      const RoiAlignSpec&, int)
TARDKD_INSTANTIATE(float);
TARDKD_INSTANTIATE(double);

}  // namespace tardkd::cpu
