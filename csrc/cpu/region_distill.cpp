#include <vector>

#include "bin_weights.h"
#include "kernels.h"
#include "plan.h"
#include "pool.h"
#include "region_terms.h"

namespace tardkd::cpu {
namespace {

bool same_strides(const FeatureMap& a, const FeatureMap& b) {
  return a.stride_n == b.stride_n && a.stride_c == b.stride_c && a.stride_h == b.stride_h && a.stride_w == b.stride_w;
}

// Whether the difference of the two sides can be taken while they are read.
bool same_geometry(const Pyramid& a, const Pyramid& b) {
  if (a.levels != b.levels || a.dtype != b.dtype) return false;
  for (int32_t level = 0; level < a.levels; ++level)
    if (!same_extent(a.level[level], b.level[level]) || !same_strides(a.level[level], b.level[level])) return false;
  return true;
}

}  // namespace

template <class A>
void region_distill(const Pyramid& student, const Pyramid& teacher, const Pyramid* grad, bool add,
                    const RegionInputs& in, const RegionOutputs<A>& out, const RoiAlignSpec& align,
                    const LossSpec& spec, int threads) {
  const RegionTerms<A> terms(in, out, spec, threads);
  const LevelChoice student_levels = level_choice(student, in.student_levels);
  const LevelChoice teacher_levels = teacher_choice(student_levels, teacher, in.teacher_levels);
  const bool normed = student.level[0].norm != nullptr;  // of each side by itself
  const bool shared = !normed && same_geometry(student, teacher) && student_levels == teacher_levels;
  const PoolPlan<A> plan(student, shared ? nullptr : &teacher, in.proposals, student_levels, teacher_levels, in.regions,
                         out.gates, align, threads);
  const int64_t open = plan.regions.size();
  const int32_t bins = align.pooled_h * align.pooled_w;
  const auto per_element = [&](const PooledRegion<A>& region) {
    return A(1) / (A(student.level[region.student.level].channels) * A(bins));
  };

  std::vector<A> slope(open), bin_weights(spec.bin_weight == BinWeight::gaussian ? open * bins : 0);
  for (int64_t r = 0; r < open; ++r) {
    const int64_t region = plan.regions[r].region;
    slope[r] = terms.feature_factor(region) * per_element(plan.regions[r]);
    if (!bin_weights.empty())
      write_bin_weights(in, region, spec, align.pooled_h, align.pooled_w, &bin_weights[r * bins]);
  }

  PoolJob<A> job = pool_job(student, plan, align);
  job.teacher = &teacher;
  job.grad = grad;
  job.add = add;
  job.same_geometry = shared;
  job.feature_loss = spec.feature_loss;
  job.beta = static_cast<A>(spec.beta);
  job.bin_weights = bin_weights.empty() ? nullptr : bin_weights.data();
  job.slope = slope.data();
  const int32_t blocks = channel_blocks(job);
  std::vector<A> partial(blocks * open);
  job.partial = partial.data();
  run_pool(job, threads);
  if (normed && grad) backward_through_norms<A>(student, *grad, threads);

  std::vector<A> feature(in.regions);
  for (int64_t r = 0; r < open; ++r) {
    double sum = 0;
    for (int32_t block = 0; block < blocks; ++block) sum += partial[block * open + r];
    feature[plan.regions[r].region] = static_cast<A>(sum * per_element(plan.regions[r]));
  }
  terms.write_losses(feature);
}

#define TARDKD_INSTANTIATE(A)                                                                                \
  template void region_distill<A>(const Pyramid&, const Pyramid&, const Pyramid*, bool, const RegionInputs&, \
                                  const RegionOutputs<A>&, const RoiAlignSpec&, const LossSpec&, int)
TARDKD_INSTANTIATE(float);
TARDKD_INSTANTIATE(double);

}  // namespace tardkd::cpu
