// The weights of a region's bins in its feature term.
#pragma once

#include "../core/region.h"

namespace tardkd::cpu {

// Writes region `region`'s Gaussian bin weights to `out`, (pooled_h, pooled_w).
template <class A>
void write_bin_weights(const RegionInputs& in, int64_t region, const LossSpec& spec, int32_t pooled_h, int32_t pooled_w,
                       A* out) {
  const double* box = dense_row<double>(in.proposals, region) + 1;
  const double* gt_box = dense_row<double>(in.gt_boxes, region);
  const bool background = is_background(in.labels[region * in.label_stride],
                                        num_classes(in.logit_columns, spec.activation), spec.background);
  for (int32_t i = 0; i < pooled_h; ++i)
    for (int32_t j = 0; j < pooled_w; ++j)
      *out++ = static_cast<A>(gaussian_bin_weight(background, box, gt_box, i, j, pooled_h, pooled_w));
}

}  // namespace tardkd::cpu
