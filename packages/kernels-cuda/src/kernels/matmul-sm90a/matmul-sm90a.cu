// Dense bf16 products on Hopper: a persistent, warp-specialized GEMM (gemm-hopper.cuh).
#include "gemm-hopper.cuh"

/// c = a b (or c += a b) for `batches` matrices; with several parts of k (split-K), c is one result for each. a is [m,
/// k], or [k, m] if TransposeA; b is [k, n], or [n, k] if TransposeB. The grid has as many blocks as run at once.
template <class Tile, bool TransposeA, bool TransposeB>
MOE_DEVICE void product(float* c, const TensorMap& a, const TensorMap& b, int m, int n, int k, int batches, int parts, int add) {
  const int tilesM = divUp(m, Tile::BM), tilesN = divUp(n, Tile::BN), tiles = tilesM * tilesN;
  const int part = divUp(divUp(k, parts), Tile::BK) * Tile::BK;
  persistentGemm<Tile, TransposeA, !TransposeB>(
      a, b, parts * batches * tiles,
      [&](int j) -> WorkTile {
        const int2 tile = rasterize(j % tiles, tilesM, tilesN);
        const int batch = j / tiles % batches, from = j / tiles / batches * part, size = min(k - from, part);
        const int row = tile.x * Tile::BM;
        return {row, batch, tile.y * Tile::BN, batch, from, size > 0 ? divUp(size, Tile::BK) : 0, m - row};
      },
      [&](int j, const WorkTile& work, typename Tile::Accumulator& sums) {
        float* const to = c + ((int64_t)(j / tiles) * m + work.rowA) * n + work.rowB;
        storeTile<Tile>(to, n, work.rows, n - work.rowB, sums, add != 0);
      });
}

#define MATMUL(name, Tile, TransposeA, TransposeB)                                                                                                   \
  MOE_KERNEL((Tile::Threads, 1), moe_matmul_sm90a_##name, (float* c, const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b, int m, int n, int k, int batches, int parts, int add)) { \
    product<Tile, TransposeA, TransposeB>(c, a, b, m, n, k, batches, parts, add);                                                                    \
  }
#define MATMUL_FORMS(name, Tile)           \
  MATMUL(name##_nn, Tile, false, false)    \
  MATMUL(name##_nt, Tile, false, true)     \
  MATMUL(name##_tn, Tile, true, false)     \
  MATMUL(name##_tt, Tile, true, true)
MATMUL_FORMS(128x256, HopperLarge)
MATMUL_FORMS(128x192, HopperMedium)
MATMUL(128x144_nt, HopperNarrow, false, true)
MATMUL_FORMS(128x128, HopperSmall)
