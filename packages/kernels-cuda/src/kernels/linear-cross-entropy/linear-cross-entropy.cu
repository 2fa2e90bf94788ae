// Cross-entropy of the logits x weight^T. A product tile of logits is reduced to what is needed of it and never stored.
// Legend: N rows of x, V rows of weight (here: a chunk of them, `first` .. `first` + V - 1 of all), D features.
#include "gemm.cuh"

/// Of each row of logits and each tile of columns: the largest, and the sum of exponentials over it; and the target's logit.
/// highest and total [N, tilesTotal], this chunk's from tile firstTile on.
template <class Tile>
MOE_DEVICE void entropyTile(float* highest, float* total, float* targetLogit, const typename Tile::Element* x, const typename Tile::Element* weight, const int* targets, int N, int V, int D, int ldx, int ldw, int first, int firstTile, int tilesTotal) {
  MOE_DYNAMIC_SHARED(shared);
  const int2 tile = tileOf(blockIdx.x, divUp(N, Tile::BM), divUp(V, Tile::BN));
  const int row = tile.x * Tile::BM, column = tile.y * Tile::BN;
  typename Tile::Sums logits = {};
  Tile::template multiply<false, true>(
      logits, shared, {x + (int64_t)row * ldx, ldx, N - row}, {weight + (int64_t)column * ldw, ldw, V - column}, D);

  // Over this thread's columns, then over the lanes and warps that share the row.
  float* const high = (float*)shared;
  float* const sums = high + Tile::BM * Tile::RowWarps;
  const int warp = threadIdx.x / 32 % Tile::RowWarps;
  __syncthreads(); // operands lay there
#pragma unroll
  for (int i = 0; i < Tile::Rows; i++) {
    const int r = Tile::row(i);
    const int target = row + r < N ? targets[row + r] - first - column : -1;
    float best = -infinity();
#pragma unroll
    for (int j = 0; j < Tile::Columns; j++) {
      const float logit = Tile::at(logits, i, j);
      if (column + Tile::column(j) >= V) continue;
      best = maxOrNan(best, logit);
      if (Tile::column(j) == target) targetLogit[row + r] = logit;
    }
    for (int step = Tile::RowLanes / 2; step > 0; step /= 2) best = maxOrNan(best, __shfl_xor_sync(wholeWarp, best, step));
    const float base = best == -infinity() ? 0.f : best;
    float sum = 0.f;
#pragma unroll
    for (int j = 0; j < Tile::Columns; j++) {
      if (column + Tile::column(j) < V) sum += expf(Tile::at(logits, i, j) - base);
    }
    for (int step = Tile::RowLanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(wholeWarp, sum, step);
    if (threadIdx.x % Tile::RowLanes == 0) high[r * Tile::RowWarps + warp] = best, sums[r * Tile::RowWarps + warp] = sum;
  }
  __syncthreads();
  const int r = threadIdx.x;
  if (r >= Tile::BM || row + r >= N) return;
  float best = high[r * Tile::RowWarps];
  for (int w = 1; w < Tile::RowWarps; w++) best = maxOrNan(best, high[r * Tile::RowWarps + w]);
  const float base = best == -infinity() ? 0.f : best;
  float sum = 0.f;
  for (int w = 0; w < Tile::RowWarps; w++) sum += sums[r * Tile::RowWarps + w] * expf(high[r * Tile::RowWarps + w] - base);
  const int64_t to = (int64_t)(row + r) * tilesTotal + firstTile + tile.y;
  highest[to] = best;
  total[to] = sum;
}

/// loss and lse of each row from the tiles' results: one warp each.
MOE_KERNEL((256), moe_linear_cross_entropy_finish_f32, (float* loss, float* lse, const float* highest, const float* total, const float* targetLogit, const int* targets, int N, int V, int tiles, int ignoreIndex)) {
  const int lane = threadIdx.x % 32;
  for (int64_t row = gridThread() / 32; row < N; row += gridThreads() / 32) {
    float best = -infinity();
    for (int t = lane; t < tiles; t += 32) best = maxOrNan(best, highest[row * tiles + t]);
    best = warpMax(best);
    const float base = best == -infinity() ? 0.f : best;
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

/// dlogits [N, ld] of the chunk, with zeros from V to ld: (softmax - onehot(target)) dloss, zeros where the target does not count.
template <class Tile>
MOE_DEVICE void entropyGradientTile(typename Tile::Element* dlogits, const typename Tile::Element* x, const typename Tile::Element* weight, const int* targets, const float* lse, const float* dloss, int N, int V, int D, int ldx, int ldw, int ld, int first, int classes, int ignoreIndex) {
  MOE_DYNAMIC_SHARED(shared);
  const int2 tile = tileOf(blockIdx.x, divUp(N, Tile::BM), divUp(V, Tile::BN));
  const int row = tile.x * Tile::BM, column = tile.y * Tile::BN;
  typename Tile::Sums logits = {};
  Tile::template multiply<false, true>(
      logits, shared, {x + (int64_t)row * ldx, ldx, N - row}, {weight + (int64_t)column * ldw, ldw, V - column}, D);
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
        const float p = expf(Tile::at(logits, i, j + n) - rowLse);
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
