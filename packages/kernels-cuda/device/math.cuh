// Scalar mathematics that several kernels share.
#pragma once

MOE_DEVICE float infinity() { return __builtin_huge_valf(); }

MOE_DEVICE float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }

/// Of results that are rounded to bf16 or summed up from such operands: within some 2^-22, what is below 2^-126 is 0.
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
/// e^(x - base) likewise.
MOE_DEVICE float expFast(float x, float base) { return exp2Fast(fmaf(x, log2OfE, -base * log2OfE)); }
/// 1 / (1 + e^-x) likewise. A division has a branch, and a call in it.
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

/// The larger one; NaN if either is.
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
