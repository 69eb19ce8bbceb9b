// Tests of the host/device maths in csrc/core, against numbers worked out by hand.
#include <cmath>
#include <cstdio>
#include <limits>
#include <vector>

#include "core/axis.h"
#include "core/box.h"
#include "core/classification.h"
#include "core/half.h"
#include "core/penalty.h"
#include "core/region.h"

using namespace tardkd;

static int failures = 0;

#define CHECK(condition)                                                   \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::printf("%s:%d: %s is false\n", __FILE__, __LINE__, #condition); \
      ++failures;                                                          \
    }                                                                      \
  } while (0)

static bool close(double a, double b, double tolerance = 1e-12) { return std::fabs(a - b) <= tolerance; }

static RoiAlignSpec align(int sampling_ratio, bool aligned) { return {7, 7, sampling_ratio, aligned, 224.0, 4.0}; }

// Weights of one axis as a dense (bins, size) matrix.
static std::vector<double> dense(const RoiAxis& axis, int bins) {
  std::vector<double> weights(bins * axis.size);
  for (int bin = 0; bin < bins; ++bin)
    for (int k = 0; k < axis.grid; ++k) {
      AxisSample sample;
      if (!axis_sample(axis, bin, k, sample)) continue;
      weights[bin * axis.size + sample.lo] += sample.weight_lo;
      weights[bin * axis.size + sample.hi] += sample.weight_hi;
    }
  return weights;
}

static void test_axis() {
  // Two bins over [2, 6) with two samples each, at 2.5, 3.5 | 4.5, 5.5.
  const RoiAxis inner = roi_axis(2.0, 6.0, 1.0, 2, 10, align(2, false));
  const auto weights = dense(inner, 2);
  const double expected[2][10] = {{0, 0, .25, .5, .25}, {0, 0, 0, 0, .25, .5, .25}};
  for (int bin = 0; bin < 2; ++bin)
    for (int x = 0; x < 10; ++x) CHECK(close(weights[bin * 10 + x], expected[bin][x]));

  // Samples within a pixel of the map are clamped to it, those beyond contribute nothing.
  AxisSample sample;
  RoiAxis edge{-1.0, 1.0, 1, 4};
  CHECK(axis_sample(edge, 0, 0, sample) && sample.lo == 0 && sample.weight_lo == 1.0);  // at -0.5
  edge.start = -2.0;
  CHECK(!axis_sample(edge, 0, 0, sample));  // at -1.5
  edge.start = 3.5;
  CHECK(axis_sample(edge, 0, 0, sample) && sample.lo == 3 && sample.hi == 3 && sample.weight_lo == 1.0);  // at 4
  edge.start = 3.6;
  CHECK(!axis_sample(edge, 0, 0, sample));  // at 4.1

  CHECK(close(roi_axis(3.0, 3.2, 1.0, 2, 10, align(2, false)).bin, 0.5));  // at least one pixel
  CHECK(close(roi_axis(3.0, 3.2, 1.0, 2, 10, align(2, true)).bin, 0.1));   // but not when aligned
  CHECK(close(roi_axis(3.0, 3.2, 1.0, 2, 10, align(2, true)).start, 2.5));
  CHECK(roi_axis(0.0, 9.0, 1.0, 2, 10, align(0, false)).grid == 5);  // ceil(9 / 2)
  CHECK(roi_axis(5.0, 1.0, 1.0, 2, 10, align(0, true)).grid == 0);   // inverted: no samples
}

static void test_levels() {
  const RoiAlignSpec spec = align(2, false);
  const double box[4] = {0, 0, 224, 224}, half[4] = {0, 0, 112, 112}, below[4] = {0, 0, 111.9, 112};
  CHECK(assign_level(box, 0.25, 4, spec) == 2);
  CHECK(assign_level(half, 0.25, 4, spec) == 1);
  CHECK(assign_level(below, 0.25, 4, spec) == 0);
  const double huge[4] = {0, 0, 1e6, 1e6}, empty[4] = {5, 5, 5, 9}, inverted[4] = {9, 9, 5, 12};
  CHECK(assign_level(huge, 0.25, 4, spec) == 3);
  CHECK(assign_level(empty, 0.25, 4, spec) == 0);
  CHECK(assign_level(inverted, 0.25, 4, spec) == 0);
  CHECK(reachable_levels(0.25, 0.03125, 4) == 4 && reachable_levels(0.03125, 0.03125, 2) == 1);
  CHECK(reachable_levels(0.25, 0.0625, 2) == 2 && reachable_levels(0.375, 0.046875, 4) == 4);
  CHECK(assign_level(box, 0.375, 4, spec) == 2);  // a teacher that sees 336 pixels: level 4 of 2..5
}

