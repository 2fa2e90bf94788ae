// Operands of products in precision 'fp8' on devices without fp8 kernels: quantizes to f8e4m3 and stores the same
// values in bf16, which represents them exactly, in the original layout. Operands for Hopper's fp8 products are in
// fp8-matmul-sm90a.cu. "Along" and "across" as in fp8.cuh.
#include "fp8.cuh"

// [rows, k] to rows of ld; blockIdx.y is the tile of k.
MOE_KERNEL((256), moe_fp8_operand_along_bf16, (bf16* to, const float* from, int rows, int k, int ld)) {
  const int row = blockIdx.x * 8 + threadIdx.x / 32, first = blockIdx.y * fp8Tile, lane = threadIdx.x % 32;
  if (row >= rows) return;
  const Four x = load4<false>(from + (int64_t)row * k + first, lane * 4, k - first);
  writeAlong(Fp8InBf16{to, ld}, row, first + lane * 4, x, scaleAlong(x));
}
// [rows, columns] to rows of ld, in `runs` runs.
MOE_KERNEL((256), moe_fp8_operand_across_bf16, (bf16* to, const float* from, const int* offsets, int rows, int columns, int ld, int runs)) {
  const RunTile tile = runTile(offsets, rows, columns, runs);
  roundAcross<1>(
      tile.left, columns,
      [&](int row, int column, bool exists, float* x) { *x = exists ? from[(int64_t)(tile.row + row) * columns + column] : 0.f; },
      [&](int, int column, int first, const float* x, Fp8Scale scale) { writeAcross(Fp8InBf16{to, ld}, tile, offsets, columns, column, first, x, scale); });
}
