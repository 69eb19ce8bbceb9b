// How flat indices are taken apart. A loop divides by a number that is not a constant through a Divider, made before
// the loop or by the launcher: a GPU has no instruction for a division. One that is done once is written as a division.
#pragma once

#include "primitives.cuh"

namespace tardkd::cuda {

struct Split {
  int32_t quotient, remainder;
};

// Divides by one number, `by` > 0, with a multiplication: the quotient is x * reciprocal / 2^(31 + shift), rounded
// down. With reciprocal = 2^(31 + shift) / by + 1, rounded down as well, that is exact while x * by is less than 2^(31
// + shift).
struct Divider {
  uint32_t divisor = 1, reciprocal = 0x80000001u;
  int32_t shift = 0;

  Divider() = default;

  // By the launcher, for any x from 0 to 2^31 - 1: the reciprocal has all of its 32 bits.
  explicit Divider(int32_t by) : divisor(uint32_t(by)) {
    while ((int64_t(1) << shift) < by) ++shift;
    reciprocal = uint32_t((uint64_t(1) << (31 + shift)) / divisor + 1);
  }

  // By a kernel, which can divide 32 bits alone, for what fits a block: x * by is less than 2^31.
  static __device__ __forceinline__ Divider in_block(int32_t by) {
    Divider divider;
    divider.divisor = uint32_t(by);
    divider.reciprocal = 0x80000000u / uint32_t(by) + 1;
    return divider;
  }

  __device__ __forceinline__ Split split(int32_t x) const {
#ifdef TARDKD_CUDA_ON_CPU
    const uint32_t quotient = uint32_t(uint64_t(uint32_t(x)) * reciprocal >> 31) >> shift;
#else
    const uint32_t quotient = __umulhi(2 * uint32_t(x), reciprocal) >> shift;
#endif
    return Split{int32_t(quotient), int32_t(uint32_t(x) - quotient * divisor)};
  }
};

}  // namespace tardkd::cuda
