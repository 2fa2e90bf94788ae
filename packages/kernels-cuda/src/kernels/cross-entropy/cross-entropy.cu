// Cross-entropy of logits and class indices. One block per row.
#include "row.cuh"

constexpr int threads = 256;

MOE_DEVICE bool counts(int target, int classes, int ignoreIndex) {
  return target >= 0 && target < classes && target != ignoreIndex;
}

// Log-sum-exp of a row in one pass over memory. -Infinity for an empty row or one of only -Infinity; NaN if the row
// contains NaN.
template <bool Whole>
MOE_DEVICE float logSumExp(const float* row, int n) {
  constexpr int step = 4 * threads, batch = 4;
  const float low = -infinity();
  float max = low, sum = 0.f;  // running sum of exp(x - max), which NaN reaches without special treatment
  const auto shiftOf = [&](float top) { return top == low ? 0.f : top; };
  for (int first = firstColumn<threads>(row); first < n; first += step * batch) {
    Four x[batch];
#pragma unroll
    for (int j = 0; j < batch; j++) {
      const int i = first + step * j;
      x[j] = i < n ? load4<Whole>(row, i, n, low) : Four{{low, low, low, low}};
    }
    float top = max;
    for (int j = 0; j < batch; j++) {
      for (int k = 0; k < 4; k++) top = fmaxf(top, x[j].v[k]);
    }
    const float shift = shiftOf(top);
    sum *= expf(max - shift);
    for (int j = 0; j < batch; j++) {
      for (int k = 0; k < 4; k++) sum += expf(x[j].v[k] - shift);
    }
    max = top;
  }
  const float top = blockMax<threads>(max);
  const float total = blockSum<threads>(sum * expf(max - shiftOf(top)));
  return top == low && total == 0.f ? low : top + logf(total);
}

MOE_KERNEL((threads), moe_cross_entropy_fwd_f32,
           (float* loss, float* lse, const float* logits, const int* targets, int classes, int ignoreIndex)) {
  const int64_t row = blockIdx.x;
  const float* x = logits + row * classes;
  const float total = classes % 4 == 0 ? logSumExp<true>(x, classes) : logSumExp<false>(x, classes);
  if (threadIdx.x != 0) return;
  const int target = targets[row];
  lse[row] = total;
  loss[row] = counts(target, classes, ignoreIndex) ? total - x[target] : 0.f;
}

// dlogits = (exp(logits - lse) - onehot(target)) * dloss
template <bool Whole>
MOE_DEVICE void logitGradient(float* to, const float* row, int n, float lse, int target, float dloss) {
#pragma unroll 1
  for (int i = firstColumn<threads>(row); i < n; i += 4 * threads) {
    const Four x = load4<Whole>(row, i, n);
    store4<Whole>(to, i, n, four([&](int k) { return (expf(x.v[k] - lse) - (i + k == target ? 1.f : 0.f)) * dloss; }));
  }
}

MOE_KERNEL((threads), moe_cross_entropy_bwd_f32,
           (float* dlogits, const float* logits, const int* targets, const float* lse, const float* dloss, int classes,
            int ignoreIndex)) {
  const int64_t row = blockIdx.x, at = row * classes;
  const int target = targets[row];
  if (!counts(target, classes, ignoreIndex)) {
    for (int i = (int)threadIdx.x; i < classes; i += threads) dlogits[at + i] = 0.f;
  } else if (classes % 4 == 0) {
    logitGradient<true>(dlogits + at, logits + at, classes, lse[row], target, dloss[row]);
  } else {
    logitGradient<false>(dlogits + at, logits + at, classes, lse[row], target, dloss[row]);
  }
}
