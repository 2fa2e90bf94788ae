// Swizzled tiles of bf16 in shared memory, and the fragments that mma takes from them.
// Legend: o = the outer index of an operand (m of A, n of B), k = the index that is summed over.
#pragma once
#include "tensor-core.cuh"

/// The offset of chunk `chunk` (8 elements, 16 bytes) of row `row` in a tile with rows of W elements. The XOR swizzle
/// puts the same chunk of eight neighbouring rows in different banks. It repeats after eight rows, so eight rows
/// further is 8 W elements further.
template <int W>
MOE_DEVICE int swizzledOffset(int row, int chunk) {
  static_assert(W == 32 || W % 64 == 0, "rows of 64 bytes, or of whole lines of 128");
  return row * W + (chunk ^ (W == 32 ? row >> 1 & 3 : row & 7)) * 8;
}

/// Starts the copy of a tile of Rows x W elements from a matrix with row stride `ld`; elements at or past (rows,
/// columns) are zeros. `from` and `ld` are multiples of a chunk, and rows in memory are padded to one: a chunk is
/// copied as a whole if it starts before `columns`.
template <int Rows, int W, int Threads>
MOE_DEVICE void copyTile(bf16* tile, const bf16* from, int64_t ld, int rows, int columns) {
  // Neighbouring threads copy a 128-byte line at a time (or half of one, or several if there are few rows). This way
  // each thread needs only one address and one stride.
  constexpr int chunks = W == 32 ? 4 : Threads > Rows * 8 ? Threads / Rows : 8, rowsPerStep = Threads / chunks;
  static_assert(rowsPerStep % 8 == 0 && Rows % rowsPerStep == 0, "swizzledOffset repeats after eight rows; every thread copies as much");
  const int row = threadIdx.x / chunks, chunk = threadIdx.x % chunks;
  bf16* const to = tile + swizzledOffset<W>(row, chunk);
  from += row * ld + chunk * 8;
#pragma unroll
  for (int step = 0; step < Rows / rowsPerStep; step++, from += rowsPerStep * ld) {
#pragma unroll
    for (int line = 0; line < W; line += chunks * 8) {
      const bool valid = step * rowsPerStep + row < rows && line + chunk * 8 < columns;
      cpAsync16(to + step * rowsPerStep * W + line, from + line, valid);
    }
  }
}

/// Loads the A fragment (16 x 16) at (o, k). The tile is [o][k], or [k][o] if Transposed.
template <int W, bool Transposed>
MOE_DEVICE void loadA(uint32_t (&r)[4], const bf16* tile, int o, int k) {
  const int lane = threadIdx.x % 32;
  if (Transposed) {
    ldmatrix4Transposed(r, tile + swizzledOffset<W>(k + lane / 16 * 8 + lane % 8, o / 8 + lane / 8 % 2));
  } else {
    ldmatrix4(r, tile + swizzledOffset<W>(o + lane % 16, k / 8 + lane / 16));
  }
}

/// Loads two B fragments: r[0], r[1] for columns o .. o + 7, r[2], r[3] for the next eight.
template <int W, bool Transposed>
MOE_DEVICE void loadB(uint32_t (&r)[4], const bf16* tile, int o, int k) {
  const int lane = threadIdx.x % 32;
  if (Transposed) {
    ldmatrix4Transposed(r, tile + swizzledOffset<W>(k + lane % 16, o / 8 + lane / 16));
  } else {
    ldmatrix4(r, tile + swizzledOffset<W>(o + lane / 16 * 8 + lane % 8, k / 8 + lane / 8 % 2));
  }
}
