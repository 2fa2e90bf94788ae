// What becomes of a tile of logits x weight^T in cross-entropy: it is reduced to what is needed of it, or to its gradient.
// Legend: N rows of x, V rows of weight (here: a chunk of them, `first` .. `first` + V - 1 of all), D features.
#pragma once
#include "gemm.cuh"

/// Quicker where operands are rounded anyway.
template <class Tile>
MOE_DEVICE float exponential(float x) {
  return sizeof(typename Tile::Element) == 2 ? __expf(x) : expf(x);
}

/// Of logits in a row: the largest, and the sum of exponentials over it.
struct RowEntropy {
  float highest, total;
};
/// What is taken off logits before their exponentials: -inf - -inf would be no number.
MOE_DEVICE float exponentialBase(float highest) { return highest == -infinity() ? 0.f : highest; }

/// Row i of this warp's part of a tile whose columns begin at `column`, of V that exist; it is `row` of all. The logit of the tile's own column
/// `target`, where it is among them, goes to targetLogit[row].
template <class Tile>
MOE_DEVICE RowEntropy rowEntropy(typename Tile::Sums& logits, int i, int column, int V, int target, float* targetLogit, int row) {
  float highest = -infinity();
#pragma unroll
  for (int j = 0; j < Tile::Columns; j++) {
    const float logit = Tile::at(logits, i, j);
    if (column + Tile::column(j) >= V) continue;
    highest = maxOrNan(highest, logit);
    if (Tile::column(j) == target) targetLogit[row] = logit;
  }
  for (int step = Tile::RowLanes / 2; step > 0; step /= 2) highest = maxOrNan(highest, __shfl_xor_sync(wholeWarp, highest, step));
  const float base = exponentialBase(highest);
  float total = 0.f;
#pragma unroll
  for (int j = 0; j < Tile::Columns; j++) {
    if (column + Tile::column(j) < V) total += exponential<Tile>(Tile::at(logits, i, j) - base);
  }
  for (int step = Tile::RowLanes / 2; step > 0; step /= 2) total += __shfl_xor_sync(wholeWarp, total, step);
  return {highest, total};
}

/// The tile from (row, column) on of dlogits [N, ld], with zeros from V to ld: (softmax - onehot(target)) dloss, zeros where the target does
/// not count.
template <class Tile>
MOE_DEVICE void storeLogitsGradient(typename Tile::Element* dlogits, typename Tile::Sums& logits, int row, int column, const int* targets, const float* lse, const float* dloss, int N, int V, int ld, int first, int classes, int ignoreIndex) {
#pragma unroll
  for (int i = 0; i < Tile::Rows; i++) {
    const int r = row + Tile::row(i);
    if (r >= N) continue;
    const int target = targets[r];
    const bool counts = target >= 0 && target < classes && target != ignoreIndex;
    const float rowLse = lse[r], factor = dloss[r];
    typename Tile::Element* const to = dlogits + (int64_t)r * ld;
#pragma unroll
    for (int j = 0; j < Tile::Columns; j += 2) {
      const int c = column + Tile::column(j);
      float d[2];
#pragma unroll
      for (int n = 0; n < 2; n++) {
        const float p = exponential<Tile>(Tile::at(logits, i, j + n) - rowLse);
        d[n] = counts && c + n < V ? (p - (first + c + n == target ? 1.f : 0.f)) * factor : 0.f;
      }
      if (c >= ld) continue;
      if constexpr (sizeof(typename Tile::Element) == 2) {
        *(uint32_t*)(to + c) = packBf16(d[0], d[1]);
      } else {
        to[c] = d[0];
        if (c + 1 < ld) to[c + 1] = d[1];
      }
    }
  }
}
