// Scalar functions shared by several kernels.
#pragma once

MOE_DEVICE float infinity() { return __builtin_huge_valf(); }

MOE_DEVICE float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }

/// 2^x with a relative error of about 2^-22; results below 2^-126 are flushed to 0. For results that are rounded to
/// bf16, or accumulated from bf16 operands.
MOE_DEVICE float exp2Fast(float x) {
#ifdef MOE_EMULATOR
  return exp2f(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}
constexpr float log2OfE = 1.4426950408889634f;
/// e^(x - base) with the same precision.
MOE_DEVICE float expFast(float x, float base) { return exp2Fast(fmaf(x, log2OfE, -base * log2OfE)); }
/// 1 / (1 + e^-x) with the same precision. An exact division would compile to a branch and a call.
MOE_DEVICE float sigmoidFast(float x) {
  const float y = 1.f + exp2Fast(-x * log2OfE);
#ifdef MOE_EMULATOR
  return 1.f / y;
#else
  float z;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(z) : "f"(y));
  return z;
#endif
}

/// The larger of two values; NaN if either is NaN.
MOE_DEVICE float maxOrNan(float a, float b) {
#ifdef MOE_EMULATOR
  return a > b || a != a ? a : b;
#else
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
#endif
}
MOE_DEVICE float minOrNan(float a, float b) { return -maxOrNan(-a, -b); }
