// Tiles of bf16 in shared memory, and the fragments that tensor cores take from them.
// Legend: o = the outer index of an operand (a row of the left one, a column of the right one), k = the index that is summed over.
#pragma once
#include "tensor-core.cuh"

/// Where chunk `chunk` (8 elements, 16 bytes) of row `row` begins in a tile whose rows have W elements. The chunks of a row change
/// places so that the same chunk of eight neighbouring rows lies in different banks. Eight rows further is 8 W further.
template <int W>
MOE_DEVICE int chunkAt(int row, int chunk) {
  static_assert(W == 32 || W % 64 == 0, "rows of 64 bytes, or of whole lines of 128");
  return row * W + (chunk ^ (W == 32 ? row >> 1 & 3 : row & 7)) * 8;
}

/// Starts the copy of Rows x W elements from a matrix with `ld` elements between rows; zeros at or past (rows, columns). `from` and
/// `ld` are whole chunks, and so is what memory holds of a row: a chunk is copied whole when it begins before `columns`.
template <int Rows, int W, int Threads>
MOE_DEVICE void copyTile(bf16* tile, const bf16* from, int64_t ld, int rows, int columns) {
  // A line of memory at a time, or half of one, or several where there are fewer rows: then a thread has one address and one distance.
  constexpr int chunks = W == 32 ? 4 : Threads > Rows * 8 ? Threads / Rows : 8, rowsPerStep = Threads / chunks;
  static_assert(rowsPerStep % 8 == 0 && Rows % rowsPerStep == 0, "chunkAt repeats after eight rows; every thread copies as much");
  const int row = threadIdx.x / chunks, chunk = threadIdx.x % chunks;
  bf16* const to = tile + chunkAt<W>(row, chunk);
  from += row * ld + chunk * 8;
#pragma unroll
  for (int step = 0; step < Rows / rowsPerStep; step++, from += rowsPerStep * ld) {
#pragma unroll
    for (int line = 0; line < W; line += chunks * 8) {
      const bool valid = step * rowsPerStep + row < rows && line + chunk * 8 < columns;
      copyAsync16(to + step * rowsPerStep * W + line, from + line, valid);
    }
  }
}

/// 16 x 16 elements from (o, k) on, as the left operand of multiplyBf16. The tile is [o][k], or [k][o] when Transposed.
template <int W, bool Transposed>
MOE_DEVICE void loadLeft(uint32_t (&r)[4], const bf16* tile, int o, int k) {
  const int lane = threadIdx.x % 32;
  if (Transposed) {
    loadMatrices4Transposed(r, tile + chunkAt<W>(k + lane / 16 * 8 + lane % 8, o / 8 + lane / 8 % 2));
  } else {
    loadMatrices4(r, tile + chunkAt<W>(o + lane % 16, k / 8 + lane / 16));
  }
}

/// The same as the right operand: r[0], r[1] for columns o .. o + 7, r[2], r[3] for the next eight.
template <int W, bool Transposed>
MOE_DEVICE void loadRight(uint32_t (&r)[4], const bf16* tile, int o, int k) {
  const int lane = threadIdx.x % 32;
  if (Transposed) {
    loadMatrices4Transposed(r, tile + chunkAt<W>(k + lane % 16, o / 8 + lane / 16));
  } else {
    loadMatrices4(r, tile + chunkAt<W>(o + lane / 16 * 8 + lane % 8, k / 8 + lane / 8 % 2));
  }
}
