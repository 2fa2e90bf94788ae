// Elementwise ops of one operand: (y, x, n).
#include "each.cuh"

#define UNARY(name, T, result) \
  MOE_KERNEL((256), name, (T* y, const T* x, int64_t n)) { each(y, x, n, [](T v) -> T { return result; }); }

MOE_DEVICE int negated(int x) { return (int)(0u - (unsigned)x); }

UNARY(moe_neg_f32, float, -v)
UNARY(moe_abs_f32, float, fabsf(v))
// Zeros and NaN are unchanged.
UNARY(moe_sign_f32, float, v > 0.f ? 1.f : v < 0.f ? -1.f : v)
UNARY(moe_exp_f32, float, expf(v))
UNARY(moe_log_f32, float, logf(v))
UNARY(moe_sqrt_f32, float, sqrtf(v))
UNARY(moe_rsqrt_f32, float, rsqrtf(v))
UNARY(moe_sin_f32, float, sinf(v))
UNARY(moe_cos_f32, float, cosf(v))
UNARY(moe_tanh_f32, float, tanhf(v))
UNARY(moe_sigmoid_f32, float, sigmoid(v))
UNARY(moe_floor_f32, float, floorf(v))

UNARY(moe_neg_i32, int, negated(v))
UNARY(moe_abs_i32, int, v < 0 ? negated(v) : v)
UNARY(moe_sign_i32, int, (v > 0) - (v < 0))
