#include <vector>

#include "bin_weights.h"
#include "hot.h"
#include "kernels.h"
#include "parallel.h"
#include "region_terms.h"

namespace tardkd::cpu {

namespace {

// Regions as images, and their bins as a row of pixels.
Pyramid as_pyramid(const PooledTensor& pooled, int64_t regions) {
  Pyramid pyramid{};
  pyramid.levels = 1;
  pyramid.images = static_cast<int32_t>(regions);
  pyramid.max_channels = pooled.channels;
  pyramid.dtype = pooled.dtype;
  const auto& [of_region, of_channel, of_bin] = pooled.strides;
  const int32_t bins = pooled.pooled_h * pooled.pooled_w;
  pyramid.level[0] =
      FeatureMap{pooled.data, of_region, of_channel, 0, of_bin, 1, bins, 1.0, pooled.channels, pooled.norm};
  return pyramid;
}

}  // namespace

template <class A>
void pooled_distill(const PooledTensor& student, const PooledTensor& teacher, const PooledTensor& grad,
                    const RegionInputs& in, const RegionOutputs<A>& out, const LossSpec& spec, int threads) {
  const RegionTerms<A> terms(in, out, spec, threads);
  const int32_t bins = student.pooled_h * student.pooled_w;
  const A per_region = A(1) / (A(student.channels) * A(bins));
  std::vector<A> slope(in.regions), feature(in.regions);
  std::vector<A> bin_weights(spec.bin_weight == BinWeight::gaussian ? in.regions * bins : 0);
  for (int64_t r = 0; r < in.regions; ++r)
    if (out.gates[3 * r]) {
      slope[r] = terms.feature_factor(r) * per_region;
      if (!bin_weights.empty())
        write_bin_weights(in, r, spec, student.pooled_h, student.pooled_w, &bin_weights[r * bins]);
    }

  PooledLossJob<A> job{};
  job.student = student;
  job.teacher = teacher;
  job.grad = grad;
  job.feature_loss = spec.feature_loss;
  job.beta = static_cast<A>(spec.beta);
  job.bin_weights = bin_weights.empty() ? nullptr : bin_weights.data();
  job.open = out.gates;
  job.slope = slope.data();
  job.sums = feature.data();
  const Kernels<A>& hot = kernels(A());
  for_each_range(in.regions, 8, threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) hot.pooled_loss_region(job, r);
  });
  if (student.norm && grad.data)
    backward_through_norms<A>(as_pyramid(student, in.regions), as_pyramid(grad, in.regions), threads);
  for (A& value : feature) value *= per_region;
  terms.write_losses(feature);
}

#define TARDKD_INSTANTIATE(A)                                                                                         \
  template void pooled_distill<A>(const PooledTensor&, const PooledTensor&, const PooledTensor&, const RegionInputs&, \
                                  const RegionOutputs<A>&, const LossSpec&, int)
TARDKD_INSTANTIATE(float);
TARDKD_INSTANTIATE(double);

}  // namespace tardkd::cpu
