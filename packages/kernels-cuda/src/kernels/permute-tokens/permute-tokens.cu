// Copies tokens into expert order, and sums their gradients. A warp processes a slice of `rowSlice` features of a row.
#include "row-slices.cuh"

// y[p] = x[order[p] / K]; zeros where there is no such token
template <bool Whole>
MOE_DEVICE void permute(float* y, const float* x, const int* order, int64_t slots, int K, int64_t N, int D) {
  const int64_t p = rowOfWarp();
  if (p >= slots) return;
  const int slot = order[p];
  const int64_t token = slot < 0 ? N : slot / K;
  eachOfSlice(D, [&](int i) {
    store4<Whole>(y + p * D, i, D, token < N ? load4<Whole>(x + token * D, i, D) : Four{});
  });
}
MOE_KERNEL((256), moe_permute_tokens_fwd_f32,
           (float* y, const float* __restrict__ x, const int* order, int64_t slots, int K, int64_t N, int D)) {
  if (D % 4 == 0) {
    permute<true>(y, x, order, slots, K, N, D);
  } else {
    permute<false>(y, x, order, slots, K, N, D);
  }
}

// dx[n] = sum over k of dy[positions[n * K + k]]
template <bool Whole>
MOE_DEVICE void permuteGradient(float* dx, const float* dy, const int* positions, int64_t N, int K, int D) {
  const int64_t n = rowOfWarp();
  if (n >= N) return;
  eachOfSlice(D, [&](int i) {
    Four total = {};
#pragma unroll 4
    for (int64_t s = n * K; s < (n + 1) * K; s++) {
      const int p = positions[s];
      if (p < 0 || p >= N * K) continue;
      const Four d = load4<Whole>(dy + (int64_t)p * D, i, D);
      for (int j = 0; j < 4; j++) total.v[j] += d.v[j];
    }
    store4<Whole>(dx + n * D, i, D, total);
  });
}
MOE_KERNEL((256), moe_permute_tokens_bwd_f32, (float* dx, const float* dy, const int* positions, int64_t N, int K, int D)) {
  if (D % 4 == 0) {
    permuteGradient<true>(dx, dy, positions, N, K, D);
  } else {
    permuteGradient<false>(dx, dy, positions, N, K, D);
  }
}
