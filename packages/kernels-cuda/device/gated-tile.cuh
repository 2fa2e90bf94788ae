// Tiles of which one half of the columns is gate's and the other up's, for the same inner features: what SwiGLU makes of them.
#pragma once
#include "rounded-tile.cuh"

/// inner [.., ld] = silu(gate) * up, with zeros from I to ld where the sums are, and gate and up [.., I] themselves unless gate is null, all rounded. The tile begins at
/// (row, column), `rows` of its rows exist. Its sums are no more afterwards.
template <class Tile>
MOE_DEVICE void storeGated(bf16* inner, bf16* gate, bf16* up, int64_t row, int column, int rows, int I, int ld, typename Tile::Sums& sums) {
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
