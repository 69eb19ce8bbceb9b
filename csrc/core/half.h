// 16-bit storage types. They are only ever stored; arithmetic is done in float.
#pragma once

#include <cstdint>
#include <cstring>

namespace tardkd {

struct float16 {
  uint16_t bits;
};
struct bfloat16 {
  uint16_t bits;
};

inline float bits_to_float(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline uint32_t float_to_bits(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return bits;
}

inline float to_float(bfloat16 h) { return bits_to_float(uint32_t(h.bits) << 16); }

// Shifting the 15 payload bits into place scales the value by 2^-112, which one multiplication undoes exactly,
// subnormals included; an exponent of all ones (inf, NaN) is patched to float's.
inline float to_float(float16 h) {
  const uint32_t sign = uint32_t(h.bits & 0x8000u) << 16, payload = uint32_t(h.bits & 0x7fffu) << 13;
  const uint32_t value =
      payload >= 0x0f800000u ? (payload | 0x7f800000u) : float_to_bits(bits_to_float(payload) * 0x1p112f);
  return bits_to_float(sign | value);
}

// Both round to nearest, ties to even.
inline bfloat16 to_bfloat16(float f) {
  const uint32_t bits = float_to_bits(f);
  if (f != f) return bfloat16{uint16_t((bits >> 16) | 0x40u)};
  return bfloat16{uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

inline float16 to_float16(float f) {
  const uint32_t bits = float_to_bits(f), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return float16{uint16_t(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return float16{uint16_t(sign | 0x7c00u)};  // rounds to 65536 or more
  if (magnitude < 0x38800000u)  // subnormal in half: let float addition do the rounding at 2^-24
    return float16{uint16_t(sign | (float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u))};
  return float16{uint16_t(sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13))};
}

}  // namespace tardkd
