// Rows by index: gather, scatter-add, replace. Indices out of range read zeros or write nothing.
#include "each.cuh"

MOE_DEVICE bool isRow(int index, int rows) { return index >= 0 && index < rows; }

/// y [n, width] from x [rows, width] in units of T.
template <class T>
MOE_DEVICE void takeRows(T* y, const T* x, const int* index, int64_t n, int rows, int64_t width) {
  for (int64_t i = gridThread(); i < n * width; i += gridThreads()) {
    const int64_t place = i / width;
    const int row = index[place];
    y[i] = isRow(row, rows) ? x[row * width + i - place * width] : T{};
  }
}

/// Writes to x [rows, width] in place. Block (i, j) writes part j of source row i, unless a later source has the same
/// row. `last` contains the last source of each row (counted from 1); without it, the block searches for it.
template <class T>
MOE_DEVICE void setRow(T* x, const int* index, const T* source, const int* last, int n, int rows, int64_t width) {
  const int i = blockIdx.x;
  const int row = index[i];
  bool writes = isRow(row, rows);
  if (last != nullptr) {
    writes = writes && last[row] == i + 1;
  } else {
    bool later = false;
    for (int k = i + 1 + threadIdx.x; k < n; k += blockDim.x) later = later || index[k] == row;
    writes = !__syncthreads_or(later) && writes;
  }
  if (!writes) return;
  for (int64_t c = blockIdx.y * blockDim.x + threadIdx.x; c < width; c += gridDim.y * blockDim.x) {
    x[row * width + c] = source[i * width + c];
  }
}

#define ROWS(bits, T)                                                                                                      \
  MOE_KERNEL((256), moe_take_rows_b##bits, (T * y, const T* x, const int* index, int64_t n, int rows, int64_t width)) {    \
    takeRows(y, x, index, n, rows, width);                                                                                 \
  }                                                                                                                        \
  MOE_KERNEL((128), moe_set_rows_b##bits,                                                                                  \
             (T * x, const int* index, const T* source, const int* last, int n, int rows, int64_t width)) {                \
    setRow(x, index, source, last, n, rows, width);                                                                        \
  }
ROWS(8, uint8_t)
ROWS(16, uint16_t)
ROWS(32, uint32_t)
ROWS(64, uint2)
ROWS(128, uint4)

/// last [rows], initially zero: the largest i + 1 with index[i] = row.
MOE_KERNEL((256), moe_set_rows_last, (int* last, const int* index, int n, int rows)) {
  for (int64_t i = gridThread(); i < n; i += gridThreads()) {
    if (isRow(index[i], rows)) atomicMax(&last[index[i]], (int)i + 1);
  }
}

// --- scatter-add: the sources of each row are collected with integer atomics, sorted, and added in order ---

/// counts [rows], initially zero: the number of sources of each row. arrivals [n]: how many came before, in an order
/// that depends on timing.
MOE_KERNEL((256), moe_scatter_count, (int* counts, int* arrivals, const int* index, int64_t n, int rows)) {
  for (int64_t i = gridThread(); i < n; i += gridThreads()) {
    if (isRow(index[i], rows)) arrivals[i] = atomicAdd(&counts[index[i]], 1);
  }
}

/// starts [rows]: where the list of each row starts. Lists are in arbitrary order; `used` is initially 0.
MOE_KERNEL((256), moe_scatter_reserve,
           (int* starts, int* used, const int* counts, const int* arrivals, const int* index, int64_t n, int rows)) {
  for (int64_t i = gridThread(); i < n; i += gridThreads()) {
    const int row = index[i];
    if (isRow(row, rows) && arrivals[i] == 0) starts[row] = atomicAdd(used, counts[row]);
  }
}

/// lists [n]: the sources of each row in order of arrival.
MOE_KERNEL((256), moe_scatter_list, (int* lists, const int* starts, const int* arrivals, const int* index, int64_t n, int rows)) {
  for (int64_t i = gridThread(); i < n; i += gridThreads()) {
    const int row = index[i];
    if (isRow(row, rows)) lists[starts[row] + arrivals[i]] = (int)i;
  }
}

/// sorted [n]: the same lists in source order. Each source counts those before it.
MOE_KERNEL((256), moe_scatter_sort,
           (int* sorted, const int* lists, const int* starts, const int* counts, const int* index, int64_t n, int rows)) {
  for (int64_t i = gridThread(); i < n; i += gridThreads()) {
    const int row = index[i];
    if (!isRow(row, rows)) continue;
    const int* list = lists + starts[row];
    const int count = counts[row];
    int before = 0;
#pragma unroll 8
    for (int k = 0; k < count; k++) before += list[k] < i;
    sorted[starts[row] + before] = (int)i;
  }
}

/// y [rows, width]: zeros plus the sources of each row in order, N columns per thread.
template <int N, class T>
MOE_DEVICE void addRows(T* y, const T* source, const int* sorted, const int* starts, const int* counts, int rows, int64_t width) {
  const int64_t across = width / N;
  for (int64_t i = gridThread(); i < rows * across; i += gridThreads()) {
    const int64_t row = i / across;
    const int64_t column = (i - row * across) * N;
    const int count = counts[row];
    const int* list = sorted + (count == 0 ? 0 : starts[row]);
    Pack<T, N> total = {};
#pragma unroll 8
    for (int k = 0; k < count; k++) {
      const Pack<T, N> part = loadPack<N>(source + list[k] * width + column);
      for (int j = 0; j < N; j++) total.v[j] += part.v[j];
    }
    storePack(y + row * width + column, total);
  }
}

#define SCATTER_ADD(name, T)                                                                                               \
  MOE_KERNEL((256), name,                                                                                                  \
             (T * y, const T* source, const int* sorted, const int* starts, const int* counts, int rows, int64_t width)) { \
    if (width % 4 == 0) {                                                                                                  \
      addRows<4>(y, source, sorted, starts, counts, rows, width);                                                          \
    } else {                                                                                                               \
      addRows<1>(y, source, sorted, starts, counts, rows, width);                                                          \
    }                                                                                                                      \
  }
SCATTER_ADD(moe_scatter_add_f32, float)
// Unsigned, because overflow is then defined.
SCATTER_ADD(moe_scatter_add_i32, unsigned)
