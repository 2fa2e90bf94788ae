// Comparisons with broadcasting, whose results are 0 or 1. Arguments of all of them: (y, a, b, nest of a and b).
#include "broadcast.h"
#include "moe.h"

using namespace moe;

namespace {

template <class T, class F>
void each(Args& args, F&& op) {
  uint8_t* y = args.ptr<uint8_t>();
  const T* a = args.ptr<const T>();
  const T* b = args.ptr<const T>();
  const Nest<2> nest(args);
  const int64_t step_a = nest.inner_stride(0), step_b = nest.inner_stride(1);
  each_row(nest, 32768, [&](int64_t flat, const int64_t* at, int64_t n) {
    uint8_t* to = y + flat;
    const T *p = a + at[0], *q = b + at[1];
    if (step_a == 1 && step_b == 1) {
      for (int64_t i = 0; i < n; i++) to[i] = op(p[i], q[i]);
    } else if (step_b == 0) {
      const T right = *q;
      for (int64_t i = 0; i < n; i++) to[i] = op(p[i * step_a], right);
    } else {
      const T left = *p;
      for (int64_t i = 0; i < n; i++) to[i] = op(left, q[i]);
    }
  });
}

}  // namespace

MOE_KERNEL(moe_eq_f32) { each<float>(args, [](float a, float b) { return a == b; }); }
MOE_KERNEL(moe_lt_f32) { each<float>(args, [](float a, float b) { return a < b; }); }
MOE_KERNEL(moe_le_f32) { each<float>(args, [](float a, float b) { return a <= b; }); }
MOE_KERNEL(moe_eq_i32) { each<int32_t>(args, [](int32_t a, int32_t b) { return a == b; }); }
MOE_KERNEL(moe_lt_i32) { each<int32_t>(args, [](int32_t a, int32_t b) { return a < b; }); }
MOE_KERNEL(moe_le_i32) { each<int32_t>(args, [](int32_t a, int32_t b) { return a <= b; }); }