static void test_boxes() {
  const Box a{0, 0, 4, 2}, b{2, 0, 6, 2};
  CHECK(close(box_iou(a, b), 1.0 / 3));
  CHECK(box_iou(a, Box{10, 10, 12, 12}) == 0.0);
  CHECK(box_iou(Box{1, 1, 1, 1}, Box{1, 1, 1, 1}) == 0.0);
  const double nan = std::numeric_limits<double>::quiet_NaN();
  CHECK(std::isnan(box_iou(Box{nan, 0, 4, 2}, a)));

  const double weights[4] = {10, 10, 5, 5};
  const double deltas[4] = {5.0, -2.5, 5 * std::log(2.0), 1e3};
  const Box decoded = decode_box(deltas, Box{10, 20, 14, 28}, weights);  // centre (12, 24) -> (14, 22)
  CHECK(close(decoded.x1, 10) && close(decoded.x2, 18));
  CHECK(close(decoded.y2 - decoded.y1, 8 * 1000.0 / 16, 1e-9));

  CHECK(close(axis_gaussian(5, 1, 9, 2.0), 1.0));
  CHECK(close(axis_gaussian(9, 1, 9, 2.0), std::exp(-0.5)));
  CHECK(axis_gaussian(9.001, 1, 9, 2.0) == 0.0);
}

static void test_boxes_of_heads() {
  const float inverted[4] = {5, 2, 1, 9};
  const Box upright = upright_box(inverted);
  CHECK(upright.x1 == 5 && upright.x2 == 5 && upright.y1 == 2 && upright.y2 == 9);
  const double nan = std::numeric_limits<double>::quiet_NaN(), lost[4] = {0, 0, nan, 2};
  CHECK(std::isnan(box_iou(upright_box(lost), Box{0, 0, 4, 2})));

  LossSpec spec{};
  for (int k = 0; k < 4; ++k) spec.box_weights[k] = k + 1;
  const double proposal[4] = {10, 10, 14, 10.5};  // its height counts as one pixel
  const double student[4] = {1, 2, 7, 6}, teacher[4] = {1, 3, 3, 5};
  double difference[4], slopes[4] = {1, 1, 1, 1};
  const BoxFrame<double> of_deltas(proposal, spec);
  of_deltas.subtract(student, teacher, difference);
  of_deltas.pull_back(slopes);
  CHECK(difference[1] == -1 && difference[2] == 4 && slopes[3] == 1);

  spec.box_coding = BoxCoding::boxes;
  const BoxFrame<double> of_boxes(proposal, spec);
  of_boxes.subtract(student, teacher, difference);
  of_boxes.pull_back(slopes);
  CHECK(difference[0] == 2.0 / 4 && difference[1] == 0.0 && difference[2] == 3 * 4.0 / 4 && difference[3] == 4 * 2.0);
  CHECK(slopes[0] == 0.5 / 4 - 3.0 / 4 && slopes[2] == 0.5 / 4 + 3.0 / 4 && slopes[1] == 1 - 4 && slopes[3] == 1 + 4);
}

static void test_regions() {
  const double proposal[5] = {1, 0, 0, 8, 8}, gt[4] = {0, 0, 8, 8};
  const double inf = std::numeric_limits<double>::infinity();
  const double wild[5] = {0, 0, 0, inf, 8}, nowhere[4] = {inf, 0, 0, 0};
  CHECK(region_state(proposal, 2, 3, gt, 4, Background::first).foreground);
  CHECK(is_valid_proposal(proposal, 2) && !is_valid_proposal(proposal, 1) && is_valid_proposal(proposal, -1));
  CHECK(!is_valid_proposal(wild, 2));
  CHECK(!region_state(proposal, 1, 3, gt, 4, Background::first).valid);
  CHECK(region_state(proposal, -1, 3, gt, 4, Background::first).valid);
  CHECK(!region_state(wild, 2, 3, gt, 4, Background::first).valid);
  CHECK(!region_state(proposal, 2, 5, gt, 4, Background::first).valid);
  CHECK(!region_state(proposal, 2, -1, gt, 4, Background::first).valid);
  CHECK(!region_state(proposal, 2, 3, nowhere, 4, Background::first).valid);
  CHECK(region_state(proposal, 2, 0, nowhere, 4, Background::first).valid);  // background: its box is ignored
  CHECK(!region_state(proposal, 2, 4, gt, 4, Background::last).foreground);

  CHECK(delta_column(3, 4, 4, Background::first) == 0);
  CHECK(delta_column(3, 20, 4, Background::first) == 12);
  CHECK(delta_column(3, 16, 4, Background::first) == 8);
  CHECK(delta_column(3, 16, 4, Background::last) == 12);
  CHECK(delta_column(3, 20, 4, Background::last) == 12);

  LossSpec spec{};
  spec.feature_gate = FeatureGate::either;
  spec.classification_gate = ClassificationGate::teacher_better;
  spec.regression_gate = RegressionGate::vs_proposal;
  const float tie[4] = {0.5f, 0.5f, 0.7f, 0.7f}, box_only[4] = {0.4f, 0.5f, 0.8f, 0.7f};
  CHECK(!decide_gates({true, true}, tie, spec).feature);
  CHECK(decide_gates({true, true}, box_only, spec).feature &&
        !decide_gates({true, true}, box_only, spec).classification);
  CHECK(!decide_gates({true, false}, box_only, spec).feature);
  CHECK(!decide_gates({false, false}, box_only, spec).regression);
}

