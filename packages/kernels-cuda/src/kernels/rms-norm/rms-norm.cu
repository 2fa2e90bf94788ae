// RMSNorm over rows and its gradient. Kernels end in _t<threads per row>.
#include "row.cuh"

// y = x * rstd * weight
template <int Threads, int Held, bool Whole>
MOE_DEVICE void rmsNorm(float* y, float* rstd, const float* x, const float* weight, int n, float eps) {
  const int first = firstColumn<Threads>(x);
  const Row<Threads, Held, Whole> row(x, first, n);
  float squares = 0.f;
  eachVector<Threads, Held>(first, n, [&](int i, int j) {
    const Four v = row.at(i, j);
    squares += (v.v[0] * v.v[0] + v.v[1] * v.v[1]) + (v.v[2] * v.v[2] + v.v[3] * v.v[3]);
  });
  const float r = 1.f / sqrtf(blockSum<Threads>(squares) / (float)n + eps);
  if (threadIdx.x % Threads == 0) *rstd = r;
  eachVector<Threads, Held>(first, n, [&](int i, int j) {
    const Four v = row.at(i, j), w = load4<Whole>(weight, i, n);
    store4<Whole>(y, i, n, four([&](int k) { return v.v[k] * r * w.v[k]; }));
  });
}

#define RMS_NORM(Threads, bounds)                                                                                        \
  MOE_KERNEL(bounds, moe_rms_norm_fwd_f32_t##Threads,                                                                    \
             (float* y, float* rstd, const float* x, const float* __restrict__ weight, int64_t rows, int n,              \
              float eps)) {                                                                                              \
    const int64_t row = rowOfGroup<Threads>();                                                                           \
    if (row >= rows) return;                                                                                             \
    const int64_t at = row * n;                                                                                          \
    if (n % 4 == 0) {                                                                                                    \
      rmsNorm<Threads, 8, true>(y + at, rstd + row, x + at, weight, n, eps);                                             \
    } else {                                                                                                             \
      rmsNorm<Threads, 0, false>(y + at, rstd + row, x + at, weight, n, eps);                                            \
    }                                                                                                                    \
  }

RMS_NORM(32, (128))
RMS_NORM(256, (256, 2))

// One row: dx, and its contribution to dweight, which is added to `sums` [n]. A thread has the same columns in every
// row, so it alone accesses its sums.
template <int Threads, int Held, bool Whole>
MOE_DEVICE void rmsNormGradient(float* dx, float* sums, const float* x, const float* weight, float r, const float* dy, int n) {
  const int first = 4 * (int)(threadIdx.x % Threads);
  const Row<Threads, Held, Whole> xRow(x, first, n), dyRow(dy, first, n);
  float dot = 0.f;
  eachVector<Threads, Held>(first, n, [&](int i, int j) {
    const Four v = xRow.at(i, j), d = dyRow.at(i, j), w = load4<Whole>(weight, i, n);
    for (int k = 0; k < 4; k++) dot += d.v[k] * w.v[k] * v.v[k];
  });
  // mean(g * normal), with g = dy * weight and normal = x * r
  const float mean = blockSum<Threads>(dot) * r / (float)n;
  eachVector<Threads, Held>(first, n, [&](int i, int j) {
    const Four normal = four([&](int k) { return xRow.at(i, j).v[k] * r; });
    const Four d = dyRow.at(i, j), w = load4<Whole>(weight, i, n), sum = load4(sums, i);
    store4<Whole>(dx, i, n, four([&](int k) { return (d.v[k] * w.v[k] - normal.v[k] * mean) * r; }));
    storeShared4(sums, i, four([&](int k) { return sum.v[k] + d.v[k] * normal.v[k]; }));
  });
}

// partial [blocks, n]: the contribution to dweight of each block's rows, which are a grid apart. Dynamic shared memory:
// for each of the block's groups of `Threads` threads, a row of floats, rounded up to a multiple of four.
template <int Threads, int Held>
MOE_DEVICE void rmsNormGradients(float* dx, float* partial, const float* x, const float* weight, const float* rstd,
                                 const float* dy, int64_t rows, int n) {
  MOE_DYNAMIC_SHARED(memory);
  float* sums = reinterpret_cast<float*>(memory);
  const int stride = divUp(n, 4) * 4, groups = (int)blockDim.x / Threads;
  float* own = sums + (int)threadIdx.x / Threads * stride;
  for (int i = 4 * (int)(threadIdx.x % Threads); i < n; i += 4 * Threads) storeShared4(own, i, Four{});
  for (int64_t row = rowOfGroup<Threads>(); row < rows; row += (int64_t)gridDim.x * groups) {
    const int64_t at = row * n;
    if (n % 4 == 0) {
      rmsNormGradient<Threads, Held, true>(dx + at, own, x + at, weight, rstd[row], dy + at, n);
    } else {
      rmsNormGradient<Threads, 0, false>(dx + at, own, x + at, weight, rstd[row], dy + at, n);
    }
  }
  __syncthreads();
  for (int i = (int)threadIdx.x; i < n; i += (int)blockDim.x) {
    float total = 0.f;
    for (int g = 0; g < groups; g++) total += sums[g * stride + i];
    partial[(int64_t)blockIdx.x * n + i] = total;
  }
}

#define RMS_NORM_GRADIENT(Threads, bounds)                                                                               \
  MOE_KERNEL(bounds, moe_rms_norm_bwd_f32_t##Threads,                                                                    \
             (float* dx, float* partial, const float* x, const float* __restrict__ weight, const float* rstd,            \
              const float* dy, int64_t rows, int n)) {                                                                   \
    rmsNormGradients<Threads, 8>(dx, partial, x, weight, rstd, dy, rows, n);                                             \
  }

RMS_NORM_GRADIENT(32, (128))
RMS_NORM_GRADIENT(256, (256, 2))

// sums [n] of the columns of x [rows, n]. A block has 32 columns, and each of its warps a part of the rows; the parts
// are added in order.
MOE_KERNEL((512), moe_rms_norm_column_sums_f32, (float* sums, const float* x, int rows, int n)) {
  MOE_SHARED(float, parts, [16][32]);
  const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
  const int column = (int)blockIdx.x * 32 + lane;
  float total = 0.f;
  if (column < n) {
#pragma unroll 4
    for (int row = warp; row < rows; row += 16) total += x[(int64_t)row * n + column];
  }
  parts[warp][lane] = total;
  __syncthreads();
  if (warp > 0 || column >= n) return;
  for (int w = 1; w < 16; w++) total += parts[w][lane];
  sums[column] = total;
}
