// What is decided about one region before any feature is read: is it valid, what do the heads say, which gates open.
#pragma once

#include <cmath>

#include "box.h"
#include "common.h"

namespace tardkd {

TARDKD_HD int32_t num_classes(int32_t logit_columns, Activation activation) {
  return activation == Activation::softmax ? logit_columns - 1 : logit_columns;
}

TARDKD_HD bool is_background(int64_t label, int32_t classes, Background background) {
  return label == (background == Background::first ? 0 : classes);
}

// Column of a foreground label among sigmoid logits, which have no background column.
TARDKD_HD int64_t sigmoid_column(int64_t label, Background background) {
  return background == Background::first ? label - 1 : label;
}

// First of the four columns of a foreground label's deltas.
TARDKD_HD int64_t delta_column(int64_t label, int32_t delta_columns, int32_t classes, Background background) {
  if (delta_columns == 4) return 0;
  const bool has_background = delta_columns == 4 * (classes + 1);
  return 4 * (background == Background::first && !has_background ? label - 1 : label);
}

// Whether a proposal, (5,) image index, x1, y1, x2, y2, can be pooled: its box is finite and its image exists. The
// image index is not looked at where `images` is negative.
TARDKD_HD bool is_valid_proposal(const double* proposal, int32_t images) {
  return is_finite(proposal + 1) && (images < 0 || (proposal[0] >= 0.0 && proposal[0] < images));
}

struct RegionState {
  bool valid, foreground;
};

// `proposal`: (5,), see is_valid_proposal; `gt_box`: (4,) x1, y1, x2, y2, which is looked at for foreground alone.
TARDKD_HD RegionState region_state(const double* proposal, int32_t images, int64_t label, const double* gt_box,
                                   int32_t classes, Background background) {
  RegionState state{false, false};
  if (!is_valid_proposal(proposal, images) || label < 0 || label > classes) return state;
  state.foreground = !is_background(label, classes, background);
  state.valid = !state.foreground || is_finite(gt_box);
  state.foreground = state.foreground && state.valid;
  return state;
}

// Whether the levels given for region `r`, if any, exist and have equally many channels.
TARDKD_HD bool are_valid_levels(const RegionInputs& in, int64_t r) {
  const GivenLevels &student = in.student_levels, &teacher = in.teacher_levels;
  if (!student.has(r) || !teacher.has(r)) return false;
  return !student.data || !teacher.data ||
         in.level_channels[student.data[r * student.stride]] == in.level_channels[teacher.data[r * teacher.stride]];
}

// The state of region `r` of a call where its levels are looked at too.
TARDKD_HD RegionState with_levels(const RegionState& state, const RegionInputs& in, int64_t r) {
  return are_valid_levels(in, r) ? state : RegionState{false, false};
}

struct Gates {
  bool feature, classification, regression;
};

// `scores`: (4,) as in RegionOutputs. Ties are closed; a NaN score closes the gate that reads it.
template <class A>
TARDKD_HD Gates decide_gates(const RegionState& state, const A* scores, const LossSpec& spec) {
  Gates gates{false, false, false};
  if (!state.valid) return gates;
  gates.classification =
      spec.classification_gate == ClassificationGate::all ||
      (state.foreground && (spec.classification_gate == ClassificationGate::foreground || scores[0] > scores[1]));
  gates.regression = state.foreground && (spec.regression_gate == RegressionGate::foreground || scores[2] > scores[3]);
  switch (spec.feature_gate) {
    case FeatureGate::all:
      gates.feature = true;
      break;
    case FeatureGate::foreground:
      gates.feature = state.foreground;
      break;
    case FeatureGate::classification:
      gates.feature = gates.classification;
      break;
    case FeatureGate::regression:
      gates.feature = gates.regression;
      break;
    case FeatureGate::either:
      gates.feature = state.foreground && (gates.classification || gates.regression);
      break;
  }
  return gates;
}

// The box that a head means by `deltas`, (4,), those of the region's own class.
template <class A>
TARDKD_HD Box head_box(const A* deltas, const Box& proposal, const LossSpec& spec) {
  return spec.box_coding == BoxCoding::boxes ? upright_box(deltas) : decode_box(deltas, proposal, spec.box_weights);
}

// Writes scores[2] and scores[3]: the IoU of the teacher's box with the ground truth, and that of the box it is
// compared with. Boxes are (4,) x1, y1, x2, y2; deltas (4,), those of the region's own class; `scores` is (4,).
template <class A>
TARDKD_HD void box_scores(const double* proposal_xyxy, const double* gt_xyxy, const A* student_deltas,
                          const A* teacher_deltas, const LossSpec& spec, A* scores) {
  const Box proposal = make_box(proposal_xyxy), gt = make_box(gt_xyxy);
  scores[2] = static_cast<A>(box_iou(head_box(teacher_deltas, proposal, spec), gt));
  const Box other =
      spec.regression_gate == RegressionGate::vs_student ? head_box(student_deltas, proposal, spec) : proposal;
  scores[3] = static_cast<A>(box_iou(other, gt));
}

// What the regression term penalises of two heads' deltas. Boxes are compared in the frame of the proposal: by their
// centres' and their sizes' differences, divided by its sides, of which each counts at least one pixel, and multiplied
// by the box coder's weights. To first order that is what the difference of their deltas would be, without a logarithm,
// so that an empty, an inverted and a far too large box have a finite loss and gradient too.
template <class A>
struct BoxFrame {
  bool of_boxes;  // else of deltas, which are in that frame already
  A scale[4];     // weight over side, of dx, dy, dw, dh

