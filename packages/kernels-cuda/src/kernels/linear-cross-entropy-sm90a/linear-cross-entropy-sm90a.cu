// Cross-entropy of the logits x weight^T on Hopper: the tiles of linear-cross-entropy.cu computed by the persistent
// GEMM of gemm-hopper.cuh. Legend as in entropy-tile.cuh.
#include "entropy-tile.cuh"
#include "gemm-hopper.cuh"

/// Computes all tiles of the chunk's logits and calls `reduce(logits, row, column)` for each. The grid has as many
/// blocks as run at once.
template <class Tile, class Reduce>
MOE_DEVICE void eachTile(const TensorMap& x, const TensorMap& weight, int N, int V, int D, Reduce reduce) {
  const int rowTiles = divUp(N, Tile::BM), columnTiles = divUp(V, Tile::BN);
  persistentGemm<Tile>(
      x, weight, rowTiles * columnTiles,
      [&](int j) -> WorkTile {
        const int2 tile = rasterize(j, rowTiles, columnTiles);
        const int row = tile.x * Tile::BM;
        return {row, 0, tile.y * Tile::BN, 0, 0, divUp(D, Tile::BK), N - row};
      },
      [&](int, const WorkTile& work, typename Tile::Accumulator& logits) { reduce(logits, work.rowA, work.rowB); });
}

/// highest and total are [N, tilesTotal]; this chunk's tiles start with firstTile. A row of a tile belongs to one warp.
template <class Tile>
MOE_DEVICE void entropy(float* highest, float* total, float* targetLogit, const TensorMap& x, const TensorMap& weight, const int* targets, int N, int V, int D, int first, int firstTile, int tilesTotal) {
  eachTile<Tile>(x, weight, N, V, D, [&](typename Tile::Accumulator& logits, int row, int column) {
    const auto reduce = [&](auto whole) {
#pragma unroll
      for (int i = 0; i < Tile::Rows; i++) {
        const int r = row + Tile::row(i);
        const int target = r < N && targets[r] - first < V ? targets[r] - first - column : -1;
        // With columns relative to this thread's first one, nothing is spilled.
        const auto exists = [&](int j) { return whole.value || Tile::step(j) < V - column - Tile::column(0); };
        const RowEntropy found = rowEntropy<Tile>(logits, i, exists, target, targetLogit + r);
        if (r >= N || threadIdx.x % Tile::RowLanes != 0) continue;
        const int64_t to = (int64_t)r * tilesTotal + firstTile + column / Tile::BN;
        highest[to] = found.highest;
        total[to] = found.total;
      }
    };
    if (V - column >= Tile::BN) reduce(Always<true>{});
    else reduce(Always<false>{});
  });
}

template <class Tile>
MOE_DEVICE void entropyGradient(bf16* dlogits, const TensorMap& x, const TensorMap& weight, const int* targets, const float* lse, const float* dloss, int N, int V, int D, int ld, int first, int classes, int ignoreIndex) {
  eachTile<Tile>(x, weight, N, V, D, [&](typename Tile::Accumulator& logits, int row, int column) {
    storeLogitsGradient<Tile>(dlogits, logits, row, column, {targets, lse, dloss, first, classes, ignoreIndex}, N, V, ld);
  });
}

#define ENTROPY(name, Tile)                                                                                                                                \
  MOE_KERNEL((Tile::Threads, 1), moe_linear_cross_entropy_fwd_sm90a_##name, (float* highest, float* total, float* targetLogit, const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap weight, const int* targets, int N, int V, int D, int first, int firstTile, int tilesTotal)) { \
    entropy<Tile>(highest, total, targetLogit, x, weight, targets, N, V, D, first, firstTile, tilesTotal);                                                \
  }                                                                                                                                                        \
  MOE_KERNEL((Tile::Threads, 1), moe_linear_cross_entropy_bwd_sm90a_##name, (bf16* dlogits, const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap weight, const int* targets, const float* lse, const float* dloss, int N, int V, int D, int ld, int first, int classes, int ignoreIndex)) { \
    entropyGradient<Tile>(dlogits, x, weight, targets, lse, dloss, N, V, D, ld, first, classes, ignoreIndex);                                            \
  }
ENTROPY(128x256, HopperLarge)
ENTROPY(128x128, HopperSmall)
