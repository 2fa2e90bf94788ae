// Storage formats: bf16, f16 and f8e4m3 as bits, with the conversions that core's dtypes define (round to nearest even;
// f8 saturates).
#pragma once

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
struct f8e4m3 {
  uint8_t bits;
};

MOE_DEVICE float asFloat(uint32_t bits) {
  union {
    uint32_t u;
    float f;
  } both = {bits};
  return both.f;
}
MOE_DEVICE uint32_t asBits(float value) {
  union {
    float f;
    uint32_t u;
  } both = {value};
  return both.u;
}

MOE_DEVICE float toFloat(float x) { return x; }
MOE_DEVICE float toFloat(bf16 x) { return asFloat((uint32_t)x.bits << 16); }

/// Two floats rounded to bf16, the first in the low half.
MOE_DEVICE uint32_t packBf16(float low, float high) {
#ifdef MOE_EMULATOR
  auto round = [](float x) -> uint32_t {
    const uint32_t u = asBits(x);
    if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
    return (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  };
  return round(low) | round(high) << 16;
#else
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
#endif
}
MOE_DEVICE bf16 toBf16(float x) { return bf16{(uint16_t)(packBf16(x, 0.f) & 0xffffu)}; }
MOE_DEVICE float lowBf16(uint32_t packed) { return asFloat(packed << 16); }
MOE_DEVICE float highBf16(uint32_t packed) { return asFloat(packed & 0xffff0000u); }

MOE_DEVICE float toFloat(f16 x) {
#ifdef MOE_EMULATOR
  union {
    uint16_t u;
    _Float16 h;
  } both = {x.bits};
  return (float)both.h;
#else
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#endif
}
MOE_DEVICE f16 toF16(float x) {
#ifdef MOE_EMULATOR
  union {
    _Float16 h;
    uint16_t u;
  } both = {(_Float16)x};
  return f16{both.u};
#else
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return f16{bits};
#endif
}

/// Exact for every value; NaN is 0x7f with its sign.
MOE_DEVICE float toFloat(f8e4m3 x) {
  const uint32_t sign = (uint32_t)(x.bits & 0x80u) << 24;
  const uint32_t magnitude = x.bits & 0x7fu;
  if (magnitude == 0x7fu) return asFloat(sign | 0x7fc00000u);
  // 2^120 adjusts the exponent bias from 7 to 127, subnormals included.
  return asFloat(sign | asBits(asFloat(magnitude << 20) * asFloat(0x7b800000u)));
}
/// Rounds to nearest even and saturates at 448; NaN stays NaN.
MOE_DEVICE f8e4m3 toF8e4m3(float x) {
  const uint32_t u = asBits(x);
  const uint32_t sign = u >> 24 & 0x80u;
  const float a = asFloat(u & 0x7fffffffu);
  if (!(a <= 3.4e38f)) return f8e4m3{(uint8_t)(sign | (a != a ? 0x7fu : 0x7eu))};
  if (a >= 448.f) return f8e4m3{(uint8_t)(sign | 0x7eu)};
  if (a < 0.015625f) {
    // Below 2^-6 the spacing is 2^-9: adding 2^14 makes the float addition round to it.
    return f8e4m3{(uint8_t)(sign | (asBits(a + 16384.f) - asBits(16384.f)))};
  }
  const uint32_t rounded = asBits(a) + 0x7ffffu + (asBits(a) >> 20 & 1u);
  return f8e4m3{(uint8_t)(sign | ((rounded >> 20) - (120u << 3)))};
}
