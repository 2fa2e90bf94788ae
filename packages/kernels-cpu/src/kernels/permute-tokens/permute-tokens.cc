// moe-isa: baseline avx2 avx512
// Copies tokens into expert order; the backward pass sums the gradients of a token's copies.
#include "moe.h"

using namespace moe;

// y, x, order, slots, K, N, D: y[p] = x[order[p] / K]
MOE_KERNEL(moe_permute_tokens_fwd_f32) {
  float* y = args.ptr<float>();
  const float* x = args.ptr<const float>();
  const int32_t* order = args.ptr<const int32_t>();
  const int64_t slots = args.size(), K = args.size(), N = args.size(), D = args.size();
  parallel_for(slots, 16384 / std::max<int64_t>(1, D), [&](int64_t begin, int64_t end, int) {
    for (int64_t p = begin; p < end; p++) {
      const int64_t token = order[p] < 0 ? -1 : order[p] / K;
      const bool valid = token >= 0 && token < N;
      const float* from = x + token * D;
      each_vector(D, [&](int64_t i, int count) { store_some(y + p * D + i, valid ? load_some(from + i, count) : zero(), count); });
    }
  });
}

// dx, dy, positions, N, K, D: dx[n] = sum over k of dy[positions[n * K + k]]
MOE_KERNEL(moe_permute_tokens_bwd_f32) {
  float* dx = args.ptr<float>();
  const float* dy = args.ptr<const float>();
  const int32_t* positions = args.ptr<const int32_t>();
  const int64_t N = args.size(), K = args.size(), D = args.size();
  parallel_for(N, 16384 / std::max<int64_t>(1, D * K), [&](int64_t begin, int64_t end, int) {
    for (int64_t n = begin; n < end; n++) {
      each_vector(D, [&](int64_t i, int count) {
        f32v total = zero();
        for (int64_t k = 0; k < K; k++) {
          const int64_t p = positions[n * K + k];
          if (p >= 0 && p < N * K) total += load_some(dy + p * D + i, count);
        }
        store_some(dx + n * D + i, total, count);
      });
    }
  });
}
