// Matrix products in bf16 on Hopper: one warp feeds shared memory through the copy engine, two warpgroups multiply.
// Operands lie in memory as [outer][k], or as [k][outer] when Across. They are copied in boxes of 64 columns (operandMap in
// src/kernels/matmul-sm90a/product.ts): 64 k of the whole tile, or 64 k of 64 of its outer indices, one box after the other.
#pragma once
#include "gemm.cuh"
#include "hopper.cuh"

/// The tile of 128 x BN that two warpgroups of 64 rows each make, for storeTile; `Stages` steps of 64 k lie in shared memory.
template <int BN_, int Stages_>
struct TileHopper {
  using Element = bf16;
  static constexpr int BM = 128, BN = BN_, BK = 64, Stages = Stages_, Producer = 8, Threads = (Producer + 1) * 32;
  static constexpr int Rows = 2, Columns = BN / 4, Run = 2, RowLanes = 4;
  static constexpr int bytesA = BM * BK * 2, bytesB = BN * BK * 2, stageBytes = bytesA + bytesB;
  /// Stages begin at a multiple of 1024, where the swizzle's pattern does.
  static constexpr int sharedBytes = Stages * stageBytes + 1024;

  struct Sums {
    float v[BN / 2];
  };
  MOE_DEVICE float& at(Sums& sums, int i, int j) { return sums.v[j / 2 * 4 + i * 2 + j % 2]; }
  MOE_DEVICE int row(int i) { return threadIdx.x / 32 * 16 + i * 8 + threadIdx.x % 32 / 4; }
  MOE_DEVICE int step(int j) { return j / 2 * 8 + j % 2; }
  MOE_DEVICE int column(int j) { return threadIdx.x % 4 * 2 + step(j); }
};
using HopperLarge = TileHopper<256, 4>;
using HopperSmall = TileHopper<128, 6>;
/// Widths between, for products of few tiles: most of the last wave would have nothing to do.
using HopperMedium = TileHopper<192, 5>;
/// k of b runs along memory: 144 are no whole boxes.
using HopperNarrow = TileHopper<144, 6>;

/// One tile's work: where its operands begin, and how many steps of 64 k there are (none: the sums are zeros). `rows` of its rows are
/// stored; all are read.
struct HopperJob {
  int rowA, matrixA, rowB, matrixB, k, steps, rows;
};

/// Starts the copies of one operand's part of a stage, `Outer` outer indices of 64 k.
template <int Outer, bool Across>
MOE_DEVICE void copyOperand(unsigned char* to, const TensorMap& x, Barrier* full, int k, int outer, int matrix) {
  if constexpr (Across) {
#pragma unroll
    for (int o = 0; o < Outer; o += 64) copyBox(to + o * 128, x, full, outer + o, k, matrix);
  } else {
    copyBox(to, x, full, k, outer, matrix);
  }
}

/// The first sixteen of the 64 k that lie in a stage, as a product takes them; those from k on are stepTo(k) further.
template <bool Across>
MOE_DEVICE uint64_t operandIn(const unsigned char* stage) {
  return Across ? operandAcross(stage, 64 * 128) : operandAt(stage, 0);
}
template <bool Across>
MOE_DEVICE int stepTo(int k) {
  return Across ? k * 8 : k / 8;
}

/// Places in shared memory between the warp that copies and the warpgroups that multiply, each `full` (the copies have landed) or `empty` (all warps have read it)
/// by turns; and where one side is.
template <class Tile>
struct Stages {
  unsigned char* data;
  Barrier *full, *empty;
  int stage, parity;
};
template <class Tile>
MOE_DEVICE unsigned char* stageOf(const Stages<Tile>& stages) {
  return stages.data + stages.stage * Tile::stageBytes;
}
template <class Tile>
MOE_DEVICE void nextStage(Stages<Tile>& stages) {
  if (++stages.stage == Tile::Stages) stages.stage = 0, stages.parity ^= 1;
}

