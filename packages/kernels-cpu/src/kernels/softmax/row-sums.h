// Sums and maxima over one row, with several independent accumulators. The order of additions depends on the length alone.
#pragma once

#include "moe.h"

namespace moe {

// Sums term(i, count) over the vectors of 0 .. n. Lanes from `count` on must be zero.
template <class F>
__attribute__((always_inline)) inline float row_sum(int64_t n, F&& term) {
  f32v a = zero(), b = zero(), c = zero(), d = zero();
  int64_t i = 0;
  for (; i + 4 * lanes <= n; i += 4 * lanes) {
    a += term(i, lanes);
    b += term(i + lanes, lanes);
    c += term(i + 2 * lanes, lanes);
    d += term(i + 3 * lanes, lanes);
  }
  for (; i + lanes <= n; i += lanes) a += term(i, lanes);
  if (i < n) b += term(i, static_cast<int>(n - i));
  return sum((a + b) + (c + d));
}

// The largest element; -Infinity if n is 0. NaN may or may not be ignored.
MOE_INLINE float row_max(int64_t n, const float* x) {
  constexpr float lowest = -std::numeric_limits<float>::infinity();
  f32v a = splat(lowest), b = a;
  int64_t i = 0;
  for (; i + 2 * lanes <= n; i += 2 * lanes) {
    a = fast_max(load(x + i), a);
    b = fast_max(load(x + i + lanes), b);
  }
  for (; i < n; i += lanes) a = fast_max(load_some(x + i, static_cast<int>(std::min<int64_t>(lanes, n - i)), lowest), a);
  return max(fast_max(a, b));
}

// y = softmax(x); y may be x. All zeros if all of x is -Infinity; all NaN if x contains NaN or +Infinity.
MOE_INLINE void row_softmax(int64_t n, const float* x, float* y) {
  const float top = row_max(n, x);
  const f32v shift = splat(top == -std::numeric_limits<float>::infinity() ? 0 : top);
  const float total = row_sum(n, [&](int64_t i, int count) {
    const f32v difference = load_some(x + i, count, -std::numeric_limits<float>::infinity()) - shift;
    // NaN stays NaN.
    const f32v e = select(difference == difference, exp_nonpositive(difference), difference);
    store_some(y + i, e, count);
    return e;
  });
  const f32v factor = splat(1 / (total < 1e-37f ? 1e-37f : total));
  each_vector(n, [&](int64_t i, int count) { store_some(y + i, load_some(y + i, count) * factor, count); });
}

}  // namespace moe
