// What becomes of a tile of logits x weight^T in cross-entropy: it is reduced to what is needed of it, or to its gradient.
// Legend: N rows of x, V rows of weight (here: a chunk of them, `first` .. `first` + V - 1 of all), D features.
#pragma once
#include "rounded-tile.cuh"

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
    const bool exists = r < N;
    const int target = exists ? targets[r] : ignoreIndex;
    const bool counts = target >= 0 && target < classes && target != ignoreIndex;
    const float rowLse = exists ? lse[r] : 0.f, factor = exists ? dloss[r] : 0.f;
    // From here on columns are the tile's.
    const int own = target - first - column, classesEnd = counts ? V - column : 0, end = exists ? ld - column : 0;
    typename Tile::Element* const to = dlogits + (int64_t)r * ld + column;
    const auto gradient = [&](int j) {
      const int c = Tile::column(j);
      const float p = exponential<Tile>(Tile::at(logits, i, j) - rowLse);
      return c < classesEnd ? (p - (c == own ? 1.f : 0.f)) * factor : 0.f;
    };
    if constexpr (sizeof(typename Tile::Element) == 2) {
#pragma unroll
      for (int j = 0; j < Tile::Columns; j += 4) {
        uint32_t a = packBf16(gradient(j), gradient(j + 1)), b = packBf16(gradient(j + 2), gradient(j + 3));
        pairColumns(a, b);
        const int c = pairedColumn<Tile>(j);
        if (c < end) storeWide(to + c, a, b);
      }
    } else {
      static_assert(Tile::Run == 4, "rows of memory are a multiple of 4");
#pragma unroll
      for (int j = 0; j < Tile::Columns; j += 4) {
        const int c = Tile::column(j);
        if (c < end) storeWide(to + c, gradient(j), gradient(j + 1), gradient(j + 2), gradient(j + 3));
      }
    }
  }
}
