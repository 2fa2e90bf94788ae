// Conversions between dtypes: (y, x, n). All of them go through f32, except those between integers.
#include "each.cuh"

MOE_DEVICE float toFloat(int x) { return (float)x; }
MOE_DEVICE float toFloat(uint8_t x) { return (float)x; }

MOE_DEVICE void set(float& y, float x) { y = x; }
MOE_DEVICE void set(bf16& y, float x) { y = toBf16(x); }
MOE_DEVICE void set(f16& y, float x) { y = toF16(x); }
MOE_DEVICE void set(f8e4m3& y, float x) { y = toF8e4m3(x); }
// To integers: truncates and saturates. NaN fails every comparison and becomes 0.
MOE_DEVICE void set(int& y, float x) {
  y = x >= 2147483648.f ? 2147483647 : x > -2147483648.f ? (int)x : x != x ? 0 : -2147483647 - 1;
}
MOE_DEVICE void set(uint8_t& y, float x) { y = (uint8_t)(x >= 255.f ? 255 : x > 0.f ? (int)x : 0); }

#define CAST(from, From, to, To)                                               \
  MOE_KERNEL((256), moe_cast_##from##_##to, (To * y, const From* x, int64_t n)) { \
    each(y, x, n, [](From v) -> To {                                           \
      To result;                                                               \
      set(result, toFloat(v));                                                 \
      return result;                                                           \
    });                                                                        \
  }

CAST(f32, float, bf16, bf16)
CAST(f32, float, f16, f16)
CAST(f32, float, f8e4m3, f8e4m3)
CAST(f32, float, i32, int)
CAST(f32, float, u8, uint8_t)

CAST(bf16, bf16, f32, float)
CAST(bf16, bf16, f16, f16)
CAST(bf16, bf16, f8e4m3, f8e4m3)
CAST(bf16, bf16, i32, int)
CAST(bf16, bf16, u8, uint8_t)

CAST(f16, f16, f32, float)
CAST(f16, f16, bf16, bf16)
CAST(f16, f16, f8e4m3, f8e4m3)
CAST(f16, f16, i32, int)
CAST(f16, f16, u8, uint8_t)

CAST(f8e4m3, f8e4m3, f32, float)
CAST(f8e4m3, f8e4m3, bf16, bf16)
CAST(f8e4m3, f8e4m3, f16, f16)
CAST(f8e4m3, f8e4m3, i32, int)
CAST(f8e4m3, f8e4m3, u8, uint8_t)

CAST(i32, int, f32, float)
CAST(i32, int, bf16, bf16)
CAST(i32, int, f16, f16)
CAST(i32, int, f8e4m3, f8e4m3)

CAST(u8, uint8_t, f32, float)
CAST(u8, uint8_t, bf16, bf16)
CAST(u8, uint8_t, f16, f16)
CAST(u8, uint8_t, f8e4m3, f8e4m3)

MOE_KERNEL((256), moe_cast_i32_u8, (uint8_t* y, const int* x, int64_t n)) {
  each(y, x, n, [](int v) -> uint8_t { return (uint8_t)(v < 0 ? 0 : v > 255 ? 255 : v); });
}
MOE_KERNEL((256), moe_cast_u8_i32, (int* y, const uint8_t* x, int64_t n)) {
  each(y, x, n, [](uint8_t v) -> int { return v; });
}
