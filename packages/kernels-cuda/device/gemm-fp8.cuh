// Matrix products in f8e4m3 on Hopper, with a scale for every 128 of k of each row of both operands. k runs along memory (there is no other form), rows
// are whole boxes of 128 bytes. As gemm-hopper.cuh: one warp copies, two warpgroups multiply.
#pragma once
#include "fp8.cuh"
#include "gemm-hopper.cuh"

/// 128 x 128, a step of 128 k in the bytes of 64 of bf16. Behind the stages lie b's scales of each.
struct TileFp8 : TileHopper<128, 6> {
  static constexpr int BK = fp8Tile, scaleBytes = BN * 4, sharedBytes = TileHopper<128, 6>::sharedBytes + Stages * scaleBytes;
};

/// Scales [matrix][tiles][ld] of an operand; ld is a multiple of 128.
struct Fp8Scales {
  const float* data;
  int tiles, ld;
};
MOE_DEVICE const float* scalesOf(const Fp8Scales& scales, int matrix, int tile) { return scales.data + ((int64_t)matrix * scales.tiles + tile) * scales.ld; }

/// Works off the jobs, whose steps are of 128 k and begin at a multiple of it; rows of b at one of 128. `operandsAt(t, use)` calls use(a, b, scalesA, scalesB, t) with
/// the operands that step t of a job is of, and which of theirs it is. Tensor cores keep no more than some 14 bits of what they add up
/// (V3 report 3.3.2), so that every 128 of k are added to the sums by ordinary cores, which is also where their scales come in: a warpgroup's
/// additions go on beside the other one's products. `rowsA`: rows of a that there are scales for.
template <class OperandsAt, class JobOf, class Store>
MOE_DEVICE void workOffFp8Steps(OperandsAt operandsAt, int rowsA, int jobs, JobOf jobOf, Store store) {
  using Tile = TileFp8;
  const auto stageScales = [](const Stages<Tile>& stages) { return (float*)(stages.data + Tile::Stages * Tile::stageBytes) + stages.stage * Tile::BN; };
  workOffStages<Tile>(
      jobs, Tile::stageBytes + Tile::scaleBytes, jobOf,
      [&](const Stages<Tile>& stages, const HopperJob& job, int t) {
        Barrier* const full = &stages.full[stages.stage];
        operandsAt(t, [&](const TensorMap& a, const TensorMap& b, const Fp8Scales&, const Fp8Scales& scalesB, int step) {
          const int k = job.k + step * Tile::BK;
          copyBox(stageOf(stages), a, full, k, job.rowA, job.matrixA);
          copyBox(stageOf(stages) + Tile::bytesA, b, full, k, job.rowB, job.matrixB);
          copyBytes(stageScales(stages), scalesOf(scalesB, job.matrixB, k / Tile::BK) + job.rowB, Tile::scaleBytes, full);
        });
      },
      [&](int j, const HopperJob& job, Stages<Tile>& stages) {
        const int warp = __shfl_sync(wholeWarp, (int)threadIdx.x / 32, 0), lane = threadIdx.x % 32;
        const uint64_t left = kept(operandAt(stages.data + warp / 4 * (Tile::bytesA / 2), 0)), right = kept(operandAt(stages.data + Tile::bytesA, 0));
        const auto loadScales = [&](float (&to)[Tile::Rows], int t) {
          operandsAt(t, [&](const TensorMap&, const TensorMap&, const Fp8Scales& scalesA, const Fp8Scales&, int step) {
            const float* const from = scalesOf(scalesA, job.matrixA, job.k / Tile::BK + step);
#pragma unroll
            for (int i = 0; i < Tile::Rows; i++) to[i] = from[min(job.rowA + Tile::row(i), rowsA - 1)];
          });
        };
        Tile::Sums sums = {}, part = {};
        float scaleA[Tile::Rows], nextA[Tile::Rows];
        if (job.steps > 0) loadScales(nextA, 0);
        for (int t = 0; t < job.steps; t++, nextStage(stages)) {
          const uint64_t a = further(left, stages.stage * (Tile::stageBytes / 16)), b = further(right, stages.stage * (Tile::stageBytes / 16));
#pragma unroll
          for (int i = 0; i < Tile::Rows; i++) scaleA[i] = nextA[i];
          wait(&stages.full[stages.stage], stages.parity);
          fenceProducts(part.v);
          multiplyGroupFp8<true>(part.v, a, b);
#pragma unroll
          for (int k = 16; k < 64; k += 16) multiplyGroupFp8<false>(part.v, a + stepTo<false>(k), b + stepTo<false>(k));
          commitProducts();
          // While they are on their way: scales of the next step's rows, and of half of the columns, for which there are registers.
          if (t + 1 < job.steps) loadScales(nextA, t + 1);
          const float* const scalesB = stageScales(stages) + Tile::column(0);
          float2 scaleB[Tile::Columns / 4];
#pragma unroll
          for (int c = 0; c < Tile::Columns / 4; c++) scaleB[c] = *(const float2*)(scalesB + Tile::step(2 * c));
          waitProducts<0>(part.v);
#pragma unroll
          for (int c = 0; c < Tile::Columns; c += 2) {
            const float2 scale = c < Tile::Columns / 2 ? scaleB[c / 2] : *(const float2*)(scalesB + Tile::step(c));
#pragma unroll
            for (int i = 0; i < Tile::Rows; i++) {
              Tile::at(sums, i, c) += Tile::at(part, i, c) * (scaleA[i] * scale.x);
              Tile::at(sums, i, c + 1) += Tile::at(part, i, c + 1) * (scaleA[i] * scale.y);
            }
          }
          fenceOperands(); // threads have read scales where the copy engine writes again
          __syncwarp();
          if (lane == 0) arrive(&stages.empty[stages.stage]);
        }
        store(j, job, sums);
      });
}

/// The same of one a and one b.
template <class JobOf, class Store>
MOE_DEVICE void workOffFp8(const TensorMap& a, const TensorMap& b, Fp8Scales scalesA, Fp8Scales scalesB, int rowsA, int jobs, JobOf jobOf, Store store) {
  if (threadIdx.x == TileFp8::Producer * 32) prefetchMap(a), prefetchMap(b);
  workOffFp8Steps([&](int t, auto use) { use(a, b, scalesA, scalesB, t); }, rowsA, jobs, jobOf, store);
}
