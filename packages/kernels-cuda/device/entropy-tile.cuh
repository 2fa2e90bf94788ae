// What becomes of a tile of logits x weight^T in cross-entropy: it is reduced to what is needed of it, or to its gradient.
// Legend: N rows of x, V rows of weight (here: a chunk of them, `first` .. `first` + V - 1 of all), D features.
#pragma once
#include "four.cuh"
#include "rounded-tile.cuh"

/// e^(x - base), quicker where operands are rounded anyway.
template <class Tile>
MOE_DEVICE float exponential(float x, float base) {
  return sizeof(typename Tile::Element) == 2 ? expFast(x, base) : expf(x - base);
}

/// Of logits in a row: the largest, and the sum of exponentials over it.
struct RowEntropy {
  float highest, total;
};
/// What is taken off logits before their exponentials: -inf - -inf would be no number.
MOE_DEVICE float exponentialBase(float highest) { return highest == -infinity() ? 0.f : highest; }

/// Row i of this warp's part of a tile, of whose columns those count for which exists(j), j as in column(j). The logit of the tile's own column `target`, which exists or
/// lies outside of the tile, goes to *targetLogit where this thread has it.
template <class Tile, class Exists>
MOE_DEVICE RowEntropy rowEntropy(typename Tile::Sums& logits, int i, Exists exists, int target, float* targetLogit) {
  const int own = target - Tile::column(0);
  float highest = -infinity();
#pragma unroll
  for (int j = 0; j < Tile::Columns; j++) {
    if (exists(j)) highest = maxOrNan(highest, Tile::at(logits, i, j));
  }
  if (target >= 0 && target < Tile::BN) {
#pragma unroll
    for (int j = 0; j < Tile::Columns; j++) {
      if (Tile::step(j) == own) *targetLogit = Tile::at(logits, i, j);
    }
  }
  for (int step = Tile::RowLanes / 2; step > 0; step /= 2) highest = maxOrNan(highest, __shfl_xor_sync(wholeWarp, highest, step));
  const float base = exponentialBase(highest);
  float total = 0.f;
#pragma unroll
  for (int j = 0; j < Tile::Columns; j++) {
    const float x = exponential<Tile>(Tile::at(logits, i, j), base);
    total += exists(j) ? x : 0.f;
  }
  for (int step = Tile::RowLanes / 2; step > 0; step /= 2) total += __shfl_xor_sync(wholeWarp, total, step);
  return {highest, total};
}

/// What a gradient takes of the loss: `classes` classes, of which the tile's chunk begins with `first`.
struct LossRows {
  const int* targets;
  const float *lse, *dloss;
  int first, classes, ignoreIndex;
};

/// storeLogitsGradient of a tile of which all columns exist if Whole.
template <class Tile, bool Whole>
MOE_DEVICE void storeGradientTile(typename Tile::Element* dlogits, typename Tile::Sums& logits, int row, int column, const LossRows& loss, int N, int V, int ld) {
#pragma unroll
  for (int i = 0; i < Tile::Rows; i++) {
    const int r = row + Tile::row(i);
    const bool exists = r < N;
    const int target = exists ? loss.targets[r] : loss.ignoreIndex;
    const bool counts = target >= 0 && target < loss.classes && target != loss.ignoreIndex;
    const float rowLse = exists ? loss.lse[r] : 0.f, factor = exists ? loss.dloss[r] : 0.f;
    // From here on columns are counted from this thread's first.
    const int begin = column + Tile::column(0), own = target - loss.first - begin, classesLeft = V - begin;
    const auto gradient = [&](int j) {
      float p = exponential<Tile>(Tile::at(logits, i, j), rowLse);
      if (Tile::step(j) == own) p -= 1.f;
      p *= factor;
      return counts && (Whole || Tile::step(j) < classesLeft) ? p : 0.f;
    };
    if constexpr (sizeof(typename Tile::Element) == 2) {
      const int from = column + firstPairedColumn<Tile>();
      typename Tile::Element* const to = dlogits + (int64_t)r * ld + from;
#pragma unroll
      for (int j = 0; j < Tile::Columns; j += 4) {
        uint32_t a = packBf16(gradient(j), gradient(j + 1)), b = packBf16(gradient(j + 2), gradient(j + 3));
        pairColumns(a, b);
        if (exists && (Whole || Tile::step(j) < ld - from)) storeWide(to + Tile::step(j), a, b);
      }
    } else {
      static_assert(Tile::Run == 4, "rows of memory are a multiple of 4");
      typename Tile::Element* const to = dlogits + (int64_t)r * ld + begin;
#pragma unroll
      for (int j = 0; j < Tile::Columns; j += 4) {
        if (exists && (Whole || Tile::step(j) < ld - begin)) storeWide(to + Tile::step(j), gradient(j), gradient(j + 1), gradient(j + 2), gradient(j + 3));
      }
    }
  }
}

/// The tile from (row, column) on of dlogits [N, ld], with zeros from V to ld: (softmax - onehot(target)) dloss, zeros where the target does
/// not count.
template <class Tile>
MOE_DEVICE void storeLogitsGradient(typename Tile::Element* dlogits, typename Tile::Sums& logits, int row, int column, const LossRows& loss, int N, int V, int ld) {
  if (V - column >= Tile::BN) storeGradientTile<Tile, true>(dlogits, logits, row, column, loss, N, V, ld);
  else storeGradientTile<Tile, false>(dlogits, logits, row, column, loss, N, V, ld);
}
