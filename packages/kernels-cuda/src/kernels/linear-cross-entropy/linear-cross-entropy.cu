// Cross-entropy of the logits x weight^T, which are never stored: each block computes one tile of them and reduces it
// in the epilogue. A second kernel combines the tiles' statistics. Legend as in entropy-tile.cuh.
#include "entropy-tile.cuh"

/// Computes for each row of logits and each tile of columns the maximum and the sum of exponentials relative to it, and
/// the target's logit. highest and total are [N, tilesTotal]; this chunk's tiles start with firstTile.
template <class Tile>
MOE_DEVICE void entropyTile(float* highest, float* total, float* targetLogit, const typename Tile::Element* x, const typename Tile::Element* weight, const int* targets, int N, int V, int D, int ldx, int ldw, int first, int firstTile, int tilesTotal) {
  MOE_DYNAMIC_SHARED(shared);
  const int2 tile = rasterize(blockIdx.x, divUp(N, Tile::BM), divUp(V, Tile::BN));
  const int row = tile.x * Tile::BM, column = tile.y * Tile::BN;
  typename Tile::Accumulator logits = {};
  Tile::template multiply<false, true>(
      logits, shared, {x + (int64_t)row * ldx, ldx, N - row}, {weight + (int64_t)column * ldw, ldw, V - column}, D);

  // Reduce over this warp's columns, then over the warps that share the row.
  float* const high = (float*)shared;
  float* const sums = high + Tile::BM * Tile::RowWarps;
  const int warp = threadIdx.x / 32 % Tile::RowWarps;
  __syncthreads(); // shared memory held operands
#pragma unroll
  for (int i = 0; i < Tile::Rows; i++) {
    const int r = Tile::row(i);
    const int target = row + r < N && targets[row + r] - first < V ? targets[row + r] - first - column : -1;
    const RowEntropy found = rowEntropy<Tile>(logits, i, [&](int j) { return column + Tile::column(j) < V; }, target, targetLogit + row + r);
    if (threadIdx.x % Tile::RowLanes == 0) high[r * Tile::RowWarps + warp] = found.highest, sums[r * Tile::RowWarps + warp] = found.total;
  }
  __syncthreads();
  const int r = threadIdx.x;
  if (r >= Tile::BM || row + r >= N) return;
  float best = high[r * Tile::RowWarps];
  for (int w = 1; w < Tile::RowWarps; w++) best = maxOrNan(best, high[r * Tile::RowWarps + w]);
  const float base = exponentialBase(best);
  float sum = 0.f;
  for (int w = 0; w < Tile::RowWarps; w++) sum += sums[r * Tile::RowWarps + w] * expf(high[r * Tile::RowWarps + w] - base);
  const int64_t to = (int64_t)(row + r) * tilesTotal + firstTile + tile.y;
  highest[to] = best;
  total[to] = sum;
}

/// Combines the tiles' statistics into loss and lse of each row, one warp each.
MOE_KERNEL((256), moe_linear_cross_entropy_finish_f32, (float* loss, float* lse, const float* highest, const float* total, const float* targetLogit, const int* targets, int N, int V, int tiles, int ignoreIndex)) {
  const int lane = threadIdx.x % 32;
  for (int64_t row = gridThread() / 32; row < N; row += gridThreads() / 32) {
    float best = -infinity();
    for (int t = lane; t < tiles; t += 32) best = maxOrNan(best, highest[row * tiles + t]);
    best = warpMax(best);
    const float base = exponentialBase(best);
    float sum = 0.f;
    for (int t = lane; t < tiles; t += 32) sum += total[row * tiles + t] * expf(highest[row * tiles + t] - base);
    sum = warpSum(sum);
    const float rowLse = best + logf(sum);
    const int target = targets[row];
    if (lane == 0) {
      lse[row] = rowLse;
      loss[row] = target >= 0 && target < V && target != ignoreIndex ? rowLse - targetLogit[row] : 0.f;
    }
  }
}

/// dlogits [N, ld] of the chunk.
template <class Tile>
MOE_DEVICE void entropyGradientTile(typename Tile::Element* dlogits, const typename Tile::Element* x, const typename Tile::Element* weight, const int* targets, const float* lse, const float* dloss, int N, int V, int D, int ldx, int ldw, int ld, int first, int classes, int ignoreIndex) {
  MOE_DYNAMIC_SHARED(shared);
  const int2 tile = rasterize(blockIdx.x, divUp(N, Tile::BM), divUp(V, Tile::BN));
  const int row = tile.x * Tile::BM, column = tile.y * Tile::BN;
  typename Tile::Accumulator logits = {};
  Tile::template multiply<false, true>(
      logits, shared, {x + (int64_t)row * ldx, ldx, N - row}, {weight + (int64_t)column * ldw, ldw, V - column}, D);
  storeLogitsGradient<Tile>(dlogits, logits, row, column, {targets, lse, dloss, first, classes, ignoreIndex}, N, V, ld);
}

#define ENTROPY(blocks, name, Tile)                                                                                                                        \
  MOE_KERNEL((Tile::Threads, blocks), moe_linear_cross_entropy_fwd_##name, (float* highest, float* total, float* targetLogit, const Tile::Element* x, const Tile::Element* weight, const int* targets, int N, int V, int D, int ldx, int ldw, int first, int firstTile, int tilesTotal)) { \
    entropyTile<Tile>(highest, total, targetLogit, x, weight, targets, N, V, D, ldx, ldw, first, firstTile, tilesTotal);                                  \
  }                                                                                                                                                        \
  MOE_KERNEL((Tile::Threads, blocks), moe_linear_cross_entropy_bwd_##name, (Tile::Element* dlogits, const Tile::Element* x, const Tile::Element* weight, const int* targets, const float* lse, const float* dloss, int N, int V, int D, int ldx, int ldw, int ld, int first, int classes, int ignoreIndex)) { \
    entropyGradientTile<Tile>(dlogits, x, weight, targets, lse, dloss, N, V, D, ldx, ldw, ld, first, classes, ignoreIndex);                                \
  }
ENTROPY(2, f32_128x128, F32Large)
ENTROPY(3, f32_64x64, F32Small)
ENTROPY(1, bf16_128x256, Bf16Large)
ENTROPY(2, bf16_128x128, Bf16Medium)
ENTROPY(3, bf16_64x64, Bf16Small)