/// Works off the jobs blockIdx.x, + gridDim.x, ... below `jobs`. `jobOf(j)` is called by whole warps; `copy(stages, job, t)` by one thread, starts the copies of step t,
/// `stepBytes` in all; `multiply(j, job, stages)` by the warpgroups, who wait for each step, arrive when they have read it and go to the next stage.
template <class Tile, class JobOf, class Copy, class Multiply>
MOE_DEVICE void workOffStages(int jobs, int stepBytes, JobOf jobOf, Copy copy, Multiply multiply) {
  MOE_DYNAMIC_SHARED(dynamic);
  MOE_SHARED(Barrier, full, [Tile::Stages]);
  MOE_SHARED(Barrier, empty, [Tile::Stages]);
  if (threadIdx.x == 0) {
    for (int s = 0; s < Tile::Stages; s++) {
      initBarrier(&full[s], 1);
      initBarrier(&empty[s], Tile::Producer); // one arrival of each multiplying warp
    }
    fenceBarriers();
  }
  __syncthreads();

  Stages<Tile> stages = {kept(dynamic + (-sharedAddress(dynamic) & 1023)), kept(full), kept(empty), 0, 0};
  const int warp = __shfl_sync(wholeWarp, (int)threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  if (warp == Tile::Producer) {
    for (int j = blockIdx.x; j < jobs; j += gridDim.x) {
      const HopperJob job = jobOf(j);
      for (int t = 0; t < job.steps; t++, nextStage(stages)) {
        if (lane == 0) {
          wait(&empty[stages.stage], stages.parity ^ 1); // the first time round at once
          arriveAndExpect(&full[stages.stage], stepBytes);
          copy(stages, job, t);
        }
        __syncwarp();
      }
    }
    return;
  }
  for (int j = blockIdx.x; j < jobs; j += gridDim.x) multiply(j, jobOf(j), stages);
}

/// The same in bf16: `copy(to, full, job, t)` starts the copies of step t, `stageBytes` in all; `store(j, job, sums)` is called by the warpgroups.
template <class Tile, bool AcrossA, bool AcrossB, class JobOf, class Copy, class Store>
MOE_DEVICE void workOffSteps(int jobs, JobOf jobOf, Copy copy, Store store) {
  workOffStages<Tile>(
      jobs, Tile::stageBytes, jobOf,
      [&](const Stages<Tile>& stages, const HopperJob& job, int t) { copy(stageOf(stages), &stages.full[stages.stage], job, t); },
      [&](int j, const HopperJob& job, Stages<Tile>& stages) {
        const int warp = __shfl_sync(wholeWarp, (int)threadIdx.x / 32, 0), lane = threadIdx.x % 32;
        // Of the first stage: the others' are found by an addition.
        const uint64_t left = kept(operandIn<AcrossA>(stages.data + warp / 4 * (Tile::bytesA / 2))), right = kept(operandIn<AcrossB>(stages.data + Tile::bytesA));
        typename Tile::Sums sums = {};
        int last = 0;
        for (int t = 0; t < job.steps; t++, nextStage(stages)) {
          const uint64_t a = further(left, stages.stage * (Tile::stageBytes / 16)), b = further(right, stages.stage * (Tile::stageBytes / 16));
          wait(&stages.full[stages.stage], stages.parity);
          fenceProducts(sums.v);
#pragma unroll
          for (int k = 0; k < Tile::BK; k += 16) multiplyGroup<Tile::BN, AcrossB, AcrossA>(sums.v, a + stepTo<AcrossA>(k), b + stepTo<AcrossB>(k));
          commitProducts();
          // One group stays on its way, so that the tensor cores never wait for the next; the stage before is free.
          waitProducts<1>(sums.v);
          if (t > 0 && lane == 0) arrive(&stages.empty[last]);
          last = stages.stage;
        }
        waitProducts<0>(sums.v);
        if (job.steps > 0 && lane == 0) arrive(&stages.empty[last]);
        store(j, job, sums);
      });
}

/// The same, each step of 64 k of the operands.
template <class Tile, bool AcrossA = false, bool AcrossB = false, class JobOf, class Store>
MOE_DEVICE void workOff(const TensorMap& a, const TensorMap& b, int jobs, JobOf jobOf, Store store) {
  if (threadIdx.x == Tile::Producer * 32) prefetchMap(a), prefetchMap(b);
  workOffSteps<Tile, AcrossA, AcrossB>(
      jobs, jobOf,
      [&](unsigned char* to, Barrier* full, const HopperJob& job, int t) {
        copyOperand<Tile::BM, AcrossA>(to, a, full, job.k + t * Tile::BK, job.rowA, job.matrixA);
        copyOperand<Tile::BN, AcrossB>(to + Tile::bytesA, b, full, job.k + t * Tile::BK, job.rowB, job.matrixB);
      },
      store);
}
