// Attention on Hopper: how a warpgroup has the results of its products, for the softmax and the stores of flash.cuh, and tiles in shared memory.
#pragma once
#include "flash.cuh"
#include "hopper.cuh"

/// 64 rows to a warpgroup, scores of BN columns.
template <int BN_>
struct WarpgroupTile {
  static constexpr int BN = BN_, Rows = 2, Columns = BN / 4, RowLanes = 4, Run = 2;
  static constexpr float Unit = 1.4426950408889634f;
  MOE_DEVICE float exponential(float x) { return exp2Fast(x); }

  struct Scores {
    float v[BN / 2];
  };
  template <int D>
  struct Sums {
    float v[D / 2];
  };
  MOE_DEVICE float& at(Scores& s, int i, int j) { return s.v[j / 2 * 4 + i * 2 + j % 2]; }
  template <int D>
  MOE_DEVICE float& at(Sums<D>& s, int i, int j) { return s.v[j / 2 * 4 + i * 2 + j % 2]; }
  /// Of this thread's warpgroup.
  MOE_DEVICE int groupRow(int i) { return threadIdx.x % 128 / 32 * 16 + i * 8 + threadIdx.x % 32 / 4; }
  MOE_DEVICE int sumStep(int j) { return j / 2 * 8 + j % 2; }
  MOE_DEVICE int column(int j) { return threadIdx.x % 4 * 2 + sumStep(j); }
  template <int D>
  static constexpr int sumColumns = D / 4;
  template <int D>
  MOE_DEVICE int sumColumn(int j) { return column(j); }

  MOE_DEVICE void clear(Scores& s) {
#pragma unroll
    for (float& x : s.v) x = 0.f;
  }
  /// Scores, rounded, as left operands: register i % 4 of 16 columns i / 4.
  MOE_DEVICE void pack(uint32_t (&p)[BN / 16][4], const Scores& s) {
#pragma unroll
    for (int i = 0; i < BN / 4; i++) p[i / 4][i % 4] = packBf16(s.v[2 * i], s.v[2 * i + 1]);
  }
};

/// storeRow for a row that may not exist, by whole warps: lanes exchange columns, and half as many stores do.
template <class E, int D>
MOE_DEVICE void storeRowIf(bool exists, float* to, typename E::template Sums<D>& sums, int i, int features, float factor) {
  if (features % 4 != 0) {
    if (exists) storeRuns<E, D, false, false>(to + E::column(0), sums, i, features - E::column(0), factor);
    return;
  }
  const auto x = [&](int j) { return E::template at<D>(sums, i, j) * factor; };
  const int left = exists ? features - gatheredColumn() : 0;
#pragma unroll
  for (int j = 0; j < E::template sumColumns<D>; j += 4) {
    const float4 four = gatherFour(x(j), x(j + 1), x(j + 2), x(j + 3));
    storeWideIf(E::sumStep(j) < left, to + gatheredColumn() + E::sumStep(j), four.x, four.y, four.z, four.w);
  }
}

/// Of a tile of `rows` rows, of which 64 k at a time lie together, and which is an operand from its beginning on: from element (row, k) on. k runs along memory.
MOE_DEVICE uint64_t operandOf(uint64_t tile, int rows, int row, int k) { return tile + ((k / 64 * rows + row) * 8 + k % 64 / 8); }
/// Such a tile as a right operand whose k is its rows, and that from `row` and `column`, a multiple of 64, on.
MOE_DEVICE uint64_t operandAcrossTile(const unsigned char* tile, int rows) { return operandAcross(tile, rows * 128); }
MOE_DEVICE uint64_t operandAcrossOf(uint64_t tile, int rows, int row, int column) { return tile + (column / 64 * rows + row) * 8; }
