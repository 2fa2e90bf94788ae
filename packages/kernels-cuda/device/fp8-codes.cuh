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
  uint32_t codes = 0;
#pragma unroll
  for (int i = 0; i < 4; i++) codes |= (uint32_t)toF8e4m3(x[i] * scale.down).bits << 8 * i;
  return codes;
}
/// Writes four codes of a row of an operand with one matrix.
MOE_DEVICE void writeAlong(const Fp8Codes& to, int64_t row, int at, const Four& x, Fp8Scale scale) {
  if (at < to.ld) *(uint32_t*)(to.data + row * to.ld + at) = codesOf(x.v, scale);
  if (threadIdx.x % 32 == 0) to.scales[(int64_t)(at / fp8Tile) * to.ldScales + row] = scale.up;
}
/// Writes a column of 32 rows, transposed, to the matrix [columns][ld] of its run. The rows of all experts form one
/// matrix, in which each expert's rows start at packedStart. Called by whole warps.
MOE_DEVICE void writeAcross(const Fp8Codes& to, const RunTile& tile, const int* offsets, int columns, int column, int first, const float* x, Fp8Scale scale) {
  if (tile.left <= 0) return;
  const bool packed = offsets != nullptr;
  const int begin = (packed ? packedStart<fp8Tile>(offsets, tile.run) : 0) + tile.tile * fp8Tile;
  static_assert(rowsOfThread == 32, "two pieces of 16 bytes");
  const auto sixteen = [&](int i) { return make_uint4(codesOf(x + i, scale), codesOf(x + i + 4, scale), codesOf(x + i + 8, scale), codesOf(x + i + 12, scale)); };
  // A 16-byte piece is half a sector. Pairs of lanes exchange pieces, so that together they store both pieces of one
  // column, then both of the other.
  const int half = threadIdx.x % 2;
  uint4 pieces[2] = {sixteen(0), sixteen(16)};
  const auto swap = [&](uint32_t& a, uint32_t& b) {
    const uint32_t other = __shfl_xor_sync(wholeWarp, half == 0 ? b : a, 1);
    if (half == 0) b = other;
    else a = other;
  };
  swap(pieces[0].x, pieces[1].x);
  swap(pieces[0].y, pieces[1].y);
  swap(pieces[0].z, pieces[1].z);
  swap(pieces[0].w, pieces[1].w);
  const int at = begin + first + half * 16;
  const int64_t firstColumn = (int64_t)(packed ? 0 : tile.run) * columns;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int own = column - half + i;
    if (own < columns && at < to.ld) *(uint4*)(to.data + (firstColumn + own) * to.ld + at) = pieces[i];
  }
  const int64_t scaleRow = packed ? begin / fp8Tile : tileOfRows(columns);
  if (column < columns && first == 0) to.scales[scaleRow * to.ldScales + column] = scale.up;
}
