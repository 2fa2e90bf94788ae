// Operands of products in precision 'fp8', of which k runs along rows of memory, or across them: in runs of as many rows, or in those of experts. Written are either the
// rounded numbers in bf16, lying as before, or codes with k along memory and scales [matrix][tile of k][outer index], as Hopper's products take them.
#include "expert-tile.cuh"
#include "four.cuh"
#include "fp8.cuh"
#include "packed-rows.cuh"

/// A warp has 128 neighbours of a row, of which `left` exist, four a lane: `write(four, scale)`.
template <class Write>
MOE_DEVICE void roundAlong(const float* from, int left, Write write) {
  const Four x = load4<false>(from, (int)threadIdx.x % 32 * 4, left);
  uint32_t largest = 0;
  for (int i = 0; i < 4; i++) largest = max(largest, magnitude(x.v[i]));
  for (int step = 16; step > 0; step >>= 1) largest = max(largest, __shfl_xor_sync(wholeWarp, largest, step));
  write(x, fp8Scale(largest));
}

/// A block of 256 has a tile of 128 rows, of which `left` exist, and 64 columns; each thread 32 rows of a column: `write(column, first row, numbers, scale)`.
constexpr int stripe = 64, rowsOfThread = 32;
template <class Write>
MOE_DEVICE void roundAcross(const float* from, int left, int columns, Write write) {
  MOE_SHARED(uint32_t, found, [fp8Tile / rowsOfThread][stripe]);
  const int own = threadIdx.x % stripe, column = blockIdx.x * stripe + own, first = threadIdx.x / stripe * rowsOfThread;
  float x[rowsOfThread];
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < rowsOfThread; i++) {
    x[i] = column < columns && first + i < left ? from[(int64_t)(first + i) * columns + column] : 0.f;
    largest = max(largest, magnitude(x[i]));
  }
  found[threadIdx.x / stripe][own] = largest;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < fp8Tile / rowsOfThread; i++) largest = max(largest, found[i][own]);
  write(column, first, x, fp8Scale(largest));
}

/// The tile of rows that this block has: of which run, from where on, how many rows of the run are left; expert by expert when there are offsets.
struct RunTile {
  int run, tile, row, left;
};
MOE_DEVICE RunTile runTile(const int* offsets, int rows, int runs) {
  if (offsets == nullptr) {
    const int size = rows / runs, tiles = divUp(size, fp8Tile), run = blockIdx.y / tiles, tile = blockIdx.y % tiles;
    return {run, tile, run * size + tile * fp8Tile, size - tile * fp8Tile};
  }
  const ExpertTile found = expertTile<fp8Tile>(offsets, runs, rows, blockIdx.y);
  // Rows behind the last expert's are nobody's.
  const bool none = found.expert < 0 || found.expert == runs;
  return {found.expert, none ? 0 : (found.row - offsets[found.expert]) / fp8Tile, found.row, none ? 0 : found.end - found.row};
}

MOE_DEVICE float inFp8(float x, Fp8Scale scale) { return toFloat(toF8e4m3(x * scale.down)) * scale.up; }
MOE_DEVICE uint32_t codesOf(const float* x, Fp8Scale scale) {
  uint32_t codes = 0;
#pragma unroll
  for (int i = 0; i < 4; i++) codes |= (uint32_t)toF8e4m3(x[i] * scale.down).bits << 8 * i;
  return codes;
}

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

// [rows, k] to codes [rows][ld], and to scales of matrices of `outer` rows; blockIdx.y is the tile of k.
MOE_KERNEL((256), moe_fp8_operand_along_codes, (uint8_t* codes, float* scales, const float* from, int rows, int k, int outer, int ld, int ldScales)) {
  const int row = blockIdx.x * 8 + threadIdx.x / 32, first = blockIdx.y * fp8Tile, at = first + threadIdx.x % 32 * 4;
  if (row >= rows) return;
  roundAlong(from + (int64_t)row * k + first, k - first, [&](const Four& x, Fp8Scale scale) {
    if (at < ld) *(uint32_t*)(codes + (int64_t)row * ld + at) = codesOf(x.v, scale);
    if (threadIdx.x % 32 == 0) scales[((int64_t)(row / outer) * gridDim.y + blockIdx.y) * ldScales + row % outer] = scale.up;
  });
}
// [rows, columns] in `runs` runs to codes [run][column][ld] and scales [run][tile][ldScales]. Rows of experts become one run, in which each expert's
// begin at packedStart. blockIdx.y is the tile of rows.
MOE_KERNEL((256), moe_fp8_operand_across_codes,
           (uint8_t* codes, float* scales, const float* from, const int* offsets, int rows, int columns, int ld, int ldScales, int runs)) {
  const RunTile tile = runTile(offsets, rows, runs);
  const bool packed = offsets != nullptr;
  const int begin = (packed ? packedStart<fp8Tile>(offsets, max(tile.run, 0)) : 0) + tile.tile * fp8Tile;
  const int64_t scaleRow = packed ? begin / fp8Tile : blockIdx.y;
  roundAcross(from + (int64_t)tile.row * columns, tile.left, columns, [&](int column, int first, const float* x, Fp8Scale scale) {
    if (column >= columns || tile.left <= 0) return;
    uint8_t* const to = codes + ((int64_t)(packed ? 0 : tile.run) * columns + column) * ld + begin + first;
#pragma unroll
    for (int i = 0; i < rowsOfThread; i += 16) {
      const uint4 sixteen = make_uint4(codesOf(x + i, scale), codesOf(x + i + 4, scale), codesOf(x + i + 8, scale), codesOf(x + i + 12, scale));
      if (begin + first + i < ld) *(uint4*)(to + i) = sixteen;
    }
    if (first == 0) scales[scaleRow * ldScales + column] = scale.up;
  });
}
