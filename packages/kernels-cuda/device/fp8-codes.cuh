// Operands of wgmma in fp8: K-major f8e4m3 codes, with scales [matrix][tile of k][outer index].
#pragma once
#include "fp8.cuh"
#include "packed-rows.cuh"

/// Where to write an operand; data is null if it is not needed.
struct Fp8Codes {
  uint8_t* data;
  float* scales;
  int ld, ldScales;
};
MOE_DEVICE bool isWanted(const Fp8Codes& to) { return to.data != nullptr; }

MOE_DEVICE uint32_t codesOf(const float* x, Fp8Scale scale) {
  return packF8e4m3(x[0] * scale.down, x[1] * scale.down) | packF8e4m3(x[2] * scale.down, x[3] * scale.down) << 16;
}
/// Writes four codes of a row of an operand with one matrix.
MOE_DEVICE void writeAlong(const Fp8Codes& to, int64_t row, int at, const Four& x, Fp8Scale scale) {
  if (at < to.ld) *(uint32_t*)(to.data + row * to.ld + at) = codesOf(x.v, scale);
  if (threadIdx.x % 32 == 0) to.scales[(int64_t)(at / fp8Tile) * to.ldScales + row] = scale.up;
}
/// Writes a column of 16 rows, transposed, to the matrix [columns][ld] of its run. The rows of all experts form one
/// matrix, in which each expert's rows start at packedStart.
MOE_DEVICE void writeAcross(const Fp8Codes& to, const RunTile& tile, const int* offsets, int columns, int column, int first, const float* x, Fp8Scale scale) {
  if (tile.left <= 0 || column >= columns) return;
  const bool packed = offsets != nullptr;
  const int begin = (packed ? packedStart<fp8Tile>(offsets, tile.run) : 0) + tile.tile * fp8Tile, at = begin + first;
  const int64_t row = (int64_t)(packed ? 0 : tile.run) * columns + column;
  static_assert(rowsOfThread == 16, "a vector");
  if (at < to.ld) *(uint4*)(to.data + row * to.ld + at) = make_uint4(codesOf(x, scale), codesOf(x + 4, scale), codesOf(x + 8, scale), codesOf(x + 12, scale));
  const int64_t scaleRow = packed ? begin / fp8Tile : tileOfRows(columns);
  if (first == 0) to.scales[scaleRow * to.ldScales + column] = scale.up;
}
