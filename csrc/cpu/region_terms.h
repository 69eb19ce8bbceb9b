// Everything about regions but their features: gates, scores, the classification and regression terms.
#pragma once

#include <cstdint>
#include <vector>

#include "../core/common.h"

namespace tardkd::cpu {

template <class A>
class RegionTerms {
 public:
  // Decides the gates, evaluates the two head terms, and writes what is known then: gates, scores, factors, and the
  // gradients of logits and deltas.
  RegionTerms(const RegionInputs& in, const RegionOutputs<A>& out, const LossSpec& spec, int threads);

  // What the gradient of region r's feature term is multiplied by: upstream gradient and region weight.
  A feature_factor(int64_t r) const { return factor(0, r); }

  // Writes out.losses; `feature`, (R,), holds the unweighted mean penalty of each region, 0 where the gate is closed.
  void write_losses(const std::vector<A>& feature) const;

 private:
  A weight(int64_t r) const { return in_.region_weights.data ? *dense_row<A>(in_.region_weights, r) : A(1); }
  A factor(int term, int64_t r) const;
  void decide(int64_t begin, int64_t end);

  const RegionInputs& in_;
  const RegionOutputs<A>& out_;
  const LossSpec& spec_;
  std::vector<A> classification_, regression_;  // (R,) unweighted
  A normaliser_[3];
};

}  // namespace tardkd::cpu
