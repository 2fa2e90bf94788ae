// moe-isa: baseline avx2 avx512
// Weighted sum of the experts' outputs per token, and its gradients.
#include "../softmax/row-sums.h"

using namespace moe;

// out, y, weights, positions, N, K, D: out[n] = sum over k of weights[n, k] * y[positions[n * K + k]]
MOE_KERNEL(moe_combine_tokens_fwd_f32) {
  float* out = args.ptr<float>();
  const float* y = args.ptr<const float>();
  const float* weights = args.ptr<const float>();
  const int32_t* positions = args.ptr<const int32_t>();
  const int64_t N = args.size(), K = args.size(), D = args.size();
  parallel_for(N, 16384 / std::max<int64_t>(1, D * K), [&](int64_t begin, int64_t end, int) {
    for (int64_t n = begin; n < end; n++) {
      each_vector(D, [&](int64_t i, int count) {
        f32v total = zero();
        for (int64_t s = n * K; s < (n + 1) * K; s++) {
          const int64_t p = positions[s];
          if (p >= 0 && p < N * K) total = fma(splat(weights[s]), load_some(y + p * D + i, count), total);
        }
        store_some(out + n * D + i, total, count);
      });
    }
  });
}

// dy, dweights, y, weights, positions, dout, N, K, D. `positions` is a permutation, so every row of dy is written once.
MOE_KERNEL(moe_combine_tokens_bwd_f32) {
  float* dy = args.ptr<float>();
  float* dweights = args.ptr<float>();
  const float* y = args.ptr<const float>();
  const float* weights = args.ptr<const float>();
  const int32_t* positions = args.ptr<const int32_t>();
  const float* dout = args.ptr<const float>();
  const int64_t N = args.size(), K = args.size(), D = args.size();
  parallel_for(N, 16384 / std::max<int64_t>(1, D * K), [&](int64_t begin, int64_t end, int) {
    for (int64_t n = begin; n < end; n++) {
      const float* d = dout + n * D;
      for (int64_t s = n * K; s < (n + 1) * K; s++) {
        const int64_t p = positions[s];
        dweights[s] = 0;
        if (p < 0 || p >= N * K) continue;
        const f32v weight = splat(weights[s]);
        dweights[s] = row_sum(D, [&](int64_t i, int count) {
          const f32v g = load_some(d + i, count);
          store_some(dy + p * D + i, g * weight, count);
          return g * load_some(y + p * D + i, count);
        });
      }
    }
  });
}
