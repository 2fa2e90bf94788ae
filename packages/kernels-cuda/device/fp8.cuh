// Quantization of product operands to f8e4m3: one power of two as scale for each tile of 128 elements along k
// (Precision in @moe/core). "Along": k runs along rows in memory, and a tile is part of a row. "Across": k runs across
// rows, and a tile is 128 rows of one column, within runs of equal length or within the rows of an expert.
#pragma once
#include "expert-tile.cuh"
#include "four.cuh"

constexpr int fp8Tile = 128;

/// The scale of a tile and its inverse: values = codes * up, codes = values * down.
struct Fp8Scale {
  float up, down;
};
/// The scale for a tile with this largest magnitude, given as bits. Bit patterns of magnitudes order like the values,
/// with infinity and NaN above all others. up = 2^e with the least e >= -100 for which the magnitude is at most 448 *
/// 2^e, where 448 = 1.75 * 2^8.
MOE_DEVICE Fp8Scale fp8Scale(uint32_t largest) {
  const int e = max((int)((largest + 0x1fffffu) >> 23) - 135, -100);
  return {asFloat(largest >= 0x7f800000u ? 0x7fc00000u : (uint32_t)(e + 127) << 23), asFloat((uint32_t)(127 - e) << 23)};
}
MOE_DEVICE uint32_t magnitude(float x) { return asBits(x) & 0x7fffffffu; }

/// The scale of 128 neighbours of a row, four per lane. Called by whole warps.
MOE_DEVICE Fp8Scale scaleAlong(const Four& x) {
  uint32_t largest = 0;
  for (int i = 0; i < 4; i++) largest = max(largest, magnitude(x.v[i]));
  for (int step = 16; step > 0; step >>= 1) largest = max(largest, __shfl_xor_sync(wholeWarp, largest, step));
  return fp8Scale(largest);
}

/// Quantizes tiles across rows. A block of 256 threads processes 128 rows, of which `left` exist, and 32 columns, of
/// `Count` matrices at once; each thread has 16 rows of a column. Half a warp has the same 16 rows, and the other half
/// the next ones, so that a load is a sector per row and 32 codes of a column, stored by two lanes, are a sector, too.
/// `load(row, column, exists, x)` returns the values of all matrices, zeros where none exists. Then `write(matrix,
/// column, first row, values, scale)` is called. Blocks are numbered tile of rows by tile of rows (runTile), along x,
/// because a grid has at most 65,535 blocks along y.
constexpr int stripe = 32, rowsOfThread = 16;
MOE_DEVICE unsigned stripesOf(int columns) { return divUp(columns, stripe); }
template <int Count, class Load, class Write>
MOE_DEVICE void roundAcross(int left, int columns, Load load, Write write) {
  constexpr int groups = fp8Tile / rowsOfThread;
  MOE_SHARED(uint32_t, found, [Count][groups][stripe + 16]); // padded, so that the two halves of a warp use different banks
  const int own = threadIdx.x / 32 % 2 * 16 + threadIdx.x % 16, group = threadIdx.x / 64 * 2 + threadIdx.x % 32 / 16;
  const int column = blockIdx.x % stripesOf(columns) * stripe + own, first = group * rowsOfThread;
  float x[Count][rowsOfThread];
  uint32_t largest[Count] = {};
#pragma unroll
  for (int i = 0; i < rowsOfThread; i++) {
    float all[Count];
    load(first + i, column, column < columns && first + i < left, all);
#pragma unroll
    for (int m = 0; m < Count; m++) {
      x[m][i] = all[m];
      largest[m] = max(largest[m], magnitude(all[m]));
    }
  }
#pragma unroll
  for (int m = 0; m < Count; m++) found[m][group][own] = largest[m];
  __syncthreads();
#pragma unroll
  for (int m = 0; m < Count; m++) {
#pragma unroll
    for (int i = 0; i < groups; i++) largest[m] = max(largest[m], found[m][i][own]);
    write(m, column, first, x[m], fp8Scale(largest[m]));
  }
}

/// The tile of rows of this block, in a matrix with `columns` columns.
MOE_DEVICE int tileOfRows(int columns) { return blockIdx.x / stripesOf(columns); }
/// Its run, its number within the run, its first row, and how many rows of the run are left. With offsets, each
/// expert's rows are a run.
struct RunTile {
  int run, tile, row, left;
};
MOE_DEVICE RunTile runTile(const int* offsets, int rows, int columns, int runs) {
  const int index = tileOfRows(columns);
  if (offsets == nullptr) {
    const int size = rows / runs, tiles = divUp(size, fp8Tile), run = index / tiles, tile = index % tiles;
    return {run, tile, run * size + tile * fp8Tile, size - tile * fp8Tile};
  }
  const ExpertTile found = expertTile<fp8Tile>(offsets, runs, rows, index);
  // Rows after the last expert's belong to no run.
  const bool none = found.expert < 0 || found.expert == runs;
  return {found.expert, none ? 0 : (found.row - offsets[found.expert]) / fp8Tile, found.row, none ? 0 : found.end - found.row};
}

/// An operand as bf16 that holds the exact fp8 values, in its original layout; data is null if it is not needed.
struct Fp8InBf16 {
  bf16* data;
  int ld;
};
MOE_DEVICE bool isWanted(const Fp8InBf16& to) { return to.data != nullptr; }
/// Two values rounded to fp8, as a pair of bf16.
MOE_DEVICE uint32_t inFp8(float low, float high, Fp8Scale scale) {
  const float2 rounded = unpackF8e4m3(packF8e4m3(low * scale.down, high * scale.down));
  return packBf16(rounded.x * scale.up, rounded.y * scale.up);
}
MOE_DEVICE void writeAlong(const Fp8InBf16& to, int64_t row, int at, const Four& x, Fp8Scale scale) {
  const uint2 pairs = make_uint2(inFp8(x.v[0], x.v[1], scale), inFp8(x.v[2], x.v[3], scale));
  if (at < to.ld) *(uint2*)(to.data + row * to.ld + at) = pairs;
}
MOE_DEVICE void writeAcross(const Fp8InBf16& to, const RunTile& tile, const int*, int, int column, int first, const float* x, Fp8Scale scale) {
  if (column >= to.ld) return;
  bf16* const start = to.data + (int64_t)(tile.row + first) * to.ld + column;
#pragma unroll
  for (int i = 0; i < rowsOfThread; i += 2) {
    const uint32_t pair = inFp8(x[i], x[i + 1], scale);
    if (first + i < tile.left) start[(int64_t)i * to.ld] = bf16{(uint16_t)(pair & 0xffffu)};
    if (first + i + 1 < tile.left) start[(int64_t)(i + 1) * to.ld] = bf16{(uint16_t)(pair >> 16)};
  }
}
