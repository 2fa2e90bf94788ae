// Epilogues of the product x weight^T in linear cross-entropy. A tile of logits is never stored: it is reduced to what
// the loss needs of it (forward), or turned into its gradient (backward).
// Legend: N rows of x, V rows of weight (here: one chunk of the vocabulary, rows `first` .. `first` + V - 1), D
// features.
#pragma once
#include "four.cuh"
#include "rounded-tile.cuh"

/// e^(x - base). Uses a fast approximation if the operands are bf16.
template <class Tile>
MOE_DEVICE float exponential(float x, float base) {
  return sizeof(typename Tile::Element) == 2 ? expFast(x, base) : expf(x - base);
}

/// Partial softmax statistics of a row: the maximum, and the sum of exp(logit - maximum).
struct RowEntropy {
  float highest, total;
};
/// What is subtracted from logits before the exponential. Avoids -inf - -inf, which would be NaN.
MOE_DEVICE float exponentialBase(float highest) { return highest == -infinity() ? 0.f : highest; }

/// Softmax statistics of row i of this warp's part of a tile, over the columns for which exists(j) is true (j as in
/// column(j)). `target` is the target's column within the tile; it exists or lies outside of the tile. The thread that
/// holds the target's logit writes it to *targetLogit.
template <class Tile, class Exists>
MOE_DEVICE RowEntropy rowEntropy(typename Tile::Accumulator& logits, int i, Exists exists, int target, float* targetLogit) {
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
  highest = joinLanes<MaxOrNan>(highest, Tile::RowLanes);
  const float base = exponentialBase(highest);
  float total = 0.f;
#pragma unroll
  for (int j = 0; j < Tile::Columns; j++) {
    const float x = exponential<Tile>(Tile::at(logits, i, j), base);
    total += exists(j) ? x : 0.f;
  }
  return {highest, joinLanes<Sum>(total, Tile::RowLanes)};
}

/// What the gradient needs of the loss. There are `classes` classes in total, and the chunk starts with class `first`.
struct LossRows {
  const int* targets;
  const float *lse, *dloss;
  int first, classes, ignoreIndex;
};

/// storeLogitsGradient for one tile. Whole: all of its columns exist, so no bounds are checked.
template <class Tile, bool Whole>
MOE_DEVICE void storeGradientTile(typename Tile::Element* dlogits, typename Tile::Accumulator& logits, int row, int column, const LossRows& loss, int N, int V, int ld) {
#pragma unroll
  for (int i = 0; i < Tile::Rows; i++) {
    const int r = row + Tile::row(i);
    const bool exists = r < N;
    const int target = exists ? loss.targets[r] : loss.ignoreIndex;
    const bool counts = target >= 0 && target < loss.classes && target != loss.ignoreIndex;
    const float rowLse = exists ? loss.lse[r] : 0.f, factor = exists ? loss.dloss[r] : 0.f;
    // From here on, columns are relative to this thread's first one.
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

/// Writes the tile at (row, column) of dlogits [N, ld], with zeros from column V to ld: (softmax - onehot(target))
/// dloss, or zeros in rows whose target is ignored.
template <class Tile>
MOE_DEVICE void storeLogitsGradient(typename Tile::Element* dlogits, typename Tile::Accumulator& logits, int row, int column, const LossRows& loss, int N, int V, int ld) {
  if (V - column >= Tile::BN) storeGradientTile<Tile, true>(dlogits, logits, row, column, loss, N, V, ld);
  else storeGradientTile<Tile, false>(dlogits, logits, row, column, loss, N, V, ld);
}
