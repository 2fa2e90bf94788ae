// Tiles of 128 numbers along k in f8e4m3, with a power of two as scale (core's Precision). k of an operand runs along rows of memory, or across them: in runs of as
// many rows, or in those of experts.
#pragma once
#include "expert-tile.cuh"
#include "four.cuh"

constexpr int fp8Tile = 128;

/// Of a tile: its numbers are codes * up, codes are numbers * down.
struct Fp8Scale {
  float up, down;
};
/// From the largest magnitude as bits, which are in the order of the numbers, NaN and infinity above all others: 2^e with the least e >= -100 for which it is at most
/// 448 = 1.75 * 2^8 times as much.
MOE_DEVICE Fp8Scale fp8Scale(uint32_t largest) {
  const int e = max((int)((largest + 0x1fffffu) >> 23) - 135, -100);
  return {asFloat(largest >= 0x7f800000u ? 0x7fc00000u : (uint32_t)(e + 127) << 23), asFloat((uint32_t)(127 - e) << 23)};
}
MOE_DEVICE uint32_t magnitude(float x) { return asBits(x) & 0x7fffffffu; }

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
