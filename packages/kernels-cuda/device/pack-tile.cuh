// Transposed and in bf16, by blocks of 256 threads.
#pragma once
#include "moe.cuh"

/// to[o][i] = from[i][o], rounded, for 64 x 64 elements of which `rows` x `outer` exist. Zeros from `rows` to `width`, a multiple of 8.
MOE_DEVICE void packTile(bf16* to, int64_t ld, const float* from, int64_t columns, int rows, int outer, int width) {
  MOE_SHARED(float, tile, [64][65]);
#pragma unroll
  for (int step = 0; step < 16; step++) {
    const int o = threadIdx.x % 64, i = threadIdx.x / 64 + step * 4;
    tile[i][o] = i < rows && o < outer ? from[i * columns + o] : 0.f;
  }
  __syncthreads();
#pragma unroll
  for (int step = 0; step < 2; step++) {
    const int i = threadIdx.x % 8 * 8, o = threadIdx.x / 8 + step * 32;
    if (o >= outer || i >= width) continue;
    uint32_t pairs[4];
#pragma unroll
    for (int p = 0; p < 4; p++) pairs[p] = packBf16(tile[i + 2 * p][o], tile[i + 2 * p + 1][o]);
    *(uint4*)(to + o * ld + i) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
  }
}
