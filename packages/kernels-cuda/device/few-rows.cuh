// Products with few rows (GEMV-like), which are limited by the bandwidth of reading the weight. The weight is read
// once, as f32, and rounded to bf16 in registers if requested. Blocks of 128 threads; k is split among the threads, and
// the partial sums are added in a fixed order.
#pragma once
#include "moe.cuh"

template <bool Bf16>
MOE_DEVICE float4 operand(float4 x) {
  if (!Bf16) return x;
  const uint32_t low = packBf16(x.x, x.y), high = packBf16(x.z, x.w);
  return make_float4(lowBf16(low), highBf16(low), lowBf16(high), highBf16(high));
}

/// y [rows, 4 columns] = x weight^T, for at most R rows of x and `columns` rows of weight. Both have k (a multiple of
/// 4) elements per row. Each thread takes four neighbouring k of every 512.
template <int R, bool Bf16>
MOE_DEVICE void fewRowsTimesRows(float (*parts)[32], float* y, const float* x, const float* weight, int rows, int columns, int k, int ldy) {
  float sums[R][4] = {};
  for (int at = threadIdx.x * 4; at < k; at += 512) {
    float4 w[4];
#pragma unroll
    for (int j = 0; j < 4; j++) w[j] = j < columns ? *(const float4*)(weight + (int64_t)j * k + at) : make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
    for (int j = 0; j < 4; j++) w[j] = operand<Bf16>(w[j]);
#pragma unroll
    for (int i = 0; i < R; i++) {
      if (i >= rows) continue;
      const float4 v = operand<Bf16>(*(const float4*)(x + (int64_t)i * k + at));
#pragma unroll
      for (int j = 0; j < 4; j++) {
        sums[i][j] = fmaf(v.x, w[j].x, fmaf(v.y, w[j].y, fmaf(v.z, w[j].z, fmaf(v.w, w[j].w, sums[i][j]))));
      }
    }
  }
  float all[R * 4];
#pragma unroll
  for (int i = 0; i < R * 4; i++) all[i] = sums[i / 4][i % 4];
  warpSums(all);
  if (threadIdx.x % 32 == 0) {
#pragma unroll
    for (int i = 0; i < R * 4; i++) parts[threadIdx.x / 32][i] = all[i];
  }
  __syncthreads();
  const int i = threadIdx.x / 4, j = threadIdx.x % 4;
  if (i < rows && j < columns) {
    y[(int64_t)i * ldy + j] = parts[0][threadIdx.x] + parts[1][threadIdx.x] + parts[2][threadIdx.x] + parts[3][threadIdx.x];
  }
}

/// y [rows, 128 columns] = x weight, for at most R rows of x and a weight of k rows with ldw (a multiple of 4)
/// elements. Each warp takes every fourth k, each lane 4 columns.
template <int R, bool Bf16>
MOE_DEVICE void fewRowsTimesColumns(float (*parts)[1024], float* y, const float* x, const float* weight, int rows, int columns, int k, int ldw) {
  const int column = threadIdx.x % 32 * 4, warp = threadIdx.x / 32;
  float sums[R][4] = {};
#pragma unroll 4
  for (int at = warp; at < k; at += 4) {
    const float4 w = operand<Bf16>(column < columns ? *(const float4*)(weight + (int64_t)at * ldw + column) : make_float4(0.f, 0.f, 0.f, 0.f));
#pragma unroll
    for (int i = 0; i < R; i++) {
      if (i >= rows) continue;
      const float v = Bf16 ? lowBf16(packBf16(x[(int64_t)i * k + at], 0.f)) : x[(int64_t)i * k + at];
      sums[i][0] = fmaf(v, w.x, sums[i][0]);
      sums[i][1] = fmaf(v, w.y, sums[i][1]);
      sums[i][2] = fmaf(v, w.z, sums[i][2]);
      sums[i][3] = fmaf(v, w.w, sums[i][3]);
    }
  }
#pragma unroll
  for (int i = 0; i < R; i++) *(float4*)(parts[warp] + i * 128 + column) = make_float4(sums[i][0], sums[i][1], sums[i][2], sums[i][3]);
  __syncthreads();
  for (int i = 0; i < rows; i++) {
    const int at = i * 128 + threadIdx.x;
    if (threadIdx.x < columns) y[(int64_t)i * ldw + threadIdx.x] = parts[0][at] + parts[1][at] + parts[2][at] + parts[3][at];
  }
}

constexpr int mostFewRows = 8;

/// fewRowsTimesRows for 0 to mostFewRows rows: selects R.
template <bool Bf16>
MOE_DEVICE void fewRows(float* y, const float* x, const float* weight, int rows, int columns, int k, int ldy) {
  MOE_SHARED(float, parts, [4][32]);
  if (rows <= 1) fewRowsTimesRows<1, Bf16>(parts, y, x, weight, rows, columns, k, ldy);
  else if (rows <= 4) fewRowsTimesRows<4, Bf16>(parts, y, x, weight, rows, columns, k, ldy);
  else fewRowsTimesRows<8, Bf16>(parts, y, x, weight, rows, columns, k, ldy);
}
