// Epilogues that store tiles of products in bf16.
#pragma once
#include "gemm.cuh"

/// A quad (4 lanes) holds 16 columns of a row, as words (pairs of columns) c and 4 + c. Afterwards lane c holds words
/// 2c and 2c + 1, which are stored at once, so that the quad writes the row's whole sector; single words would each
/// fill half of one. Called by whole warps.
MOE_DEVICE void pairColumns(uint32_t& first, uint32_t& second) {
  const int c = threadIdx.x % 4;
  const uint32_t half = __shfl_xor_sync(wholeWarp, c < 2 ? second : first, 2);
  if (c < 2) second = half;
  else first = half;
  const uint32_t next = __shfl_xor_sync(wholeWarp, c % 2 == 0 ? second : first, 1);
  if (c % 2 == 0) second = next;
  else first = next;
}
/// The first of the four columns that a lane holds after pairColumns, of those that start with the tile's column 0. For
/// those that start with column j, add step(j).
template <class Tile>
MOE_DEVICE int firstPairedColumn() {
  static_assert(Tile::Run == 2 && Tile::Columns % 4 == 0, "pairs of neighbours, eight columns apart");
  return Tile::column(0) + threadIdx.x % 4 * 2;
}

/// storeRounded if groups of four columns are aligned. Whole: all columns exist.
template <class Tile, int First, int Count, bool Whole>
MOE_DEVICE void storePairs(bf16* c, int64_t ld, int rows, int columns, typename Tile::Accumulator& sums) {
  const int left = columns - firstPairedColumn<Tile>();
#pragma unroll
  for (int i = 0; i < Tile::Rows; i++) {
    const bool exists = Tile::row(i) < rows;
    bf16* const to = c + Tile::row(i) * ld + firstPairedColumn<Tile>();
#pragma unroll
    for (int j = 0; j < Count; j += 4) {
      const auto pair = [&](int column) { return packBf16(Tile::at(sums, i, First + column), Tile::at(sums, i, First + column + 1)); };
      uint32_t a = pair(j), b = pair(j + 2);
      pairColumns(a, b);
      if (exists && (Whole || Tile::step(j) < left)) storeWide(to + Tile::step(j), a, b);
    }
  }
}

/// Writes the tile to c, rounded to bf16, if `rows` rows and `columns` columns exist from here on. Also writes the
/// padding of rows in memory up to the next multiple of 4 columns, or of 2, if ld has room for it. First and Count
/// select one half of each thread's columns; that half of the tile is written as if it were the first.
template <class Tile, int First = 0, int Count = Tile::Columns>
MOE_DEVICE void storeRounded(bf16* c, int64_t ld, int rows, int columns, typename Tile::Accumulator& sums) {
  static_assert(Tile::Run == 2, "pairs of neighbours");
  if (ld % 4 == 0) {
    if (columns >= Tile::BN * Count / Tile::Columns) storePairs<Tile, First, Count, true>(c, ld, rows, columns, sums);
    else storePairs<Tile, First, Count, false>(c, ld, rows, columns, sums);
    return;
  }
  const bool pairs = ld % 2 == 0; // then all pairs are aligned
#pragma unroll
  for (int i = 0; i < Tile::Rows; i++) {
    if (Tile::row(i) >= rows) continue;
    bf16* const to = c + Tile::row(i) * ld;
#pragma unroll
    for (int j = 0; j < Count; j += 2) {
      const int column = Tile::column(j);
      if (column >= columns) continue;
      const uint32_t both = packBf16(Tile::at(sums, i, First + j), Tile::at(sums, i, First + j + 1));
      if (pairs) {
        *(uint32_t*)(to + column) = both;
      } else {
        to[column] = bf16{(uint16_t)both};
        if (column + 1 < columns) to[column + 1] = bf16{(uint16_t)(both >> 16)};
      }
    }
  }
}