static void test_layouts() {
  const FeatureMap map{nullptr, 1000, 1, 50, 5, 4, 10, 0.25};
  CHECK(offset_in(map, 2, 3, 1, 4) == 2000 + 3 + 50 + 20);
  const FeatureMap moved{nullptr, 400, 40, 10, 1, 4, 10, 0.25}, coarser{nullptr, 400, 40, 10, 1, 4, 10, 0.125};
  CHECK(same_extent(map, moved) && !same_extent(map, coarser));
  const double values[6] = {1, 2, 3, 4, 5, 6};
  CHECK(dense_row<double>(Table{values, DType::float64, 3, 1}, 1)[2] == 6);

  // The centre bin of three lies on the box's centre, the others at two thirds of its half extent.
  const double box[4] = {0, 0, 9, 9}, gt[4] = {0, 0, 9, 9};
  CHECK(close(gaussian_bin_weight(false, box, gt, 1, 1, 3, 3), 1.0));
  CHECK(close(gaussian_bin_weight(false, box, gt, 1, 2, 3, 3), std::exp(-2.0 / 9)));
  CHECK(gaussian_bin_weight(true, box, gt, 1, 1, 3, 3) == 0.0);

  Pyramid pyramid{};
  pyramid.levels = 2;
  pyramid.level[0].scale = pyramid.level[1].scale = 0.25;
  CHECK(reachable_levels(pyramid) == 1);
  const RoiAlignSpec spec{2, 3, 2, false, 224.0, 4.0};
  const double region[4] = {4, 8, 28, 24};
  CHECK(roi_axis_y(region, map, spec).bin == 2.0 && roi_axis_y(region, map, spec).size == 4);
  CHECK(roi_axis_x(region, map, spec).bin == 2.0 && roi_axis_x(region, map, spec).size == 10);
}

static void test_terms() {
  CHECK(penalty(FeatureLoss::smooth_l1, 0.05, 0.1) == 0.5 * 0.05 * 0.05 / 0.1);
  CHECK(close(penalty(FeatureLoss::smooth_l1, -1.0, 0.1), 0.95));
  CHECK(penalty(FeatureLoss::smooth_l1, -1.0, 0.0) == 1.0);
  CHECK(penalty_slope(FeatureLoss::absolute, -3.0, 0.0) == -1.0 &&
        penalty_slope(FeatureLoss::absolute, 0.0, 0.0) == 0.0);
  CHECK(close(binary_kl(0.0, 0.0), 0.0));
  CHECK(close(binary_kl(0.0, std::log(3.0)), 0.5 * std::log(0.5 / 0.75) + 0.5 * std::log(0.5 / 0.25)));
  CHECK(std::isfinite(binary_kl(500.0, -500.0)) && close(binary_kl(500.0, -500.0), 500.0));
  CHECK(kl_term(0.0, -std::numeric_limits<double>::infinity(), -1.0) == 0.0);
}

static void test_half() {
  // Every half is a float, so the way there and back is the identity; NaN stays NaN.
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float16 h{uint16_t(bits)};
    const bfloat16 b{uint16_t(bits)};
    if (to_float(h) == to_float(h))
      CHECK(to_float16(to_float(h)).bits == bits);
    else
      CHECK((to_float16(to_float(h)).bits & 0x7c00u) == 0x7c00u && (to_float16(to_float(h)).bits & 0x3ffu));
    if (to_float(b) == to_float(b)) CHECK(to_bfloat16(to_float(b)).bits == bits);
  }
  CHECK(to_float(float16{0x3c01}) == 1.0009765625f && to_float(float16{0x0001}) == 0x1p-24f);
  CHECK(to_float16(65519.0f).bits == 0x7bff && to_float16(65520.0f).bits == 0x7c00);
  CHECK(to_float16(1.00048828125f).bits == 0x3c00);  // a tie goes to the even neighbour
  CHECK(to_bfloat16(1.00390625f).bits == 0x3f80);
}

int main() {
  test_axis();
  test_levels();
  test_boxes();
  test_boxes_of_heads();
  test_regions();
  test_layouts();
  test_terms();
  test_half();
  std::printf(failures ? "%d checks failed\n" : "all checks passed\n", failures);
  return failures != 0;
}
