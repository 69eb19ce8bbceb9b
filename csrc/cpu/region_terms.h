// Everything about regions but their features: gates, scores, the classification and regression terms.
#pragma once

#include <cstdint>
#include <vector>

#include "../core/common.h"

namespace tardkd::cpu {

template <class A>
class RegionTerms {
 public:
  // Decides the gates and evaluates the two head terms; logit and delta gradients are written complete.
  RegionTerms(const RegionInputs<A>& in, const RegionOutputs<A>& out, const LossSpec& spec, int threads);

  // Factor of region r's feature term in the total: upstream gradient, region weight and normaliser.
  A feature_factor(int64_t r) const { return factor(0, r); }

  // Writes out.losses; `feature` holds the unweighted mean penalty of each region, 0 where the gate is closed.
  void write_losses(const std::vector<A>& feature) const;

 private:
  A weight(int64_t r) const { return in_.region_weights ? in_.region_weights[r] : A(1); }
  A factor(int term, int64_t r) const;
  void decide(int64_t begin, int64_t end);
  void scale_gradients(int64_t begin, int64_t end) const;

  const RegionInputs<A>& in_;
  const RegionOutputs<A>& out_;
  const LossSpec& spec_;
  std::vector<A> classification_, regression_;  // (R,) unweighted
  A normaliser_[3];
};

}  // namespace tardkd::cpu
