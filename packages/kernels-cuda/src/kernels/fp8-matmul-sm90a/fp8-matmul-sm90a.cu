// Products in fp8 on Hopper: dense, one per expert, and the gradients of the experts' weights. Kernels first quantize
// the operands to K-major codes with scales [matrix][tile of k][outer index]; persistent kernels (gemm-fp8.cuh)
// multiply them.
#include "fp8-codes.cuh"
#include "gemm-fp8.cuh"

// Quantizes [rows, k] along rows to codes [rows][ld], with scales for matrices of `outer` rows each. One warp per tile;
// blockIdx.y is the tile of k.
MOE_KERNEL((256), moe_fp8_codes_along_sm90a, (uint8_t* codes, float* scales, const float* from, int rows, int k, int outer, int ld, int ldScales)) {
  const int row = blockIdx.x * 8 + threadIdx.x / 32, first = blockIdx.y * fp8Tile, lane = threadIdx.x % 32;
  if (row >= rows) return;
  const Four x = load4<false>(from + (int64_t)row * k + first, lane * 4, k - first);
  const int matrix = row / outer, tiles = gridDim.y;
  // The matrix of this row. Its scales are stored contiguously.
  const Fp8Codes own = {codes + (int64_t)matrix * outer * ld, scales + (int64_t)matrix * tiles * ldScales, ld, ldScales};
  writeAlong(own, row % outer, first + lane * 4, x, scaleAlong(x));
}
// Quantizes [rows, columns] across rows, in `runs` runs, and transposes it to codes [run][column][ld], with scales
// [run][tile][ldScales]. Rows of experts become a single matrix, in which each expert's rows start at packedStart.
MOE_KERNEL((256), moe_fp8_codes_across_sm90a,
           (uint8_t* codes, float* scales, const float* from, const int* offsets, int rows, int columns, int ld, int ldScales, int runs)) {
  const RunTile tile = runTile(offsets, rows, columns, runs);
  roundAcross<1>(
      tile.left, columns,
      [&](int row, int column, bool exists, float* x) { *x = exists ? from[(int64_t)(tile.row + row) * columns + column] : 0.f; },
      [&](int, int column, int first, const float* x, Fp8Scale scale) {
        writeAcross(Fp8Codes{codes, scales, ld, ldScales}, tile, offsets, columns, column, first, x, scale);
      });
}

/// c [m, n] = a b^T (or c += a b^T); with several parts of k (split-K), c is one result for each.
MOE_KERNEL((TileFp8::Threads, 1), moe_fp8_matmul_sm90a,
           (float* c, const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b, const float* scalesA, const float* scalesB, int ldA, int ldB, int m, int n, int k, int parts, int add)) {
  using Tile = TileFp8;
  const int tilesM = divUp(m, Tile::BM), tilesN = divUp(n, Tile::BN), tiles = tilesM * tilesN, steps = divUp(k, Tile::BK);
  const int part = divUp(steps, parts);
  persistentGemmFp8(
      a, b, {scalesA, steps, ldA}, {scalesB, steps, ldB}, m, parts * tiles,
      [&](int j) -> WorkTile {
        const int2 tile = rasterize(j % tiles, tilesM, tilesN);
        const int from = j / tiles * part, row = tile.x * Tile::BM;
        return {row, 0, tile.y * Tile::BN, 0, from * Tile::BK, max(min(steps - from, part), 0), m - row};
      },
      [&](int j, const WorkTile& work, Tile::Accumulator& sums) {
        float* const to = c + ((int64_t)(j / tiles) * m + work.rowA) * n + work.rowB;
        storeTile<Tile>(to, n, work.rows, n - work.rowB, sums, add != 0);
      });
}

/// y [rows, n] = x times the transposed weight [n, k] of each row's expert. Tiles read past the last row of their
/// expert, but do not store those rows.
MOE_KERNEL((TileFp8::Threads, 1), moe_fp8_grouped_matmul_sm90a,
           (float* y, const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap weight, const float* scalesX, const float* scalesW, int ldX, int ldW, const int* offsets, int rows, int n, int k, int experts)) {
  using Tile = TileFp8;
  const int rowTiles = min(rows, divUp(rows, Tile::BM) + experts), columnTiles = divUp(n, Tile::BN), steps = divUp(k, Tile::BK);
  persistentGemmFp8(
      x, weight, {scalesX, steps, ldX}, {scalesW, steps, ldW}, rows, rowTiles * columnTiles,
      [&](int j) -> WorkTile {
        const int2 tile = rasterize(j, rowTiles, columnTiles);
        const ExpertTile found = expertTile<Tile::BM>(offsets, experts, rows, tile.x);
        const bool product = found.expert >= 0 && found.expert < experts;
        return {found.row, 0, tile.y * Tile::BN, product ? found.expert : 0, 0, product ? steps : 0, found.end - found.row};
      },
      [&](int, const WorkTile& work, Tile::Accumulator& sums) {
        storeTile<Tile>(y + (int64_t)work.rowA * n + work.rowB, n, work.rows, n - work.rowB, sums, false);
      });
}

/// dweight [E, n, k] = dy^T x over the rows of each expert. Both are packed: codes [n][rows] and [k][rows], with
/// `tiles` tiles of rows.
MOE_KERNEL((TileFp8::Threads, 1), moe_fp8_grouped_matmul_bwd_sm90a,
           (float* dweight, const __grid_constant__ TensorMap dy, const __grid_constant__ TensorMap x, const float* scalesDy, const float* scalesX, int ldDy, int ldX, const int* offsets, int tiles, int n, int k, int experts)) {
  using Tile = TileFp8;
  const int rowTiles = divUp(n, Tile::BM), columnTiles = divUp(k, Tile::BN), perExpert = rowTiles * columnTiles;
  persistentGemmFp8(
      dy, x, {scalesDy, tiles, ldDy}, {scalesX, tiles, ldX}, n, experts * perExpert,
      [&](int j) -> WorkTile {
        const int expert = j / perExpert, rows = offsets[expert + 1] - offsets[expert];
        const int2 tile = rasterize(j % perExpert, rowTiles, columnTiles);
        const int row = tile.x * Tile::BM;
        return {row, 0, tile.y * Tile::BN, 0, packedStart<fp8Tile>(offsets, expert), divUp(rows, Tile::BK), n - row};
      },
      [&](int j, const WorkTile& work, Tile::Accumulator& sums) {
        float* const to = dweight + ((int64_t)(j / perExpert) * n + work.rowA) * k + work.rowB;
        storeTile<Tile>(to, k, work.rows, k - work.rowB, sums, false);
      });
}
