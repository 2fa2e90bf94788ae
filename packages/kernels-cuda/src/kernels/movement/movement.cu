// Moves elements in units of 1 to 16 bytes: strided copies, padding, and transposes.
#include "nest.cuh"

/// y[nest] = x[nest], n units. The nest has the strides of y and x.
template <class T>
MOE_DEVICE void copyBox(T* y, const T* x, int64_t n, int rank, const Nest<2>& nest) {
  const int64_t step = gridThreads();
  for (int64_t i = gridThread(); i < n; i += 4 * step) {
    // Four loads are in flight at a time.
    T units[4];
    int64_t to[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
      if (i + j * step >= n) continue;
      int64_t at[2];
      locate(at, i + j * step, rank, nest);
      units[j] = x[at[1]];
      to[j] = at[0];
    }
#pragma unroll
    for (int j = 0; j < 4; j++) {
      if (i + j * step < n) y[to[j]] = units[j];
    }
  }
}

/// y [n units] is x, padded with `value`. For each axis of y: its size, the size of x's axis, the padding before it
/// (both in units), and x's stride.
template <class T>
MOE_DEVICE void padBox(T* y, const T* x, int64_t n, T value, int rank, const Nest<3>& nest) {
  for (int64_t i = gridThread(); i < n; i += gridThreads()) {
    int64_t rest = i;
    int64_t at = 0;
    bool inside = true;
#pragma unroll 1
    for (int axis = 0; axis < rank; axis++) {
      const int64_t size = nest[4 * axis];
      const int64_t above = rest / size;
      const int64_t index = rest - above * size - nest[4 * axis + 2];
      inside = inside && index >= 0 && index < nest[4 * axis + 1];
      at += index * nest[4 * axis + 3];
      rest = above;
    }
    y[i] = inside ? x[at] : value;
  }
}

constexpr int tile = 32;
constexpr int tileLines = 8;

/// y[p * strideY + q] = x[q * strideX + p] for p < P, q < Q, at every element of the nest. A block of 32 x 8 threads
/// moves one tile through shared memory.
template <class T>
MOE_DEVICE void transposeTile(T* y, const T* x, int64_t P, int64_t Q, int64_t strideY, int64_t strideX, int rank,
                              const Nest<2>& nest) {
  MOE_SHARED(T, square, [tile][tile + 1]);
  const int64_t tilesQ = divUp<int64_t>(Q, tile);
  const int64_t tiles = divUp<int64_t>(P, tile) * tilesQ;
  const int64_t p = blockIdx.x % tiles / tilesQ * tile;
  const int64_t q = blockIdx.x % tiles % tilesQ * tile;
  const int column = threadIdx.x % tile;
  const int line = threadIdx.x / tile;
  int64_t at[2];
  locate(at, blockIdx.x / tiles, rank, nest);
  for (int i = line; i < tile; i += tileLines) {
    if (q + i < Q && p + column < P) square[i][column] = x[at[1] + (q + i) * strideX + p + column];
  }
  __syncthreads();
  for (int i = line; i < tile; i += tileLines) {
    if (p + i < P && q + column < Q) y[at[0] + (p + i) * strideY + q + column] = square[column][i];
  }
}

#define COPY(bits, T)                                                                                               \
  MOE_KERNEL((256), moe_copy_box_b##bits, (T * y, const T* x, int64_t n, int rank, Args<int64_t, 24> nest)) {        \
    copyBox(y, x, n, rank, nest);                                                                                   \
  }
COPY(8, uint8_t)
COPY(16, uint16_t)
COPY(32, uint32_t)
COPY(64, uint2)
COPY(128, uint4)

MOE_KERNEL((256), moe_pad_b32, (uint32_t* y, const uint32_t* x, int64_t n, int value, int rank, Args<int64_t, 32> nest)) {
  padBox(y, x, n, (uint32_t)value, rank, nest);
}
MOE_KERNEL((256), moe_pad_b128, (uint4* y, const uint4* x, int64_t n, int value, int rank, Args<int64_t, 32> nest)) {
  const unsigned v = (unsigned)value;
  padBox(y, x, n, make_uint4(v, v, v, v), rank, nest);
}

#define TRANSPOSE(bits, T)                                                                                          \
  MOE_KERNEL((256), moe_transpose_b##bits,                                                                          \
             (T * y, const T* x, int64_t P, int64_t Q, int64_t strideY, int64_t strideX, int rank, Args<int64_t, 24> nest)) { \
    transposeTile(y, x, P, Q, strideY, strideX, rank, nest);                                                        \
  }
TRANSPOSE(8, uint8_t)
TRANSPOSE(16, uint16_t)
TRANSPOSE(32, uint32_t)
