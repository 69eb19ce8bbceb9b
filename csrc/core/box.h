// Boxes: decoding of deltas, intersection over union, the Gaussian of a ground-truth box.
#pragma once

#include <cmath>

#include "common.h"

namespace tardkd {

struct Box {
  double x1, y1, x2, y2;
};

// Whether the corners of `box`, (4,), are finite float32 numbers. Beyond that a box means nothing, and the squares of
// its sides would not be finite in double precision either. A NaN compares as false.
TARDKD_HD bool is_finite(const double* box) {
  constexpr double largest = 3.4028234663852886e38;
  return fabs(box[0]) <= largest && fabs(box[1]) <= largest && fabs(box[2]) <= largest && fabs(box[3]) <= largest;
}

// `xyxy`: (4,).
TARDKD_HD Box make_box(const double* xyxy) { return Box{xyxy[0], xyxy[1], xyxy[2], xyxy[3]}; }

// torchvision's BoxCoder.decode: dw and dh are clamped from above at log(1000 / 16). `deltas` and `weights`: (4,) of
// dx, dy, dw, dh.
template <class A>
TARDKD_HD Box decode_box(const A* deltas, const Box& proposal, const double* weights) {
  const double clamp = 4.135166556742356;
  const double width = proposal.x2 - proposal.x1, height = proposal.y2 - proposal.y1;
  const double cx = deltas[0] / weights[0] * width + proposal.x1 + 0.5 * width;
  const double cy = deltas[1] / weights[1] * height + proposal.y1 + 0.5 * height;
  double dw = deltas[2] / weights[2], dh = deltas[3] / weights[3];
  if (dw > clamp) dw = clamp;  // written so that NaN passes through
  if (dh > clamp) dh = clamp;
  const double w = exp(dw) * width, h = exp(dh) * height;
  return Box{cx - 0.5 * w, cy - 0.5 * h, cx + 0.5 * w, cy + 0.5 * h};
}

// The box that a head states itself, `xyxy`: (4,). Where the corners have changed places it is empty, not inside out.
template <class A>
TARDKD_HD Box upright_box(const A* xyxy) {
  const double x1 = xyxy[0], y1 = xyxy[1], x2 = xyxy[2], y2 = xyxy[3];
  return Box{x1, y1, x2 < x1 ? x1 : x2, y2 < y1 ? y1 : y2};  // written so that NaN passes through
}

TARDKD_HD double box_iou(const Box& a, const Box& b) {
  const double w = fmin(a.x2, b.x2) - fmax(a.x1, b.x1), h = fmin(a.y2, b.y2) - fmax(a.y1, b.y1);
  const double inter = (w > 0.0 ? w : 0.0) * (h > 0.0 ? h : 0.0);
  const double total = (a.x2 - a.x1) * (a.y2 - a.y1) + (b.x2 - b.x1) * (b.y2 - b.y1) - inter;
  if (total != total) return total;  // NaN stays NaN: fmin and fmax would hide it
  return total > 0.0 ? inter / total : 0.0;
}

// One axis of the Gaussian of a ground-truth box, sigma measured in half extents; 0 outside the box.
TARDKD_HD double axis_gaussian(double at, double lo, double hi, double sigma_squared) {
  if (!(at >= lo && at <= hi)) return 0.0;
  const double offset = at - 0.5 * (lo + hi), half = 0.5 * (hi - lo);
  return half > 0.0 ? exp(-offset * offset / (sigma_squared * half * half)) : 0.0;
}

constexpr double kSigmaSquared = 2.0;  // of the bin weights; our choice

// Weight of RoIAlign bin `index` of `pooled` along one axis, at the bin's centre in image pixels.
TARDKD_HD double bin_gaussian(double lo, double hi, int32_t index, int32_t pooled, double gt_lo, double gt_hi) {
  return axis_gaussian(lo + (index + 0.5) * (hi - lo) / pooled, gt_lo, gt_hi, kSigmaSquared);
}

}  // namespace tardkd
