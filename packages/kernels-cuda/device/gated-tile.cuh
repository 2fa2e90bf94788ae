// The SwiGLU epilogue of a tile in which one half of the columns belongs to gate and the other to up, for the same
// inner features.
#pragma once
#include "rounded-tile.cuh"

/// Writes inner [.., ld] = silu(gate) * up, with zeros from I to ld within the tile, and, unless gate is null, gate and
/// up [.., I] themselves, all rounded to bf16. The tile starts at (row, column), and `rows` of its rows exist.
/// Overwrites the accumulators.
template <class Tile>
MOE_DEVICE void storeGated(bf16* inner, bf16* gate, bf16* up, int64_t row, int column, int rows, int I, int ld, typename Tile::Accumulator& sums) {
  constexpr int Half = Tile::Columns / 2;
  if (gate != nullptr) {
    storeRounded<Tile, 0, Half>(gate + row * I + column, I, rows, I - column, sums);
    storeRounded<Tile, Half, Half>(up + row * I + column, I, rows, I - column, sums);
  }
#pragma unroll
  for (int i = 0; i < Tile::Rows; i++) {
#pragma unroll
    for (int j = 0; j < Half; j++) {
      const float g = Tile::at(sums, i, j);
      Tile::at(sums, i, j) = g * sigmoidFast(g) * Tile::at(sums, i, j + Half);
    }
  }
  storeRounded<Tile, 0, Half>(inner + row * ld + column, ld, rows, ld - column, sums);
}
