#pragma once

#include "../core/region.h"

namespace tardkd::cpu {

// Gaussian of a region's matched ground-truth box at its bin centres, (pooled_h, pooled_w); 0 for background regions,
// which have no such box.
template <class A>
void write_bin_weights(const RegionInputs<A>& in, int64_t region, const LossSpec& spec, int32_t pooled_h,
                       int32_t pooled_w, A* out) {
  const double* box = in.proposals + 5 * region + 1;
  const double* gt = in.gt_boxes + 4 * region;
  const bool background =
      is_background(in.labels[region], num_classes(in.logit_columns, spec.activation), spec.background);
  for (int32_t i = 0; i < pooled_h; ++i)
    for (int32_t j = 0; j < pooled_w; ++j)
      *out++ = background ? A(0)
                          : static_cast<A>(bin_gaussian(box[1], box[3], i, pooled_h, gt[1], gt[3]) *
                                           bin_gaussian(box[0], box[2], j, pooled_w, gt[0], gt[2]));
}

}  // namespace tardkd::cpu
