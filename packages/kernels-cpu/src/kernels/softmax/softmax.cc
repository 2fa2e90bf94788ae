// Softmax over rows and its gradient.
#include "row-sums.h"

using namespace moe;

// y, x, rows, length
MOE_KERNEL(moe_softmax_fwd_f32) {
  float* y = args.ptr<float>();
  const float* x = args.ptr<const float>();
  const int64_t rows = args.size(), n = args.size();
  parallel_for(rows, 4096 / std::max<int64_t>(1, n), [&](int64_t begin, int64_t end, int) {
    for (int64_t row = begin; row < end; row++) row_softmax(n, x + row * n, y + row * n);
  });
}

// dx, y, dy, rows, length
MOE_KERNEL(moe_softmax_bwd_f32) {
  float* dx = args.ptr<float>();
  const float* y = args.ptr<const float>();
  const float* dy = args.ptr<const float>();
  const int64_t rows = args.size(), n = args.size();
  parallel_for(rows, 8192 / std::max<int64_t>(1, n), [&](int64_t begin, int64_t end, int) {
    for (int64_t at = begin * n; at < end * n; at += n) {
      const f32v dot = splat(row_sum(n, [&](int64_t i, int count) { return load_some(y + at + i, count) * load_some(dy + at + i, count); }));
      each_vector(n, [&](int64_t i, int count) {
        store_some(dx + at + i, load_some(y + at + i, count) * (load_some(dy + at + i, count) - dot), count);
      });
    }
  });
}
