// Elementwise operations on two operands, with broadcasting. Arguments of all of them: (y, a, b, nest of a and b).
#include "broadcast.h"
#include "moe.h"

using namespace moe;

namespace {

constexpr int64_t grain = 16384;

// Applies op(f32v, f32v) to every pair of elements; an operand that is constant along a row is loaded once per row.
template <class F>
void each_f32(Args& args, int64_t at_least, F&& op) {
  float* y = args.ptr<float>();
  const float* a = args.ptr<const float>();
  const float* b = args.ptr<const float>();
  const Nest<2> nest(args);
  const bool moves_a = nest.inner_stride(0) != 0, moves_b = nest.inner_stride(1) != 0;
  if (moves_a && moves_b) {
    each_row(nest, at_least, [&](int64_t flat, const int64_t* at, int64_t n) {
      float* to = y + flat;
      const float *p = a + at[0], *q = b + at[1];
      each_vector(n, [&](int64_t i, int count) { store_some(to + i, op(load_some(p + i, count), load_some(q + i, count)), count); });
    });
  } else if (moves_a) {
    each_row(nest, at_least, [&](int64_t flat, const int64_t* at, int64_t n) {
      float* to = y + flat;
      const float* p = a + at[0];
      const f32v q = splat(b[at[1]]);
      each_vector(n, [&](int64_t i, int count) { store_some(to + i, op(load_some(p + i, count), q), count); });
    });
  } else {
    each_row(nest, at_least, [&](int64_t flat, const int64_t* at, int64_t n) {
      float* to = y + flat;
      const f32v p = splat(a[at[0]]);
      const float* q = b + at[1];
      const int64_t step = moves_b ? 1 : 0;
      if (step == 0) {
        const f32v value = op(p, splat(*q));
        each_vector(n, [&](int64_t i, int count) { store_some(to + i, value, count); });
      } else {
        each_vector(n, [&](int64_t i, int count) { store_some(to + i, op(p, load_some(q + i, count)), count); });
      }
    });
  }
}

template <class F>
void each_i32(Args& args, F&& op) {
  int32_t* y = args.ptr<int32_t>();
  const int32_t* a = args.ptr<const int32_t>();
  const int32_t* b = args.ptr<const int32_t>();
  const Nest<2> nest(args);
  const int64_t step_a = nest.inner_stride(0), step_b = nest.inner_stride(1);
  each_row(nest, grain, [&](int64_t flat, const int64_t* at, int64_t n) {
    int32_t* to = y + flat;
    const int32_t *p = a + at[0], *q = b + at[1];
    if (step_a == 1 && step_b == 1) {
      for (int64_t i = 0; i < n; i++) to[i] = op(p[i], q[i]);
    } else {
      for (int64_t i = 0; i < n; i++) to[i] = op(p[i * step_a], q[i * step_b]);
    }
  });
}

// Like JavaScript's `**`, which unlike C returns NaN for 1 ** NaN and (+-1) ** +-Infinity.
float power(float x, float e) {
  if (e != e) return e;
  if (std::isinf(e) && std::fabs(x) == 1) return std::numeric_limits<float>::quiet_NaN();
  return std::pow(x, e);
}

uint32_t u(int32_t x) { return static_cast<uint32_t>(x); }

}  // namespace

MOE_KERNEL(moe_add_f32) { each_f32(args, grain, [](f32v a, f32v b) { return a + b; }); }
MOE_KERNEL(moe_sub_f32) { each_f32(args, grain, [](f32v a, f32v b) { return a - b; }); }
MOE_KERNEL(moe_mul_f32) { each_f32(args, grain, [](f32v a, f32v b) { return a * b; }); }
MOE_KERNEL(moe_div_f32) { each_f32(args, grain, [](f32v a, f32v b) { return a / b; }); }
MOE_KERNEL(moe_max_f32) { each_f32(args, grain, [](f32v a, f32v b) { return nan_max(a, b); }); }
MOE_KERNEL(moe_min_f32) { each_f32(args, grain, [](f32v a, f32v b) { return nan_min(a, b); }); }
MOE_KERNEL(moe_pow_f32) {
  each_f32(args, 512, [](f32v a, f32v b) {
    if (!any(b != splat(2.0f))) return a * a;
    f32v y;
    for (int i = 0; i < lanes; i++) y[i] = b[i] == 2.0f ? a[i] * a[i] : power(a[i], b[i]);
    return y;
  });
}

MOE_KERNEL(moe_add_i32) {
  each_i32(args, [](int32_t a, int32_t b) { return static_cast<int32_t>(u(a) + u(b)); });
}
MOE_KERNEL(moe_sub_i32) {
  each_i32(args, [](int32_t a, int32_t b) { return static_cast<int32_t>(u(a) - u(b)); });
}
MOE_KERNEL(moe_mul_i32) {
  each_i32(args, [](int32_t a, int32_t b) { return static_cast<int32_t>(u(a) * u(b)); });
}
MOE_KERNEL(moe_div_i32) {
  each_i32(args, [](int32_t a, int32_t b) {
    if (b == 0) return 0;
    return b == -1 ? static_cast<int32_t>(0u - u(a)) : a / b;
  });
}
MOE_KERNEL(moe_max_i32) {
  each_i32(args, [](int32_t a, int32_t b) { return a > b ? a : b; });
}
MOE_KERNEL(moe_min_i32) {
  each_i32(args, [](int32_t a, int32_t b) { return a < b ? a : b; });
}
