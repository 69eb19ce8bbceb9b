#include <algorithm>
#include <vector>

#include "divergence.h"
#include "kernels.h"
#include "parallel.h"

namespace tardkd::cpu {
namespace {

constexpr int64_t kGrain = 32;
constexpr int kSides = 4;

template <class A>
A weight(const DistributionInputs& in, int64_t r) {
  return in.region_weights.data ? *dense_row<A>(in.region_weights, r) : A(1);
}

// The first logit of a region's side.
template <class A>
const A* logits(const Distributions& of, int64_t r, int side) {
  return static_cast<const A*>(of.data) + (r * kSides + side) * of.bins;
}

// Divergence of one side, and `slope` times its gradient where `grad`, (bins,), is given. `log_t` and `log_s`: (bins,)
// to work in.
template <class A>
A side_term(const DistributionInputs& in, int64_t r, int side, A slope, A* grad, A* log_t, A* log_s) {
  const int32_t bins = in.student.bins;
  const A *teacher = logits<A>(in.teacher, r, side), *student = logits<A>(in.student, r, side);
  if (in.temperature > kCoolEnough)
    return exact_classification_term(teacher, student, bins, Activation::softmax, in.temperature, slope, grad);
  const A temperature = static_cast<A>(in.temperature);
  log_softmax(teacher, bins, temperature, log_t);
  log_softmax(student, bins, temperature, log_s);
  return classification_term<A, A>(log_t, log_s, bins, Activation::softmax, temperature, slope, grad);
}

}  // namespace

template <class A>
void distribution_distill_loss(const DistributionInputs& in, A* loss, A* factor, int threads) {
  std::vector<A> terms(in.regions);
  for_each_range(in.regions, kGrain, threads, [&](int64_t begin, int64_t end) {
    std::vector<A> log_t(in.student.bins), log_s(in.student.bins);
    for (int64_t r = begin; r < end; ++r) {
      if (!in.gates[r * in.gate_stride]) continue;
      for (int side = 0; side < kSides; ++side)
        terms[r] += side_term<A>(in, r, side, A(0), nullptr, log_t.data(), log_s.data());
      terms[r] *= weight<A>(in, r) / kSides;
    }
  });
  double sum = 0;
  int64_t open = 0;
  for (int64_t r = 0; r < in.regions; ++r) {
    sum += terms[r];
    open += in.gates[r * in.gate_stride];
  }
  const double normaliser = in.reduction == Reduction::mean ? static_cast<double>(std::max<int64_t>(open, 1)) : 1.0;
  *factor = static_cast<A>(1.0 / normaliser);
  if (in.reduction == Reduction::none)
    std::copy(terms.begin(), terms.end(), loss);
  else
    *loss = static_cast<A>(sum / normaliser);
}

template <class A>
void distribution_distill_loss_backward(const DistributionInputs& in, const Table& upstream, A* grad, int threads) {
  const int32_t bins = in.student.bins;
  for_each_range(in.regions, kGrain, threads, [&](int64_t begin, int64_t end) {
    std::vector<A> log_t(bins), log_s(bins);
    for (int64_t r = begin; r < end; ++r) {
      A* of_region = grad + r * kSides * bins;
      if (!in.gates[r * in.gate_stride]) {
        std::fill(of_region, of_region + kSides * bins, A(0));
        continue;
      }
      const A slope = *dense_row<A>(upstream, r) * weight<A>(in, r) / kSides;
      for (int side = 0; side < kSides; ++side)
        side_term<A>(in, r, side, slope, of_region + side * bins, log_t.data(), log_s.data());
    }
  });
}

#define TARDKD_INSTANTIATE(A)                                                         \
  template void distribution_distill_loss<A>(const DistributionInputs&, A*, A*, int); \
  template void distribution_distill_loss_backward<A>(const DistributionInputs&, const Table&, A*, int)
TARDKD_INSTANTIATE(float);
TARDKD_INSTANTIATE(double);

}  // namespace tardkd::cpu
