// Selects elements of two tensors of 4-byte elements by a condition, with broadcasting: (y, condition, a, b, nest of all three).
#include "broadcast.h"
#include "moe.h"

using namespace moe;

MOE_KERNEL(moe_where_b32) {
  uint32_t* y = args.ptr<uint32_t>();
  const uint8_t* condition = args.ptr<const uint8_t>();
  const uint32_t* a = args.ptr<const uint32_t>();
  const uint32_t* b = args.ptr<const uint32_t>();
  const Nest<3> nest(args);
  const int64_t step_c = nest.inner_stride(0), step_a = nest.inner_stride(1), step_b = nest.inner_stride(2);
  each_row(nest, 16384, [&](int64_t flat, const int64_t* at, int64_t n) {
    uint32_t* to = y + flat;
    const uint8_t* c = condition + at[0];
    const uint32_t *p = a + at[1], *q = b + at[2];
    if (step_c == 1 && step_a == 1 && step_b == 1) {
      for (int64_t i = 0; i < n; i++) to[i] = c[i] ? p[i] : q[i];
    } else if (step_c == 1 && step_a == 1 && step_b == 0) {
      const uint32_t no = *q;
      for (int64_t i = 0; i < n; i++) to[i] = c[i] ? p[i] : no;
    } else if (step_c == 1 && step_a == 0 && step_b == 1) {
      const uint32_t yes = *p;
      for (int64_t i = 0; i < n; i++) to[i] = c[i] ? yes : q[i];
    } else {
      for (int64_t i = 0; i < n; i++) to[i] = c[i * step_c] ? p[i * step_a] : q[i * step_b];
    }
  });
}
