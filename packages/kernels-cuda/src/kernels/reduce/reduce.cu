// Sums and maxima over the middle axis of [outer, count, inner], with one kernel for inner = 1 and one for all other
// shapes. A long axis is split into chunks, which the launcher reduces with a second launch. The order of additions
// depends only on the sizes.
#include "each.cuh"

template <class Op, class T, int N>
MOE_DEVICE void joinPack(Pack<T, N>& a, Pack<T, N> b) {
  for (int j = 0; j < N; j++) a.v[j] = Op::join(a.v[j], b.v[j]);
}

constexpr int threads = 256;

/// y [rows, chunks] from x [rows, count], where chunk c starts at c * chunk; `lanes` threads (a power of two) share one
/// chunk of a row.
template <class Op, class T>
MOE_DEVICE void reduceRows(T* y, const T* x, int64_t rows, int64_t count, int64_t chunk, int chunks, int lanes) {
  MOE_SHARED(T, parts, [threads / 32]);
  const int lane = threadIdx.x % lanes;
  const int64_t task = (int64_t)blockIdx.x * (threads / lanes) + threadIdx.x / lanes;
  T total = Op::start(T());
  if (task < rows * chunks) {
    const int64_t begin = task % chunks * chunk;
    const int64_t n = count - begin < chunk ? count - begin : chunk;
    const T* from = x + task / chunks * count + begin;
    if (count % 4 == 0 && chunk % 4 == 0) {
      Pack<T> sums{{total, total, total, total}};
#pragma unroll 4
      for (int64_t i = 4 * lane; i < n; i += 4 * lanes) joinPack<Op>(sums, loadPack(from + i));
      total = Op::join(Op::join(sums.v[0], sums.v[1]), Op::join(sums.v[2], sums.v[3]));
    } else {
#pragma unroll 4
      for (int64_t i = lane; i < n; i += lanes) total = Op::join(total, from[i]);
    }
  }
  total = joinLanes<Op>(total, lanes < 32 ? lanes : 32);
  if (lanes > 32) {
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = total;
    __syncthreads();
    if (lane == 0) {
      for (int warp = 1; warp < lanes / 32; warp++) total = Op::join(total, parts[threadIdx.x / 32 + warp]);
    }
  }
  if (lane == 0 && task < rows * chunks) y[task] = total;
}

/// y [outer, chunks, inner] from x [outer, count, inner], N columns per thread. A block has `width` (a power of two)
/// packs of neighbouring columns; its threads / width lines of threads share the rows of a chunk.
template <int N, class Op, class T>
MOE_DEVICE void reduceColumns(T* y, const T* x, int64_t outer, int64_t count, int64_t inner, int64_t chunk, int chunks, int width) {
  using Columns = Pack<T, N>;
  MOE_SHARED(Columns, parts, [threads]);
  const int64_t across = inner / N;
  const int64_t column = (int64_t)(blockIdx.x / chunks) * width + threadIdx.x % width;
  const int64_t part = blockIdx.x % chunks;
  const int line = threadIdx.x / width;
  const int lines = threads / width;
  const int64_t end = count - part * chunk < chunk ? count : (part + 1) * chunk;
  const int64_t at = column % across * N;
  Columns total;
  for (int j = 0; j < N; j++) total.v[j] = Op::start(T());
  if (column < outer * across) {
    const T* from = x + column / across * count * inner + at;
#pragma unroll 4
    for (int64_t row = part * chunk + line; row < end; row += lines) joinPack<Op>(total, loadPack<N>(from + row * inner));
  }
  for (int half = lines / 2; half > 0; half /= 2) {
    parts[threadIdx.x] = total;
    __syncthreads();
    if (line < half) joinPack<Op>(total, parts[threadIdx.x + half * width]);
    __syncthreads();
  }
  if (line == 0 && column < outer * across) storePack(y + (column / across * chunks + part) * inner + at, total);
}

#define REDUCE(name, Op, T)                                                                                             \
  MOE_KERNEL((threads), name##_rows, (T * y, const T* x, int64_t rows, int64_t count, int64_t chunk, int chunks, int lanes)) { \
    reduceRows<Op>(y, x, rows, count, chunk, chunks, lanes);                                                            \
  }                                                                                                                     \
  MOE_KERNEL((threads, 4), name##_columns,                                                                              \
             (T * y, const T* x, int64_t outer, int64_t count, int64_t inner, int64_t chunk, int chunks, int width)) {  \
    if (inner % 4 == 0) {                                                                                               \
      reduceColumns<4, Op>(y, x, outer, count, inner, chunk, chunks, width);                                            \
    } else {                                                                                                            \
      reduceColumns<1, Op>(y, x, outer, count, inner, chunk, chunks, width);                                            \
    }                                                                                                                   \
  }

REDUCE(moe_reduce_sum_f32, Sum, float)
REDUCE(moe_reduce_max_f32, MaxOrNan, float)
REDUCE(moe_reduce_sum_i32, Sum, int)
REDUCE(moe_reduce_max_i32, MaxOrNan, int)
