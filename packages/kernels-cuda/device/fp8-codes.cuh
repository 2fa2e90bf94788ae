// Operands of Hopper's products in fp8: codes with k along memory, with scales [matrix][tile of k][outer index].
#pragma once
#include "fp8.cuh"
#include "packed-rows.cuh"

/// Null: not wanted.
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
/// To a row of the only matrix.
MOE_DEVICE void writeAlong(const Fp8Codes& to, int64_t row, int at, const Four& x, Fp8Scale scale) {
  if (at < to.ld) *(uint32_t*)(to.data + row * to.ld + at) = codesOf(x.v, scale);
  if (threadIdx.x % 32 == 0) to.scales[(int64_t)(at / fp8Tile) * to.ldScales + row] = scale.up;
}
/// To a column of a run's matrix [columns][ld]. Rows of experts are one matrix, in which each expert's begin at packedStart.
MOE_DEVICE void writeAcross(const Fp8Codes& to, const RunTile& tile, const int* offsets, int columns, int column, int first, const float* x, Fp8Scale scale) {
  if (column >= columns || tile.left <= 0) return;
  const bool packed = offsets != nullptr;
  const int begin = (packed ? packedStart<fp8Tile>(offsets, tile.run) : 0) + tile.tile * fp8Tile;
  uint8_t* const codes = to.data + ((int64_t)(packed ? 0 : tile.run) * columns + column) * to.ld + begin + first;
#pragma unroll
  for (int i = 0; i < rowsOfThread; i += 16) {
    const uint4 sixteen = make_uint4(codesOf(x + i, scale), codesOf(x + i + 4, scale), codesOf(x + i + 8, scale), codesOf(x + i + 12, scale));
    if (begin + first + i < to.ld) *(uint4*)(codes + i) = sixteen;
  }
  const int64_t scaleRow = packed ? begin / fp8Tile : blockIdx.y;
  if (first == 0) to.scales[scaleRow * to.ldScales + column] = scale.up;
}
