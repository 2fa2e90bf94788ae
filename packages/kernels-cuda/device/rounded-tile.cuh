// Tiles of products that are stored in bf16.
#pragma once
#include "gemm.cuh"

/// Writes the tile to c, rounded; `rows` rows and `columns` columns exist from here on. Where ld is even and `columns` odd, one more column is written.
template <class Tile>
MOE_DEVICE void storeRounded(bf16* c, int64_t ld, int rows, int columns, typename Tile::Sums& sums) {
  static_assert(Tile::Run == 2, "pairs of neighbours");
  const bool pairs = ld % 2 == 0; // then all are aligned
#pragma unroll
  for (int i = 0; i < Tile::Rows; i++) {
    if (Tile::row(i) >= rows) continue;
    bf16* const to = c + Tile::row(i) * ld;
#pragma unroll
    for (int j = 0; j < Tile::Columns; j += 2) {
      const int column = Tile::column(j);
      if (column >= columns) continue;
      const uint32_t both = packBf16(Tile::at(sums, i, j), Tile::at(sums, i, j + 1));
      if (pairs) {
        *(uint32_t*)(to + column) = both;
      } else {
        to[column] = bf16{(uint16_t)both};
        if (column + 1 < columns) to[column + 1] = bf16{(uint16_t)(both >> 16)};
      }
    }
  }
}
