// Vector conversions between f32 and the storage formats f16 and f8e4m3 (the `fn` variant), rounding to nearest even. bf16 is in simd.h.
// They only use integer arithmetic, so that every variant gives the same bits.
#pragma once

#include "simd.h"

namespace moe {

// binary16: overflow to infinity, subnormals kept, NaN stays NaN.
MOE_INLINE u16v to_f16(f32v x) {
  const i32v sign = (i32v)((u32v)bits(x) >> 16) & 0x8000;
  const i32v magnitude = bits(x) & 0x7fffffff;
  const i32v normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - 0x38000000) >> 13;
  // One unit of a subnormal half is 2^-24, which is the last place of 0.5: adding rounds there.
  const i32v small = bits(from_bits(magnitude) + splat(0.5f)) - 0x3f000000;
  i32v code = select(magnitude < 0x38800000, small, normal);
  code = select(magnitude >= 0x47800000, splat(0x7c00), code);
  code = select(magnitude > 0x7f800000, splat(0x7e00), code);
  return __builtin_convertvector((u32v)(code | sign), u16v);
}

MOE_INLINE f32v from_f16(u16v x) {
  const i32v code = (i32v)__builtin_convertvector(x, u32v);
  const i32v magnitude = (code & 0x7fff) << 13;
  const f32v finite = from_bits(magnitude) * splat(5.192296858534828e33f);  // 2^112
  const f32v special = from_bits(magnitude | 0x7f800000);
  const f32v y = select((code & 0x7c00) == 0x7c00, special, finite);
  return from_bits(bits(y) | ((code & 0x8000) << 16));
}

// Saturates at +-448; NaN becomes 0x7f.
MOE_INLINE u8v to_f8e4m3(f32v x) {
  const i32v sign = (i32v)((u32v)bits(x) >> 24) & 0x80;
  const i32v magnitude = bits(x) & 0x7fffffff;
  const i32v normal = ((magnitude + 0x7ffff + ((magnitude >> 20) & 1)) >> 20) - (120 << 3);
  // One unit of a subnormal is 2^-9, which is the last place of 2^14.
  const i32v small = bits(from_bits(magnitude) + splat(16384.0f)) - 0x46800000;
  i32v code = select(magnitude < 0x3c800000, small, normal);
  code = select(magnitude >= 0x43e00000, splat(0x7e), code) | sign;
  code = select(magnitude > 0x7f800000, splat(0x7f), code);
  return __builtin_convertvector((u32v)code, u8v);
}

MOE_INLINE f32v from_f8e4m3(u8v x) {
  const i32v code = (i32v)__builtin_convertvector(x, u32v);
  const i32v magnitude = code & 0x7f;
  const f32v finite = from_bits(magnitude << 20) * splat(1.329227995784916e36f);  // 2^120
  const f32v y = select(magnitude == 0x7f, from_bits(splat(0x7fc00000)), finite);
  return from_bits(bits(y) | ((code & 0x80) << 24));
}

}  // namespace moe
