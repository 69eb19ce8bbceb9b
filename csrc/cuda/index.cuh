// How flat indices are taken apart. A loop divides by a number that is not a constant through a Divider, made before
// the loop or by the launcher: a GPU has no instruction for a division. One that is done once is written as a division.
#pragma once

#include "primitives.cuh"

namespace tardkd::cuda {

struct Split {
  int32_t quotient, remainder;
};

// Divides any numbers from 0 to 2^31 - 1 by one of them, `by` > 0. The reciprocal is rounded down, so the quotient that
// it gives is at most one too small, which the remainder shows.
struct Divider {
  uint32_t divisor = 1, reciprocal = 0xffffffffu;

  Divider() = default;
  explicit __host__ __device__ __forceinline__ Divider(int32_t by)
      : divisor(uint32_t(by)), reciprocal(0xffffffffu / uint32_t(by)) {}

  __host__ __device__ __forceinline__ Split split(int32_t x) const {
    const uint32_t quotient = uint32_t(uint64_t(uint32_t(x)) * reciprocal >> 32);
    const uint32_t remainder = uint32_t(x) - quotient * divisor;
    const bool more = remainder >= divisor;
    return Split{int32_t(more ? quotient + 1 : quotient), int32_t(more ? remainder - divisor : remainder)};
  }
};

}  // namespace tardkd::cuda
