#include "region_terms.h"

#include <algorithm>
#include <cmath>

#include "../core/penalty.h"
#include "../core/region.h"
#include "divergence.h"
#include "parallel.h"

namespace tardkd::cpu {
namespace {

constexpr int64_t kGrain = 32;

}  // namespace

template <class A>
RegionTerms<A>::RegionTerms(const RegionInputs& in, const RegionOutputs<A>& out, const LossSpec& spec, int threads)
    : in_(in), out_(out), spec_(spec), classification_(in.regions), regression_(in.regions) {
  for_each_range(in.regions, kGrain, threads, [&](int64_t begin, int64_t end) { decide(begin, end); });
  for (int term = 0; term < 3; ++term) {
    int64_t open = 0;
    for (int64_t r = 0; r < in.regions; ++r) open += out.gates[3 * r + term];
    normaliser_[term] = spec.reduction == Reduction::mean ? static_cast<A>(std::max<int64_t>(open, 1)) : A(1);
    out.factors[term] = A(1) / normaliser_[term];
  }
}

template <class A>
A RegionTerms<A>::factor(int term, int64_t r) const {
  const A upstream = in_.upstream.data ? dense_row<A>(in_.upstream, term)[r] : A(1);
  return upstream * weight(r);
}

template <class A>
void RegionTerms<A>::decide(int64_t begin, int64_t end) {
  const int32_t columns = in_.logit_columns, classes = num_classes(columns, spec_.activation);
  const A temperature = static_cast<A>(spec_.temperature), beta = static_cast<A>(spec_.beta);
  const bool softmax = spec_.activation == Activation::softmax;
  std::vector<A> log_t(columns), log_s(columns);
  for (int64_t r = begin; r < end; ++r) {
    const double* proposal = dense_row<double>(in_.proposals, r);
    const double* gt = dense_row<double>(in_.gt_boxes, r);
    const A* z_s = dense_row<A>(in_.student_logits, r);
    const A* z_t = dense_row<A>(in_.teacher_logits, r);
    const int64_t label = in_.labels[r * in_.label_stride];
    A* scores = out_.scores + 4 * r;
    std::fill(scores, scores + 4, A(0));

    const RegionState state =
        with_levels(region_state(proposal, in_.images, label, gt, classes, spec_.background), in_, r);
    if (state.valid && softmax) {
      log_softmax(z_t, columns, A(1), log_t.data());
      log_softmax(z_s, columns, A(1), log_s.data());
      scores[0] = std::exp(log_t[label]);
      scores[1] = std::exp(log_s[label]);
    } else if (state.foreground) {
      const int64_t own = sigmoid_column(label, spec_.background);
      scores[0] = sigmoid(z_t[own]);
      scores[1] = sigmoid(z_s[own]);
    }
    if (state.valid && in_.teacher_scores.data) scores[0] = *dense_row<A>(in_.teacher_scores, r);
    if (state.valid && in_.student_scores.data) scores[1] = *dense_row<A>(in_.student_scores, r);
    const int32_t width = in_.student_delta_columns;
    const auto column = [&](int32_t of) {
      return state.foreground ? delta_column(label, of, classes, spec_.background) : 0;
    };
    const int64_t first = column(width);
    const A* r_s = dense_row<A>(in_.student_deltas, r) + first;
    const A* r_t = dense_row<A>(in_.teacher_deltas, r) + column(in_.teacher_delta_columns);
    if (state.foreground) box_scores(proposal + 1, gt, r_s, r_t, spec_, scores);

    const Gates gates = decide_gates(state, scores, spec_);
    out_.gates[3 * r] = gates.feature;
    out_.gates[3 * r + 1] = gates.classification;
    out_.gates[3 * r + 2] = gates.regression;

    A* grad = out_.grad_logits ? out_.grad_logits + r * columns : nullptr;
    if (gates.classification && spec_.temperature > kCoolEnough) {
      classification_[r] =
          exact_classification_term(z_t, z_s, columns, spec_.activation, spec_.temperature, factor(1, r), grad);
    } else if (gates.classification) {
      if (softmax && temperature != A(1)) {
        log_softmax(z_t, columns, temperature, log_t.data());
        log_softmax(z_s, columns, temperature, log_s.data());
      }
      classification_[r] = classification_term<A, A>(softmax ? log_t.data() : z_t, softmax ? log_s.data() : z_s,
                                                     columns, spec_.activation, temperature, factor(1, r), grad);
    } else if (grad) {
      std::fill(grad, grad + columns, A(0));
    }

    grad = out_.grad_deltas ? out_.grad_deltas + r * width : nullptr;
    if (grad) std::fill(grad, grad + width, A(0));
    if (gates.regression) {
      const BoxFrame<A> frame(proposal + 1, spec_);
      A difference[4], slopes[4];
      frame.subtract(r_s, r_t, difference);
      for (int k = 0; k < 4; ++k) {
        regression_[r] += penalty(FeatureLoss::smooth_l1, difference[k], beta);
        slopes[k] = factor(2, r) * penalty_slope(FeatureLoss::smooth_l1, difference[k], beta);
      }
      frame.pull_back(slopes);
      if (grad) std::copy(slopes, slopes + 4, grad + first);
    }
  }
}

template <class A>
void RegionTerms<A>::write_losses(const std::vector<A>& feature) const {
  const A* terms[3] = {feature.data(), classification_.data(), regression_.data()};
  for (int term = 0; term < 3; ++term) {
    double sum = 0;
    for (int64_t r = 0; r < in_.regions; ++r) {
      // A closed region's weight is not looked at: it may be NaN.
      const A value = out_.gates[3 * r + term] ? weight(r) * terms[term][r] : A(0);
      if (spec_.reduction == Reduction::none) out_.losses[term][r] = value;
      sum += value;
    }
    if (spec_.reduction != Reduction::none) *out_.losses[term] = static_cast<A>(sum / normaliser_[term]);
  }
}

template class RegionTerms<float>;
template class RegionTerms<double>;

}  // namespace tardkd::cpu
