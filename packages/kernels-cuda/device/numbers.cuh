// Storage formats: bf16, f16 and f8e4m3 as bits, with the conversions that core's dtypes define (round to nearest even;
// f8 saturates).
#pragma once

#if !defined(MOE_EMULATOR) && __CUDA_ARCH__ >= 890
/// Conversions from and to f8e4m3 are instructions.
#define MOE_HAS_FP8_CONVERSIONS
#endif

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

/// Two floats as f8e4m3, the first in the low byte. Rounds to nearest even and saturates at 448; NaN is 0x7f.
MOE_DEVICE uint32_t packF8e4m3(float low, float high) {
#ifdef MOE_HAS_FP8_CONVERSIONS
  uint16_t pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
  return pair;
#else
  auto round = [](float x) -> uint32_t {
    const float a = fminf(fabsf(x), 448.f);
    // Below 2^-6 the spacing is 2^-9: adding 2^14 makes the float addition round to it.
    const uint32_t subnormal = asBits(a + 16384.f) - asBits(16384.f);
    const uint32_t normal = ((asBits(a) + 0x7ffffu + (asBits(a) >> 20 & 1u)) >> 20) - (120u << 3);
    return x != x ? 0x7fu : (asBits(x) >> 24 & 0x80u) | (a < 0.015625f ? subnormal : normal);
  };
  return round(low) | round(high) << 8;
#endif
}
MOE_DEVICE f8e4m3 toF8e4m3(float x) { return f8e4m3{(uint8_t)(packF8e4m3(x, 0.f) & 0xffu)}; }

/// The values of two f8e4m3, the one in the low byte first. Exact for every value; NaN is 0x7f with its sign.
MOE_DEVICE float2 unpackF8e4m3(uint32_t pair) {
#ifdef MOE_HAS_FP8_CONVERSIONS
  uint32_t halves; // f16 represents every value of f8e4m3
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"((uint16_t)pair));
  return make_float2(toFloat(f16{(uint16_t)(halves & 0xffffu)}), toFloat(f16{(uint16_t)(halves >> 16)}));
#else
  auto value = [](uint32_t code) -> float {
    // 2^120 adjusts the exponent bias from 7 to 127, subnormals included.
    const uint32_t finite = asBits(asFloat((code & 0x7fu) << 20) * asFloat(0x7b800000u));
    return asFloat((code & 0x80u) << 24 | ((code & 0x7fu) == 0x7fu ? 0x7fc00000u : finite));
  };
  return make_float2(value(pair), value(pair >> 8));
#endif
}
MOE_DEVICE float toFloat(f8e4m3 x) { return unpackF8e4m3(x.bits).x; }
