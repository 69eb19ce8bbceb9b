// Eight-lane vectors by the compilers' vector extension: AVX2 where the file is compiled for it, SSE2 or NEON pairs
// elsewhere. Only for hot.cpp, which is compiled once per instruction set.
#pragma once

#include <cstring>
#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "../core/half.h"

#define TARDKD_INLINE inline __attribute__((always_inline))
#if defined(__clang__) || __GNUC__ >= 12
#define TARDKD_SHUFFLE(type, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define TARDKD_SHUFFLE(type, a, b, ...) __builtin_shuffle(a, b, (typename Lanes<type>::Mask){__VA_ARGS__})
#endif

namespace tardkd::cpu {
namespace {

constexpr int kLanes = 8;

template <class A>
struct Lanes;
template <>
struct Lanes<float> {
  typedef float Vector __attribute__((vector_size(32)));
  typedef int32_t Mask __attribute__((vector_size(32)));
};
template <>
struct Lanes<double> {
  typedef double Vector __attribute__((vector_size(64)));
  typedef int64_t Mask __attribute__((vector_size(64)));
};
template <class A>
using Vec = typename Lanes<A>::Vector;

template <class A>
TARDKD_INLINE Vec<A> broadcast(A value) {
  return value - Vec<A>{};
}
template <class A>
TARDKD_INLINE Vec<A> load(const A* from) {
  Vec<A> v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
template <class A>
TARDKD_INLINE void store(A* to, Vec<A> v) {
  std::memcpy(to, &v, sizeof v);
}

// Eight stored values of type T as accumulation type A. Float accumulates every narrower type; double only itself.
template <class A, class T>
struct Loader;
template <class A>
struct Loader<A, A> {
  static TARDKD_INLINE Vec<A> load8(const A* from) { return load(from); }
};
template <>
struct Loader<float, bfloat16> {
  static TARDKD_INLINE Vec<float> load8(const bfloat16* from) {
    typedef uint16_t Raw __attribute__((vector_size(16)));
    typedef uint32_t Wide __attribute__((vector_size(32)));
    Raw raw;
    std::memcpy(&raw, from, sizeof raw);
    const Wide bits = __builtin_convertvector(raw, Wide) << 16;
    Vec<float> v;
    std::memcpy(&v, &bits, sizeof v);
    return v;
  }
};
template <>
struct Loader<float, float16> {
  static TARDKD_INLINE Vec<float> load8(const float16* from) {
#if defined(__F16C__)
    const __m256 wide = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    Vec<float> v;
    std::memcpy(&v, &wide, sizeof v);
    return v;
#else
    float wide[kLanes];
    for (int i = 0; i < kLanes; ++i) wide[i] = to_float(from[i]);
    return load(wide);
#endif
  }
};
template <class A, class T>
TARDKD_INLINE A load_as(const T* from) {
  return static_cast<A>(*from);
}
template <>
TARDKD_INLINE float load_as<float, float16>(const float16* from) {
  return to_float(*from);
}
template <>
TARDKD_INLINE float load_as<float, bfloat16>(const bfloat16* from) {
  return to_float(*from);
}

// In-register transpose of an 8 x 8 block, rows to columns.
template <class A>
TARDKD_INLINE void transpose8(Vec<A> (&r)[8]) {
  Vec<A> t[8], u[8];
  for (int k = 0; k < 4; ++k) {
    t[2 * k] = TARDKD_SHUFFLE(A, r[2 * k], r[2 * k + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    t[2 * k + 1] = TARDKD_SHUFFLE(A, r[2 * k], r[2 * k + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int half = 0; half < 8; half += 4)
    for (int k = 0; k < 2; ++k) {
      u[half + 2 * k] = TARDKD_SHUFFLE(A, t[half + k], t[half + k + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      u[half + 2 * k + 1] = TARDKD_SHUFFLE(A, t[half + k], t[half + k + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  for (int k = 0; k < 4; ++k) {
    r[k] = TARDKD_SHUFFLE(A, u[k], u[k + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    r[k + 4] = TARDKD_SHUFFLE(A, u[k], u[k + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}

}  // namespace
}  // namespace tardkd::cpu
