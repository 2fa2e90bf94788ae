// The square root of the sum of squares of many tensors, in double, because the square of a gradient of 1e20 overflows
// a float.
#include "four.cuh"

constexpr int threads = 256;
/// Elements of a tensor that a block processes at a time.
constexpr int64_t chunk = 16384;

// Every thread of the block gets the sum.
MOE_DEVICE double blockSumDouble(double x) {
  MOE_SHARED(double, parts, [threads]);
  parts[threadIdx.x] = x;
  __syncthreads();
  for (int half = threads / 2; half > 0; half /= 2) {
    if ((int)threadIdx.x < half) parts[threadIdx.x] += parts[threadIdx.x + half];
    __syncthreads();
  }
  return parts[0];
}

// partial[block]: the sum of squares of the block's chunks, every gridDim.x-th of all chunks of the tensors.
MOE_KERNEL((threads), moe_global_norm_squares_f32,
           (double* partial, Args<const float*, 64> tensors, Args<int64_t, 64> sizes, int count)) {
  double total = 0;
  int64_t next = blockIdx.x;  // the block's next chunk, relative to tensor t
  for (int t = 0; t < count; t++) {
    const float* x = tensors[t];
    const int64_t n = sizes[t], chunks = divUp(n, chunk);
    for (; next < chunks; next += gridDim.x) {
      const int64_t end = (next + 1) * chunk < n ? (next + 1) * chunk : n;
#pragma unroll 4
      for (int64_t i = next * chunk + 4 * (int)threadIdx.x; i < end; i += 4 * threads) {
        const Four v = load4<false>(x, i, end);
        for (int k = 0; k < 4; k++) total += (double)v.v[k] * (double)v.v[k];
      }
    }
    next -= chunks;
  }
  total = blockSumDouble(total);
  if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

// norm: a float, or three floats whose sum is the double.
MOE_KERNEL((threads), moe_global_norm_root_f32, (float* norm, int floats, const double* partial, int count)) {
  double total = 0;
  for (int i = (int)threadIdx.x; i < count; i += threads) total += partial[i];
  total = blockSumDouble(total);
  if (threadIdx.x == 0) {
    double rest = sqrt(total);
    for (int i = 0; i < floats; i++) {
      norm[i] = (float)rest;
      rest -= (double)norm[i];
    }
  }
}
