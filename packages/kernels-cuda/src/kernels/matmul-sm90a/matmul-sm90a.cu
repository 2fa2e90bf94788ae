// The dense bf16 product on Hopper: c = a b^T with both operands as [outer][k], and what makes such operands of others.
#include "gemm-hopper.cuh"

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

/// Matrices [k, outer] of f32 to [outer, ld] of bf16. blockIdx.x = matrix, tile along outer, tile along k.
MOE_KERNEL((256), moe_pack_transposed_sm90a, (bf16* to, const float* from, int outer, int k, int ld)) {
  const int tilesK = divUp(k, 64), tilesO = divUp(outer, 64);
  const int i = blockIdx.x % tilesK * 64, o = blockIdx.x / tilesK % tilesO * 64;
  const int64_t matrix = blockIdx.x / tilesK / tilesO;
  packTile(to + (matrix * outer + o) * ld + i, ld, from + (matrix * k + i) * outer + o, outer, k - i, outer - o, ld - i);
}

/// c (or c += a b^T), `batches` of it; with several parts of k, c holds one result for each. Grid: as many blocks as run at once.
template <class Tile>
MOE_DEVICE void product(float* c, const TensorMap& a, const TensorMap& b, int m, int n, int k, int batches, int parts, int add) {
  const int tilesM = divUp(m, Tile::BM), tilesN = divUp(n, Tile::BN), tiles = tilesM * tilesN;
  const int part = divUp(divUp(k, parts), Tile::BK) * Tile::BK;
  workOff<Tile>(
      a, b, parts * batches * tiles,
      [&](int j) -> HopperJob {
        const int2 tile = tileOf(j % tiles, tilesM, tilesN);
        const int batch = j / tiles % batches, from = j / tiles / batches * part, size = min(k - from, part);
        return {tile.x * Tile::BM, batch, tile.y * Tile::BN, batch, from, size > 0 ? divUp(size, Tile::BK) : 0};
      },
      [&](int j, const HopperJob& job, typename Tile::Sums& sums) {
        float* const to = c + ((int64_t)(j / tiles) * m + job.rowA) * n + job.rowB;
        storeTile<Tile>(to, n, m - job.rowA, n - job.rowB, sums, add != 0);
      });
}

#define MATMUL(name, Tile)                                                                                                                           \
  MOE_KERNEL((Tile::Threads, 1), moe_matmul_sm90a_##name, (float* c, const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b, int m, int n, int k, int batches, int parts, int add)) { \
    product<Tile>(c, a, b, m, n, k, batches, parts, add);                                                                                            \
  }
MATMUL(128x256, HopperLarge)
MATMUL(128x128, HopperSmall)
