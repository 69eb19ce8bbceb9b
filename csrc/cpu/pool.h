// Runs the pooling loops over all tasks of a job.
#pragma once

#include "hot.h"
#include "plan.h"

namespace tardkd::cpu {

// A job over the student's maps and the plan's regions; the caller adds what it wants computed.
template <class A>
PoolJob<A> pool_job(const Pyramid& student, const PoolPlan<A>& plan, const RoiAlignSpec& align);

template <class A>
int32_t channel_blocks(const PoolJob<A>& job) {
  return (job.student->max_channels + job.lanes - 1) / job.lanes;
}

template <class A>
void run_pool(const PoolJob<A>& job, int threads);

}  // namespace tardkd::cpu
