// Stands in for CUDA's header: bfloat16 as a type that is stored and converted, nothing more.
#pragma once

#include "../core/half.h"

struct __nv_bfloat16 {
  tardkd::bfloat16 stored;
};

inline float __bfloat162float(__nv_bfloat16 value) { return tardkd::to_float(value.stored); }
inline __nv_bfloat16 __float2bfloat16_rn(float value) { return {tardkd::to_bfloat16(value)}; }
