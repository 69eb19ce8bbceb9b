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

  // `proposals`: (count, 5) of float64; of the levels, (count,), the given ones. `open`: (count, 3) gates of which
  // column 0 selects regions, or null for all valid ones. `teacher` is null where only the student's windows are
  // wanted: for plain RoIAlign, or where both sides share their geometry.
  PoolPlan(const Pyramid& student, const Pyramid* teacher, const Table& proposals, const LevelChoice& student_levels,
           const LevelChoice& teacher_levels, int64_t count, const bool* open, const RoiAlignSpec& align, int threads);

 private:
  std::vector<int32_t> integers_;
  std::vector<A> weights_;
};

// Channels handled together: a whole cache line of them where they are consecutive in memory.
int32_t lanes_for(const Pyramid& student);

}  // namespace tardkd::cpu
