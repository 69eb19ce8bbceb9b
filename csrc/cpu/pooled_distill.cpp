#include <vector>

#include "bin_weights.h"
#include "hot.h"
#include "kernels.h"
#include "parallel.h"
#include "region_terms.h"

namespace tardkd::cpu {

template <class A>
void pooled_distill(const PooledTensor& student, const PooledTensor& teacher, const PooledTensor& grad,
                    int32_t channels, int32_t pooled_h, int32_t pooled_w, const RegionInputs<A>& in,
                    const RegionOutputs<A>& out, const LossSpec& spec, int threads) {
  const RegionTerms<A> terms(in, out, spec, threads);
  const int32_t bins = pooled_h * pooled_w;
  const A per_region = A(1) / (A(channels) * A(bins));
  std::vector<A> slope(in.regions), feature(in.regions);
  std::vector<A> bin_weights(spec.bin_weight == BinWeight::gaussian ? in.regions * bins : 0);
  for (int64_t r = 0; r < in.regions; ++r)
    if (out.gates[3 * r]) {
      slope[r] = terms.feature_factor(r) * per_region;
      if (!bin_weights.empty()) write_bin_weights(in, r, spec, pooled_h, pooled_w, &bin_weights[r * bins]);
    }

  PooledLossJob<A> job{};
  job.student = student.data;
  job.teacher = teacher.data;
  job.student_dtype = student.dtype;
  job.teacher_dtype = teacher.dtype;
  for (int axis = 0; axis < 3; ++axis) {
    job.student_strides[axis] = student.strides[axis];
    job.teacher_strides[axis] = teacher.strides[axis];
    job.grad_strides[axis] = grad.strides[axis];
  }
  job.channels = channels;
  job.bins = bins;
  job.feature_loss = spec.feature_loss;
  job.beta = static_cast<A>(spec.beta);
  job.bin_weights = bin_weights.empty() ? nullptr : bin_weights.data();
  job.open = out.gates;
  job.slope = slope.data();
  job.sums = feature.data();
  job.grad = static_cast<A*>(grad.data);
  const Kernels<A>& hot = kernels(A());
  for_each_range(in.regions, 8, threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) hot.pooled_loss_region(job, r);
  });
  for (A& value : feature) value *= per_region;
  terms.write_losses(feature);
}

template void pooled_distill<float>(const PooledTensor&, const PooledTensor&, const PooledTensor&, int32_t, int32_t,
                                    int32_t, const RegionInputs<float>&, const RegionOutputs<float>&, const LossSpec&,
                                    int);
template void pooled_distill<double>(const PooledTensor&, const PooledTensor&, const PooledTensor&, int32_t, int32_t,
                                     int32_t, const RegionInputs<double>&, const RegionOutputs<double>&,
                                     const LossSpec&, int);

}  // namespace tardkd::cpu
