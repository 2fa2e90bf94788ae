// Scalar mathematics that several kernels share.
#pragma once

MOE_DEVICE float infinity() { return __builtin_huge_valf(); }

MOE_DEVICE float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }

/// The larger one; NaN if either is.
MOE_DEVICE float maxOrNan(float a, float b) { return a > b || a != a ? a : b; }
MOE_DEVICE float minOrNan(float a, float b) { return a < b || a != a ? a : b; }
