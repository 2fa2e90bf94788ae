// Cumulative sums along the middle axis of [outer, count, inner], with one kernel for inner = 1 and one for all other
// shapes. Sums of f32 are carried in double from tile to tile, and within columns from element to element.
#include "each.cuh"

constexpr int threads = 256;

/// A block of 32 or 256 threads scans a row, four elements per thread at a time.
template <class Total, class T>
MOE_DEVICE void cumsumRow(T* y, const T* x, int64_t count) {
  MOE_SHARED(T, sums, [threads / 32]);
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int warps = blockDim.x / 32;
  const int64_t row = blockIdx.x * count;
  Total carry = 0;
  for (int64_t tile = 0; tile < count; tile += 4 * blockDim.x) {
    const int64_t i = tile + 4 * threadIdx.x;
    Pack<T> v = {};
    if (count % 4 == 0) {
      if (i < count) v = loadPack(x + row + i);
    } else {
      for (int j = 0; j < 4; j++) v.v[j] = i + j < count ? x[row + i + j] : T(0);
    }
    for (int j = 1; j < 4; j++) v.v[j] += v.v[j - 1];
    T sum = v.v[3];
    for (int step = 1; step < 32; step *= 2) {
      const T left = __shfl_up_sync(wholeWarp, sum, step);
      if (lane >= step) sum += left;
    }
    T left = __shfl_up_sync(wholeWarp, sum, 1);
    if (lane == 0) left = 0;
    if (lane == 31) sums[warp] = sum;
    __syncthreads();
    Total before = carry;
    for (int w = 0; w < warps; w++) {
      if (w < warp) before += sums[w];
      carry += sums[w];
    }
    __syncthreads();
    before += left;
    for (int j = 0; j < 4; j++) v.v[j] = (T)(before + v.v[j]);
    if (count % 4 == 0) {
      if (i < count) storePack(y + row + i, v);
    } else {
      for (int j = 0; j < 4 && i + j < count; j++) y[row + i + j] = v.v[j];
    }
  }
}

/// A block scans `width` (a power of two) neighbouring columns; its threads / width lines of threads share the rows.
template <class Total, class T>
MOE_DEVICE void cumsumColumns(T* __restrict__ y, const T* __restrict__ x, int64_t outer, int64_t count, int64_t inner, int width) {
  MOE_SHARED(Total, sums, [threads]);
  const int64_t column = (int64_t)blockIdx.x * width + threadIdx.x % width;
  const bool inside = column < outer * inner;
  const int line = threadIdx.x / width;
  const int lines = threads / width;
  const int64_t share = divUp<int64_t>(count, lines);
  const int64_t begin = line * share;
  const int64_t end = begin + share < count ? begin + share : count;
  const int64_t at = column / inner * count * inner + column % inner;
  Total total = 0;
  if (lines > 1) {
    if (inside) {
#pragma unroll 4
      for (int64_t i = begin; i < end; i++) total += x[at + i * inner];
    }
    sums[threadIdx.x] = total;
    __syncthreads();
    total = 0;
    for (int l = 0; l < line; l++) total += sums[l * width + threadIdx.x % width];
  }
  if (inside) {
#pragma unroll 4
    for (int64_t i = begin; i < end; i++) y[at + i * inner] = (T)(total += x[at + i * inner]);
  }
}

#define CUMSUM(name, T, Total)                                                                                            \
  MOE_KERNEL((threads), name##_rows, (T* y, const T* x, int64_t count)) { cumsumRow<Total>(y, x, count); }                  \
  MOE_KERNEL((threads), name##_columns, (T* y, const T* x, int64_t outer, int64_t count, int64_t inner, int width)) {       \
    cumsumColumns<Total>(y, x, outer, count, inner, width);                                                               \
  }

CUMSUM(moe_cumsum_f32, float, double)
// Two's complement. Unsigned, because overflow is then defined.
CUMSUM(moe_cumsum_i32, unsigned, unsigned)