  // `proposal`: (4,) x1, y1, x2, y2.
  TARDKD_HD BoxFrame(const double* proposal, const LossSpec& spec) : of_boxes(spec.box_coding == BoxCoding::boxes) {
    if (!of_boxes) return;
    const double sides[2] = {proposal[2] - proposal[0], proposal[3] - proposal[1]};
    for (int k = 0; k < 4; ++k)
      scale[k] = static_cast<A>(spec.box_weights[k] / (sides[k % 2] > 1.0 ? sides[k % 2] : 1.0));
  }

  // The (4,) differences of `student` and `teacher`, (4,) each.
  TARDKD_HD void subtract(const A* student, const A* teacher, A* difference) const {
    for (int k = 0; k < 4; ++k) difference[k] = student[k] - teacher[k];
    if (!of_boxes) return;
    for (int k = 0; k < 2; ++k) {
      const A low = difference[k], high = difference[k + 2];
      difference[k] = A(0.5) * (low + high) * scale[k];
      difference[k + 2] = (high - low) * scale[k + 2];
    }
  }

  // `slopes`, (4,): in, the gradient of the differences; out, that of the student's deltas.
  TARDKD_HD void pull_back(A* slopes) const {
    if (!of_boxes) return;
    for (int k = 0; k < 2; ++k) {
      const A centre = A(0.5) * slopes[k] * scale[k], size = slopes[k + 2] * scale[k + 2];
      slopes[k] = centre - size;
      slopes[k + 2] = centre + size;
    }
  }
};

// Gaussian weight of bin (i, j) of a region: that of its matched ground-truth box at the bin's centre; 0 for background
// regions, which have no such box. `box` and `gt_box`: (4,) x1, y1, x2, y2.
TARDKD_HD double gaussian_bin_weight(bool background, const double* box, const double* gt_box, int32_t i, int32_t j,
                                     int32_t pooled_h, int32_t pooled_w) {
  if (background) return 0.0;
  return bin_gaussian(box[1], box[3], i, pooled_h, gt_box[1], gt_box[3]) *
         bin_gaussian(box[0], box[2], j, pooled_w, gt_box[0], gt_box[2]);
}

}  // namespace tardkd
