// Maps tile numbers to rows of experts. The offsets are read on the device, so the host never needs them.
#pragma once
#include "moe.cuh"

/// Rows row .. end - 1 of a tile belong to `expert`. expert = E stands for the rows after the last expert's, -1 for a
/// tile without work.
struct ExpertTile {
  int expert, row, end;
};

/// Tile number `tile`, with BM rows, if every expert's rows, and those after the last expert's, start a new tile. Each
/// warp computes a prefix sum of the experts' tile counts. All threads of a block get the same result.
template <int BM>
MOE_DEVICE ExpertTile expertTile(const int* offsets, int experts, int rows, int tile) {
  const int lane = threadIdx.x % 32;
  for (int first = 0; first <= experts; first += 32) {
    const int e = first + lane;
    const int from = e <= experts ? offsets[e] : rows;
    const int to = e < experts ? offsets[e + 1] : rows;
    const int own = divUp(to - from, BM);
    int end = own; // inclusive prefix sum: tiles of experts first .. e
    for (int step = 1; step < 32; step *= 2) {
      const int before = __shfl_up_sync(wholeWarp, end, step);
      if (lane >= step) end += before;
    }
    const unsigned later = __ballot_sync(wholeWarp, tile < end);
    if (later != 0) {
      const int found = __ffs(later) - 1;
      const int row = __shfl_sync(wholeWarp, from + (tile - (end - own)) * BM, found);
      return {first + found, row, __shfl_sync(wholeWarp, to, found)};
    }
    tile -= __shfl_sync(wholeWarp, end, 31);
  }
  return {-1, 0, 0};
}
