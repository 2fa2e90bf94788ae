// The dense bf16 product on Hopper: c = a b^T with both operands as [outer][k], and what makes such operands of others.
#include "gemm-hopper.cuh"
#include "pack-tile.cuh"

/// Matrices [k, outer] in rows of `columns` to [outer, ld] of bf16; with `lengths` only the first so many k of each count, and the rest is zeros.
/// blockIdx.x = matrix, tile along outer, tile along k.
template <class T>
MOE_DEVICE void pack(bf16* to, const T* from, const int* lengths, int outer, int columns, int k, int ld) {
  const int tilesK = divUp(k, 64), tilesO = divUp(outer, 64);
  const int i = blockIdx.x % tilesK * 64, o = blockIdx.x / tilesK % tilesO * 64;
  const int64_t matrix = blockIdx.x / tilesK / tilesO;
  const int rows = lengths ? min(k, lengths[matrix]) : k;
  packTile(to + (matrix * outer + o) * ld + i, ld, from + (matrix * k + i) * columns + o, columns, rows - i, outer - o, ld - i);
}
MOE_KERNEL((256), moe_pack_sm90a_f32, (bf16* to, const float* from, const int* lengths, int outer, int columns, int k, int ld)) {
  pack(to, from, lengths, outer, columns, k, ld);
}
MOE_KERNEL((256), moe_pack_sm90a_bf16, (bf16* to, const bf16* from, const int* lengths, int outer, int columns, int k, int ld)) {
  pack(to, from, lengths, outer, columns, k, ld);
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
        const int row = tile.x * Tile::BM;
        return {row, batch, tile.y * Tile::BN, batch, from, size > 0 ? divUp(size, Tile::BK) : 0, m - row};
      },
      [&](int j, const HopperJob& job, typename Tile::Sums& sums) {
        float* const to = c + ((int64_t)(j / tiles) * m + job.rowA) * n + job.rowB;
        storeTile<Tile>(to, n, job.rows, n - job.rowB, sums, add != 0);
      });
}

#define MATMUL(name, Tile)                                                                                                                           \
  MOE_KERNEL((Tile::Threads, 1), moe_matmul_sm90a_##name, (float* c, const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b, int m, int n, int k, int batches, int parts, int add)) { \
    product<Tile>(c, a, b, m, n, k, batches, parts, add);                                                                                            \
  }
MATMUL(128x256, HopperLarge)
MATMUL(128x128, HopperSmall)
