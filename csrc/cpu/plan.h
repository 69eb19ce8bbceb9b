// Turns regions into the compact per-axis tap lists that the inner loops walk, grouped by image and level.
#pragma once

#include <cstdint>
#include <vector>

#include "../core/axis.h"
#include "hot.h"

namespace tardkd::cpu {

template <class A>
struct PoolPlan {
  std::vector<PooledRegion<A>> regions;
  std::vector<int64_t> group_begin;
  int32_t max_span = 0;

  // `open`: (R, 3) gates of which column 0 selects regions, or null for all valid ones.
  // `teacher` null: only the student's windows (plain RoIAlign, or both sides share their geometry).
  PoolPlan(const Pyramid& student, const Pyramid* teacher, const double* proposals, int64_t count, const bool* open,
           const RoiAlignSpec& spec, int threads);

 private:
  std::vector<int32_t> integers_;
  std::vector<A> weights_;
};

// Channels handled together: a whole cache line of them where they are consecutive in memory.
int32_t lanes_for(const Pyramid& student);

}  // namespace tardkd::cpu
