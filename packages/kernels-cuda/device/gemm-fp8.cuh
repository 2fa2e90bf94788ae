// Matrix products in f8e4m3 on Hopper, with a scale for every 128 k of each row of both operands, as in DeepSeek-V3's
// training (report 3.3). Both operands are K-major (wgmma has no other form in fp8), and rows are padded to whole boxes
// of 128 bytes. Warp roles are those of gemm-hopper.cuh: one producer warp, two consumer warpgroups.
#pragma once
#include "fp8.cuh"
#include "gemm-hopper.cuh"

/// A tile of 128 x 128; a stage holds 128 k, the same number of bytes as 64 k in bf16. The scales of b of each stage
/// are stored after the stages.
struct TileFp8 : TileHopper<128, 6> {
  static constexpr int BK = fp8Tile, scaleBytes = BN * 4, sharedBytes = TileHopper<128, 6>::sharedBytes + Stages * scaleBytes;
};

/// Scales [matrix][tiles][ld] of an operand; ld is a multiple of 128.
struct Fp8Scales {
  const float* data;
  int tiles, ld;
};
MOE_DEVICE const float* scalesOf(const Fp8Scales& scales, int matrix, int tile) { return scales.data + ((int64_t)matrix * scales.tiles + tile) * scales.ld; }

/// Persistent fp8 GEMM over `workTiles` tiles. A step is 128 k and starts at a multiple of 128, as do the rows of b.
/// `operandsAt(t, use)` calls use(a, b, scalesA, scalesB, step) with the operands of step t of a tile, and the number
/// of the step within them. There are scales for `rowsA` rows of a.
/// Tensor cores accumulate fp8 products with only about 14 bits (V3 report, 3.3.2). Therefore each step has its own
/// accumulator `part`, which CUDA cores scale and add to the f32 accumulator `sums` (promotion). One warpgroup's
/// additions overlap with the other's products.
template <class OperandsAt, class WorkAt, class Store>
MOE_DEVICE void persistentGemmFp8Steps(OperandsAt operandsAt, int rowsA, int workTiles, WorkAt workAt, Store store) {
  using Tile = TileFp8;
  const auto stageScales = [](const Stages<Tile>& stages) { return (float*)(stages.data + Tile::Stages * Tile::stageBytes) + stages.stage * Tile::BN; };
  persistentPipeline<Tile>(
      workTiles, Tile::stageBytes + Tile::scaleBytes, workAt,
      [&](const Stages<Tile>& stages, const WorkTile& work, int t) {
        Barrier* const full = &stages.full[stages.stage];
        operandsAt(t, [&](const TensorMap& a, const TensorMap& b, const Fp8Scales&, const Fp8Scales& scalesB, int step) {
          const int k = work.k + step * Tile::BK;
          tmaLoad(stageOf(stages), a, full, k, work.rowA, work.matrixA);
          tmaLoad(stageOf(stages) + Tile::bytesA, b, full, k, work.rowB, work.matrixB);
          bulkLoad(stageScales(stages), scalesOf(scalesB, work.matrixB, k / Tile::BK) + work.rowB, Tile::scaleBytes, full);
        });
      },
      [&](int j, const WorkTile& work, Stages<Tile>& stages) {
        const int warp = __shfl_sync(wholeWarp, (int)threadIdx.x / 32, 0), lane = threadIdx.x % 32;
        const uint64_t left = warpUniform(kMajorDescriptor(stages.data + warp / 4 * (Tile::bytesA / 2), 0)), right = warpUniform(kMajorDescriptor(stages.data + Tile::bytesA, 0));
        const auto loadScales = [&](float (&to)[Tile::Rows], int t) {
          operandsAt(t, [&](const TensorMap&, const TensorMap&, const Fp8Scales& scalesA, const Fp8Scales&, int step) {
            const float* const from = scalesOf(scalesA, work.matrixA, work.k / Tile::BK + step);
#pragma unroll
            for (int i = 0; i < Tile::Rows; i++) to[i] = from[min(work.rowA + Tile::row(i), rowsA - 1)];
          });
        };
        Tile::Accumulator sums = {}, part = {};
        float scaleA[Tile::Rows], nextA[Tile::Rows];
        if (work.steps > 0) loadScales(nextA, 0);
        for (int t = 0; t < work.steps; t++, nextStage(stages)) {
          const uint64_t a = advanceDescriptor(left, stages.stage * (Tile::stageBytes / 16)), b = advanceDescriptor(right, stages.stage * (Tile::stageBytes / 16));
#pragma unroll
          for (int i = 0; i < Tile::Rows; i++) scaleA[i] = nextA[i];
          wait(&stages.full[stages.stage], stages.parity);
          wgmmaFence(part.v);
          wgmmaFp8<true>(part.v, a, b);
#pragma unroll
          for (int k = 16; k < 64; k += 16) wgmmaFp8<false>(part.v, a + descriptorStep<false>(k), b + descriptorStep<false>(k));
          wgmmaCommit();
          // While the products run: load the scales of the next step's rows, and of half of the columns, as many as
          // registers allow.
          if (t + 1 < work.steps) loadScales(nextA, t + 1);
          const float* const scalesB = stageScales(stages) + Tile::column(0);
          float2 scaleB[Tile::Columns / 4];
#pragma unroll
          for (int c = 0; c < Tile::Columns / 4; c++) scaleB[c] = *(const float2*)(scalesB + Tile::step(2 * c));
          wgmmaWait<0>(part.v);
#pragma unroll
          for (int c = 0; c < Tile::Columns; c += 2) {
            const float2 scale = c < Tile::Columns / 2 ? scaleB[c / 2] : *(const float2*)(scalesB + Tile::step(c));
#pragma unroll
            for (int i = 0; i < Tile::Rows; i++) {
              Tile::at(sums, i, c) += Tile::at(part, i, c) * (scaleA[i] * scale.x);
              Tile::at(sums, i, c + 1) += Tile::at(part, i, c + 1) * (scaleA[i] * scale.y);
            }
          }
          fenceProxyAsync(); // threads have read scales that the copy engine will overwrite
          __syncwarp();
          if (lane == 0) arrive(&stages.empty[stages.stage]);
        }
        store(j, work, sums);
      });
}

/// persistentGemmFp8Steps for one pair of operands.
template <class WorkAt, class Store>
MOE_DEVICE void persistentGemmFp8(const TensorMap& a, const TensorMap& b, Fp8Scales scalesA, Fp8Scales scalesB, int rowsA, int workTiles, WorkAt workAt, Store store) {
  if (threadIdx.x == TileFp8::Producer * 32) prefetchMap(a), prefetchMap(b);
  persistentGemmFp8Steps([&](int t, auto use) { use(a, b, scalesA, scalesB, t); }, rowsA, workTiles, workAt, store);
}
