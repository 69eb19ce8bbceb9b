// The elementwise penalty rho(d) of feature and delta differences, and its derivative.
#pragma once

#include "common.h"

namespace tardkd {

template <class A>
TARDKD_HD A penalty(FeatureLoss kind, A d, A beta) {
  const A magnitude = d < A(0) ? -d : d;
  if (kind == FeatureLoss::squared) return d * d;
  if (kind == FeatureLoss::smooth_l1 && magnitude < beta) return A(0.5) * d * d / beta;
  return kind == FeatureLoss::smooth_l1 ? magnitude - A(0.5) * beta : magnitude;
}

template <class A>
TARDKD_HD A penalty_slope(FeatureLoss kind, A d, A beta) {
  if (kind == FeatureLoss::squared) return A(2) * d;
  const A magnitude = d < A(0) ? -d : d;
  if (kind == FeatureLoss::smooth_l1 && magnitude < beta) return d / beta;
  // The sign; NaN passes through as NaN.
  return d > A(0) ? A(1) : (d < A(0) ? A(-1) : d);
}

}  // namespace tardkd
