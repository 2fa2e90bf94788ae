// One bf16 product per expert on Hopper (persistent GEMM, gemm-hopper.cuh). As in grouped-matmul.cu, the number of
// tiles is the largest possible one; tiles that the offsets do not need have no work.
#include "expert-tile.cuh"
#include "gemm-hopper.cuh"
#include "packed-rows.cuh"

/// y [N, n] = x [N, k] times the weight [k, n] of each row's expert ([n, k] if Transpose). Tiles read past the last row
/// of their expert, but do not store those rows.
template <class Tile, bool Transpose>
MOE_DEVICE void grouped(float* y, const TensorMap& x, const TensorMap& weight, const int* offsets, int rows, int n, int k, int experts) {
  const int rowTiles = min(rows, divUp(rows, Tile::BM) + experts), columnTiles = divUp(n, Tile::BN);
  persistentGemm<Tile, false, !Transpose>(
      x, weight, rowTiles * columnTiles,
      [&](int j) -> WorkTile {
        const int2 tile = rasterize(j, rowTiles, columnTiles);
        const ExpertTile found = expertTile<Tile::BM>(offsets, experts, rows, tile.x);
        const bool product = found.expert >= 0 && found.expert < experts;
        return {found.row, 0, tile.y * Tile::BN, product ? found.expert : 0, 0, product ? divUp(k, Tile::BK) : 0, found.end - found.row};
      },
      [&](int, const WorkTile& work, typename Tile::Accumulator& sums) {
        storeTile<Tile>(y + (int64_t)work.rowA * n + work.rowB, n, work.rows, n - work.rowB, sums, false);
      });
}

#define GROUPED(name, Tile, Transpose)                                                                                                          \
  MOE_KERNEL((Tile::Threads, 1), moe_grouped_matmul_fwd_sm90a_##name, (float* y, const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap weight, const int* offsets, int rows, int n, int k, int experts)) { \
    grouped<Tile, Transpose>(y, x, weight, offsets, rows, n, k, experts);                                                                       \
  }
GROUPED(128x256_n, HopperLarge, false)
GROUPED(128x256_t, HopperLarge, true)
GROUPED(128x128_n, HopperSmall, false)
GROUPED(128x128_t, HopperSmall, true)

/// Packs rows [N, columns] of f32 into rows of `ld` bf16: row r of an expert becomes row packedStart + r. A block
/// (blockIdx.x) writes 64 rows of the result.
MOE_KERNEL((256), moe_pack_groups_sm90a, (bf16* to, const float* from, const int* offsets, int experts, int columns, int ld)) {
  MOE_SHARED(int, owner, [1]);
  const int first = blockIdx.x * 64;
  if (threadIdx.x == 0) owner[0] = -1;
  __syncthreads();
  for (int e = threadIdx.x; e < experts; e += 256) {
    const int within = first - packedStart(offsets, e);
    if (within >= 0 && within < offsets[e + 1] - offsets[e]) owner[0] = e;
  }
  __syncthreads();
  const int expert = owner[0];
  if (expert < 0) return; // between two experts; never read
  const int begin = offsets[expert] + first - packedStart(offsets, expert), rows = offsets[expert + 1] - begin;
  from += (int64_t)begin * columns;
  to += (int64_t)first * ld;
  const int perRow = ld / 8;
  for (int i = threadIdx.x; i < 64 * perRow; i += 256) {
    const int row = i / perRow, column = (i - row * perRow) * 8;
    alignas(16) float v[8] = {};
    if (row < rows && columns == ld) {
      *(float4*)v = *(const float4*)(from + i * 8);
      *(float4*)(v + 4) = *(const float4*)(from + i * 8 + 4);
    } else if (row < rows) {
#pragma unroll
      for (int j = 0; j < 8; j++) v[j] = column + j < columns ? from[row * columns + column + j] : 0.f;
    }
    *(uint4*)(to + i * 8) = make_uint4(packBf16(v[0], v[1]), packBf16(v[2], v[3]), packBf16(v[4], v[5]), packBf16(v[6], v[7]));
  }
}

/// dweight [E, n, k] = dy^T x over the rows of each expert. Both are packed.
template <class Tile>
MOE_DEVICE void weightGradient(float* dweight, const TensorMap& dy, const TensorMap& x, const int* offsets, int n, int k, int experts) {
  const int rowTiles = divUp(n, Tile::BM), columnTiles = divUp(k, Tile::BN), tiles = rowTiles * columnTiles;
  persistentGemm<Tile, true, true>(
      dy, x, experts * tiles,
      [&](int j) -> WorkTile {
        const int expert = j / tiles;
        const int2 tile = rasterize(j % tiles, rowTiles, columnTiles);
        const int row = tile.x * Tile::BM, rows = offsets[expert + 1] - offsets[expert];
        return {row, 0, tile.y * Tile::BN, 0, packedStart(offsets, expert), divUp(rows, Tile::BK), n - row};
      },
      [&](int j, const WorkTile& work, typename Tile::Accumulator& sums) {
        float* const to = dweight + ((int64_t)(j / tiles) * n + work.rowA) * k + work.rowB;
        storeTile<Tile>(to, k, work.rows, k - work.rowB, sums, false);
      });
}

#define WEIGHT_GRADIENT(name, Tile)                                                                                                             \
  MOE_KERNEL((Tile::Threads, 1), moe_grouped_matmul_bwd_sm90a_##name, (float* dweight, const __grid_constant__ TensorMap dy, const __grid_constant__ TensorMap x, const int* offsets, int n, int k, int experts)) { \
    weightGradient<Tile>(dweight, dy, x, offsets, n, k, experts);                                                                               \
  }
WEIGHT_GRADIENT(128x256, HopperLarge)
WEIGHT_GRADIENT(128x128, HopperSmall)
