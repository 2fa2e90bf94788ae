// Operands of products in precision 'fp8' in bf16, which has all their numbers; they lie as before. Codes, for Hopper, are in fp8-matmul-sm90a.cu.
#include "fp8.cuh"

MOE_DEVICE float inFp8(float x, Fp8Scale scale) { return toFloat(toF8e4m3(x * scale.down)) * scale.up; }

// [rows, k] to rows of ld; blockIdx.y is the tile of k.
MOE_KERNEL((256), moe_fp8_operand_along_bf16, (bf16* to, const float* from, int rows, int k, int ld)) {
  const int row = blockIdx.x * 8 + threadIdx.x / 32, first = blockIdx.y * fp8Tile, at = first + threadIdx.x % 32 * 4;
  if (row >= rows) return;
  roundAlong(from + (int64_t)row * k + first, k - first, [&](const Four& x, Fp8Scale scale) {
    const uint2 pairs = make_uint2(packBf16(inFp8(x.v[0], scale), inFp8(x.v[1], scale)), packBf16(inFp8(x.v[2], scale), inFp8(x.v[3], scale)));
    if (at < ld) *(uint2*)(to + (int64_t)row * ld + at) = pairs;
  });
}
// [rows, columns] to rows of ld, in `runs` runs; blockIdx.y is the tile of rows.
MOE_KERNEL((256), moe_fp8_operand_across_bf16, (bf16* to, const float* from, const int* offsets, int rows, int columns, int ld, int runs)) {
  const RunTile tile = runTile(offsets, rows, runs);
  roundAcross(from + (int64_t)tile.row * columns, tile.left, columns, [&](int column, int first, const float* x, Fp8Scale scale) {
    if (column >= ld) return;
#pragma unroll
    for (int i = 0; i < rowsOfThread; i++) {
      if (first + i < tile.left) to[(int64_t)(tile.row + first + i) * ld + column] = toBf16(inFp8(x[i], scale));
    }
  });
}
