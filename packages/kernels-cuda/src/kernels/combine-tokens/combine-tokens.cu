// The weighted sum of the experts' outputs per token, and its gradients.
#include "../permute-tokens/row-slices.cuh"

// out[n] = sum over k of weights[n, k] * y[positions[n * K + k]]. A warp processes a slice of a token.
template <bool Whole>
MOE_DEVICE void combine(float* out, const float* y, const float* weights, const int* positions, int64_t N, int K, int D) {
  const int64_t n = rowOfWarp();
  if (n >= N) return;
  eachOfSlice(D, [&](int i) {
    Four total[1] = {};
    addSlots(total, weights, positions, n, K, N * K, [&](int64_t row, Four (&part)[1], bool exists) { part[0] = exists ? load4<Whole>(y + row * D, i, D) : Four{}; });
    store4<Whole>(out + n * D, i, D, total[0]);
  });
}
MOE_KERNEL((256), moe_combine_tokens_fwd_f32,
           (float* out, const float* y, const float* weights, const int* positions, int64_t N, int K, int D)) {
  if (D % 4 == 0) {
    combine<true>(out, y, weights, positions, N, K, D);
  } else {
    combine<false>(out, y, weights, positions, N, K, D);
  }
}

// dy[p] = weights[s] * dout[s / K], dweights[s] = dot product of dout[s / K] and y[p], at p = positions[s]. One warp
// per slot s. `positions` is a permutation, so every row of dy is written once.
template <bool Whole>
MOE_DEVICE void combineGradient(float* dy, float* dweights, const float* y, const float* weights, const int* positions,
                                const float* dout, int64_t slots, int K, int D) {
  const int64_t s = rowOfWarp();
  if (s >= slots) return;
  const int64_t p = positions[s];
  const bool valid = p >= 0 && p < slots;
  const float weight = weights[s];
  const float* from = dout + s / K * D;
  float dot = 0.f;
  if (valid) {
    for (int i = 4 * (int)(threadIdx.x % 32); i < D; i += 128) {
      const Four d = load4<Whole>(from, i, D), own = load4<Whole>(y + p * D, i, D);
      store4<Whole>(dy + p * D, i, D, four([&](int j) { return d.v[j] * weight; }));
      dot += (d.v[0] * own.v[0] + d.v[1] * own.v[1]) + (d.v[2] * own.v[2] + d.v[3] * own.v[3]);
    }
  }
  dot = warpSum(dot);
  if (threadIdx.x % 32 == 0) dweights[s] = dot;
}
MOE_KERNEL((256), moe_combine_tokens_bwd_f32,
           (float* dy, float* dweights, const float* __restrict__ y, const float* weights, const int* positions,
            const float* __restrict__ dout, int64_t slots, int K, int D)) {
  if (D % 4 == 0) {
    combineGradient<true>(dy, dweights, y, weights, positions, dout, slots, K, D);
  } else {
    combineGradient<false>(dy, dweights, y, weights, positions, dout, slots, K, D);
  }
}
