// Cross-entropy of one row, for rows of logits that are complete or processed in blocks.
#pragma once

#include "moe.h"

namespace moe {

// Running (online) log-sum-exp of a row: the maximum and the sum of exp(x - max) of the logits so far.
struct RowSum {
  float max = -std::numeric_limits<float>::infinity();
  float sum = 0;
};

// Adds n more logits.
MOE_INLINE void add_logits(RowSum& row, const float* logits, int64_t n) {
  const float low = -std::numeric_limits<float>::infinity();
  f32v top[4] = {splat(low), splat(low), splat(low), splat(low)};
  int64_t i = 0;
  for (; i + 4 * lanes <= n; i += 4 * lanes)
    for (int j = 0; j < 4; ++j) top[j] = fast_max(load(logits + i + j * lanes), top[j]);
  for (; i < n; i += lanes) top[0] = fast_max(load_some(logits + i, static_cast<int>(std::min<int64_t>(lanes, n - i)), low), top[0]);
  const float max = std::max(row.max, moe::max(fast_max(fast_max(top[0], top[1]), fast_max(top[2], top[3]))));
  // If all logits are -Infinity, subtract 0 to avoid NaN. NaN logits make the sum NaN without extra code.
  const f32v shift = splat(max == low ? 0.0f : max);
  f32v sum[4] = {};
  i = 0;
  for (; i + 4 * lanes <= n; i += 4 * lanes)
    for (int j = 0; j < 4; ++j) sum[j] += exp_nonpositive(load(logits + i + j * lanes) - shift);
  for (; i < n; i += lanes)
    sum[0] += exp_nonpositive(load_some(logits + i, static_cast<int>(std::min<int64_t>(lanes, n - i)), low) - shift);
  const float before = row.sum == 0 ? 0 : row.sum * std::exp(row.max - max);
  row.sum = before + moe::sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
  row.max = max;
}

MOE_INLINE float log_sum_exp(const RowSum& row) {
  return row.max == -std::numeric_limits<float>::infinity() && row.sum == 0 ? row.max : row.max + std::log(row.sum);
}

// to = (exp(logits - lse) - onehot(hit)) * scale. If hit is outside 0 .. n - 1, the target is not in this block. `to` may be `logits`.
MOE_INLINE void logit_gradient(float* to, const float* logits, int64_t n, float lse, int64_t hit, float scale) {
  const f32v shift = splat(lse), factor = splat(scale);
  each_vector(n, [&](int64_t i, int count) {
    store_some(to + i, exp_nonpositive(load_some(logits + i, count) - shift) * factor, count);
  });
  if (hit >= 0 && hit < n) to[hit] -= scale;
}

MOE_INLINE bool counts(int32_t target, int64_t classes, int32_t ignore_index) {
  return target >= 0 && target < classes && target != ignore_index;
}

}  // namespace moe
