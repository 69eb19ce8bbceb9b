#include "pool.h"

#include "parallel.h"

namespace tardkd::cpu {

template <class A>
PoolJob<A> pool_job(const Pyramid& student, const PoolPlan<A>& plan, const RoiAlignSpec& align) {
  PoolJob<A> job{};
  job.student = &student;
  job.pooled_h = align.pooled_h;
  job.pooled_w = align.pooled_w;
  job.max_span = plan.max_span;
  job.regions = plan.regions.data();
  job.group_begin = plan.group_begin.data();
  job.lanes = lanes_for(student);
  return job;
}

template <class A>
void run_pool(const PoolJob<A>& job, int threads) {
  const Kernels<A>& hot = kernels(A());
  const int32_t levels = job.student->levels, images = job.student->images, blocks = channel_blocks(job);
  const int64_t scratch_size = hot.pool_scratch(job);
  std::vector<A> scratch(scratch_size * threads);
  // The finest level first: its maps are the largest, and the small tasks at the end even out the threads.
  for_each_task(int64_t(levels) * images * blocks, threads, [&](int64_t task, int worker) {
    const int32_t block = static_cast<int32_t>(task % blocks);
    const int32_t image = static_cast<int32_t>(task / blocks % images);
    const int32_t level = static_cast<int32_t>(task / blocks / images);
    if (block * job.lanes >= job.student->level[level].channels) return;
    const int64_t group = int64_t(image) * levels + level;
    const bool fills = job.grad && !job.add;
    if (fills || job.group_begin[group] != job.group_begin[group + 1])
      hot.pool_task(job, image, level, block, scratch.data() + worker * scratch_size);
  });
}

#define TARDKD_INSTANTIATE(A)                                                               \
  template PoolJob<A> pool_job<A>(const Pyramid&, const PoolPlan<A>&, const RoiAlignSpec&); \
  template void run_pool<A>(const PoolJob<A>&, int)
TARDKD_INSTANTIATE(float);
TARDKD_INSTANTIATE(double);

}  // namespace tardkd::cpu
