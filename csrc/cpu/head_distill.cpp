#include <vector>

#include "kernels.h"
#include "region_terms.h"

namespace tardkd::cpu {

template <class A>
void head_distill(const RegionInputs& in, const RegionOutputs<A>& out, const LossSpec& spec, int threads) {
  const RegionTerms<A> terms(in, out, spec, threads);
  terms.write_losses(std::vector<A>(in.regions));
}

template void head_distill<float>(const RegionInputs&, const RegionOutputs<float>&, const LossSpec&, int);
template void head_distill<double>(const RegionInputs&, const RegionOutputs<double>&, const LossSpec&, int);

}  // namespace tardkd::cpu
