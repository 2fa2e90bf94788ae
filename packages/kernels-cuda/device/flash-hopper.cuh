// Attention on Hopper: the accumulator layout of wgmma as an engine for the softmax and the stores of flash.cuh, and
// the layout of tiles in shared memory.
#pragma once
#include "flash.cuh"
#include "hopper.cuh"

/// Layout of a warpgroup's tile: 64 rows, scores with BN columns. A row is shared by a quad (4 lanes).
template <int BN_>
struct WarpgroupTile {
  static constexpr int BN = BN_, Rows = 2, Columns = BN / 4, RowLanes = 4, Run = 2;
  static constexpr float Unit = 1.4426950408889634f;
  MOE_DEVICE float exponential(float x) { return exp2Fast(x); }

  struct Scores {
    float v[BN / 2];
  };
  template <int D>
  struct Accumulator {
    float v[D / 2];
  };
  MOE_DEVICE float& at(Scores& s, int i, int j) { return s.v[j / 2 * 4 + i * 2 + j % 2]; }
  template <int D>
  MOE_DEVICE float& at(Accumulator<D>& s, int i, int j) { return s.v[j / 2 * 4 + i * 2 + j % 2]; }
  /// Row within the tile of this thread's warpgroup.
  MOE_DEVICE int groupRow(int i) { return threadIdx.x % 128 / 32 * 16 + i * 8 + threadIdx.x % 32 / 4; }
  MOE_DEVICE int columnStep(int j) { return j / 2 * 8 + j % 2; }
  MOE_DEVICE int column(int j) { return threadIdx.x % 4 * 2 + columnStep(j); }
  template <int D>
  static constexpr int outputColumns = D / 4;
  template <int D>
  MOE_DEVICE int outputColumn(int j) { return column(j); }

  MOE_DEVICE void clear(Scores& s) {
#pragma unroll
    for (float& x : s.v) x = 0.f;
  }
  /// Converts scores to bf16 A fragments (registers) of the next wgmma. The accumulator layout of two neighbouring
  /// 8-column blocks is the A layout: p[i / 4][i % 4] covers columns i / 4 * 16 .. + 15.
  MOE_DEVICE void pack(uint32_t (&p)[BN / 16][4], const Scores& s) {
#pragma unroll
    for (int i = 0; i < BN / 4; i++) p[i / 4][i % 4] = packBf16(s.v[2 * i], s.v[2 * i + 1]);
  }
};

/// storeRow for a row that may not exist. Called by whole warps: lanes exchange columns, so that half as many stores
/// are needed.
template <class E, int D>
MOE_DEVICE void storeRowIf(bool exists, float* to, typename E::template Accumulator<D>& sums, int i, int features, float factor) {
  if (features % 4 != 0) {
    if (exists) storeRuns<E, D, false, false>(to + E::column(0), sums, i, features - E::column(0), factor);
    return;
  }
  const auto x = [&](int j) { return E::template at<D>(sums, i, j) * factor; };
  const int left = exists ? features - gatheredColumn() : 0;
#pragma unroll
  for (int j = 0; j < E::template outputColumns<D>; j += 4) {
    const float4 four = gatherFour(x(j), x(j + 1), x(j + 2), x(j + 3));
    storeWideIf(E::columnStep(j) < left, to + gatheredColumn() + E::columnStep(j), four.x, four.y, four.z, four.w);
  }
}

/// The descriptor of a tile of `rows` rows in shared memory, stored as boxes of 64 columns (128 bytes) one after the
/// other, advanced to element (row, k). K-major: k is contiguous.
MOE_DEVICE uint64_t kMajorAt(uint64_t tile, int rows, int row, int k) { return tile + ((k / 64 * rows + row) * 8 + k % 64 / 8); }
/// Descriptor of such a tile as an MN-major B operand, whose k are the tile's rows, and the same advanced to (row,
/// column); column is a multiple of 64.
MOE_DEVICE uint64_t mnMajorTileDescriptor(const unsigned char* tile, int rows) { return mnMajorDescriptor(tile, rows * 128); }
MOE_DEVICE uint64_t mnMajorAt(uint64_t tile, int rows, int row, int column) { return tile + (column / 64 * rows + row) * 8; }
