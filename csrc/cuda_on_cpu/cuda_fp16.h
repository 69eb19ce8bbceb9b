// Stands in for CUDA's header: half precision as a type that is stored and converted, nothing more.
#pragma once

#include "../core/half.h"

struct __half {
  tardkd::float16 stored;
};

inline float __half2float(__half value) { return tardkd::to_float(value.stored); }
inline __half __float2half_rn(float value) { return {tardkd::to_float16(value)}; }
