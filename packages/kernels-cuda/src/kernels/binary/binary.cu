// Elementwise ops of two operands with broadcasting. Parameters: (y, a, b, n, rank, nest of a and b).
#include "broadcast.cuh"

#define BINARY(name, T, result)                                                                         \
  MOE_KERNEL((256), name, (T* y, const T* a, const T* b, int64_t n, int rank, Args<int64_t, 24> nest)) { \
    auto fn = [](T p, T q) -> T { return result; };                                                      \
    broadcast(y, n, rank, nest, fn, Operand<T, 0>{a}, Operand<T, 1>{b});                                 \
  }

// Like `**` in JavaScript, which unlike C returns NaN for 1 ** NaN and (+-1) ** +-Infinity.
MOE_DEVICE float power(float x, float e) {
  if (e == 2.f) return x * x;
  if (e != e || (fabsf(e) == infinity() && fabsf(x) == 1.f)) return e - e;
  return powf(x, e);
}

MOE_DEVICE unsigned u(int x) { return (unsigned)x; }

MOE_DEVICE int quotient(int a, int b) {
  if (b == 0) return 0;
  return b == -1 ? (int)(0u - u(a)) : a / b;
}

BINARY(moe_add_f32, float, p + q)
BINARY(moe_sub_f32, float, p - q)
BINARY(moe_mul_f32, float, p * q)
BINARY(moe_div_f32, float, p / q)
BINARY(moe_max_f32, float, maxOrNan(p, q))
BINARY(moe_min_f32, float, minOrNan(p, q))
BINARY(moe_pow_f32, float, power(p, q))

BINARY(moe_add_i32, int, (int)(u(p) + u(q)))
BINARY(moe_sub_i32, int, (int)(u(p) - u(q)))
BINARY(moe_mul_i32, int, (int)(u(p) * u(q)))
BINARY(moe_div_i32, int, quotient(p, q))
BINARY(moe_max_i32, int, p > q ? p : q)
BINARY(moe_min_i32, int, p < q ? p : q)
