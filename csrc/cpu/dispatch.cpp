// Picks the inner loops for the machine the module runs on.
#include "hot.h"

namespace tardkd::cpu {

namespace baseline {
extern const Kernels<float> float_kernels;
extern const Kernels<double> double_kernels;
}  // namespace baseline

#ifdef TARDKD_HAVE_AVX2
namespace avx2 {
extern const Kernels<float> float_kernels;
extern const Kernels<double> double_kernels;
}  // namespace avx2

static const bool kAvx2 =
    __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");

const Kernels<float>& kernels(float) { return kAvx2 ? avx2::float_kernels : baseline::float_kernels; }
const Kernels<double>& kernels(double) { return kAvx2 ? avx2::double_kernels : baseline::double_kernels; }
const char* instruction_set() { return kAvx2 ? "avx2" : "baseline"; }
#else
const Kernels<float>& kernels(float) { return baseline::float_kernels; }
const Kernels<double>& kernels(double) { return baseline::double_kernels; }
const char* instruction_set() { return "baseline"; }
#endif

}  // namespace tardkd::cpu
