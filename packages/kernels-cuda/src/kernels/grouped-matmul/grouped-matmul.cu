// One matrix product per expert. The rows of each expert are read from `offsets` on the device. The host does not know
// them, so the grid has blocks for the largest possible number of tiles; each block finds its tile, or has no work.
#include "expert-tile.cuh"
#include "few-rows.cuh"
#include "gemm.cuh"

/// y [N, n] = x [N, k] times the weight of each row's expert: [n, k] if TransposeW, otherwise [k, n].
template <class Tile, bool TransposeW>
MOE_DEVICE void grouped(float* y, const typename Tile::Element* x, const typename Tile::Element* weight, const int* offsets, int rows, int n, int k, int experts, int ldx, int ldw) {
  MOE_DYNAMIC_SHARED(shared);
  const int2 tile = rasterize(blockIdx.x, min(rows, divUp(rows, Tile::BM) + experts), divUp(n, Tile::BN));
  const ExpertTile found = expertTile<Tile::BM>(offsets, experts, rows, tile.x);
  if (found.expert < 0) return;
  const int column = tile.y * Tile::BN;
  typename Tile::Accumulator sums = {};
  if (found.expert < experts) {
    weight += (int64_t)found.expert * (TransposeW ? n : k) * ldw + (TransposeW ? (int64_t)column * ldw : column);
    Tile::template multiply<false, TransposeW>(
        sums, shared, {x + (int64_t)found.row * ldx, ldx, found.end - found.row}, {weight, ldw, n - column}, k);
  }
  storeTile<Tile>(y + (int64_t)found.row * n + column, n, found.end - found.row, n - column, sums, false);
}

/// Minimum number of blocks per multiprocessor. For consumer Blackwell, ptxas needs more registers for the same tiles
/// and would spill.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
#define BLOCKS(most) (most > 1 ? most - 1 : 1)
#else
#define BLOCKS(most) most
#endif

#define GROUPED(blocks, name, Tile, TransposeW)                                                                                                     \
  MOE_KERNEL((Tile::Threads, BLOCKS(blocks)), moe_grouped_matmul_fwd_##name, (float* y, const Tile::Element* x, const Tile::Element* weight, const int* offsets, int rows, int n, int k, int experts, int ldx, int ldw)) { \
    grouped<Tile, TransposeW>(y, x, weight, offsets, rows, n, k, experts, ldx, ldw);                                                                \
  }
GROUPED(2, f32_128x128_n, F32Large, false)
GROUPED(2, f32_128x128_t, F32Large, true)
GROUPED(3, f32_64x64_n, F32Small, false)
GROUPED(3, f32_64x64_t, F32Small, true)
GROUPED(1, bf16_128x256_n, Bf16Large, false)
GROUPED(1, bf16_128x256_t, Bf16Large, true)
GROUPED(2, bf16_128x128_n, Bf16Medium, false)
GROUPED(2, bf16_128x128_t, Bf16Medium, true)
GROUPED(3, bf16_64x64_n, Bf16Small, false)
GROUPED(3, bf16_64x64_t, Bf16Small, true)

/// The same with the weight as [n, k] for few rows: 4 columns and 8 rows of an expert per block.
template <bool Bf16>
MOE_DEVICE void groupedFewRows(float* y, const float* x, const float* weight, const int* offsets, int rows, int n, int k, int experts) {
  const ExpertTile found = expertTile<mostFewRows>(offsets, experts, rows, blockIdx.y);
  if (found.expert < 0) return;
  const int column = blockIdx.x * 4, count = min(found.end - found.row, mostFewRows), columns = min(n - column, 4);
  y += (int64_t)found.row * n + column;
  if (found.expert < experts) {
    fewRows<Bf16>(y, x + (int64_t)found.row * k, weight + ((int64_t)found.expert * n + column) * k, count, columns, k, n);
  } else if (threadIdx.x / 4 < count && threadIdx.x % 4 < columns) {
    y[(int64_t)(threadIdx.x / 4) * n + threadIdx.x % 4] = 0.f;
  }
}
MOE_KERNEL((128, 4), moe_grouped_matmul_few_f32, (float* y, const float* x, const float* weight, const int* offsets, int rows, int n, int k, int experts)) {
  groupedFewRows<false>(y, x, weight, offsets, rows, n, k, experts);
}
MOE_KERNEL((128, 4), moe_grouped_matmul_few_bf16, (float* y, const float* x, const float* weight, const int* offsets, int rows, int n, int k, int experts)) {
  groupedFewRows<true>(y, x, weight, offsets, rows, n, k, experts);
}

/// dweight [E, n, k] = dy^T x over the rows of each expert (blockIdx.y).
template <class Tile>
MOE_DEVICE void weightGradient(float* dweight, const typename Tile::Element* dy, const typename Tile::Element* x, const int* offsets, int n, int k, int lddy, int ldx) {
  MOE_DYNAMIC_SHARED(shared);
  const int2 tile = rasterize(blockIdx.x, divUp(n, Tile::BM), divUp(k, Tile::BN));
  const int row = tile.x * Tile::BM, column = tile.y * Tile::BN;
  const int from = offsets[blockIdx.y], to = offsets[blockIdx.y + 1];
  typename Tile::Accumulator sums = {};
  Tile::template multiply<true, false>(
      sums, shared, {dy + (int64_t)from * lddy + row, lddy, n - row}, {x + (int64_t)from * ldx + column, ldx, k - column}, to - from);
  storeTile<Tile>(dweight + ((int64_t)blockIdx.y * n + row) * k + column, k, n - row, k - column, sums, false);
}

#define WEIGHT_GRADIENT(blocks, name, Tile)                                                                                                         \
  MOE_KERNEL((Tile::Threads, BLOCKS(blocks)), moe_grouped_matmul_bwd_##name, (float* dweight, const Tile::Element* dy, const Tile::Element* x, const int* offsets, int n, int k, int lddy, int ldx)) { \
    weightGradient<Tile>(dweight, dy, x, offsets, n, k, lddy, ldx);                                                                                 \
  }
WEIGHT_GRADIENT(2, f32_128x128, F32Large)
WEIGHT_GRADIENT(3, f32_64x64, F32Small)
WEIGHT_GRADIENT(1, bf16_128x256, Bf16Large)
WEIGHT_GRADIENT(2, bf16_128x128, Bf16Medium)
WEIGHT_GRADIENT(3, bf16_64x64, Bf16Small)
