// Matrix products in bf16 on Hopper: a warp-specialized persistent kernel, as in CUTLASS. One producer warp fills
// stages in shared memory with TMA copies; two consumer warpgroups multiply them with wgmma and run the epilogue. Each
// block processes several tiles.
// Operands are stored as [outer][k] (K-major), or as [k][outer] (MN-major). They are copied in boxes of 64 columns, 128
// bytes (operandMap in src/kernels/matmul-sm90a/product.ts): 64 k of all outer indices of the tile, or, if MN-major, 64
// k of 64 outer indices, one box after the other.
#pragma once
#include "gemm.cuh"
#include "hopper.cuh"

/// A tile of 128 x BN, 64 rows for each of the two consumer warpgroups, with the accumulator layout of wgmma. `Stages`
/// stages of 64 k are stored in shared memory.
template <int BN_, int Stages_>
struct TileHopper {
  using Element = bf16;
  static constexpr int BM = 128, BN = BN_, BK = 64, Stages = Stages_, Producer = 8, Threads = (Producer + 1) * 32;
  static constexpr int Rows = 2, Columns = BN / 4, Run = 2, RowLanes = 4;
  static constexpr int bytesA = BM * BK * 2, bytesB = BN * BK * 2, stageBytes = bytesA + bytesB;
  /// Stages are aligned to 1024 bytes, the period of the 128-byte swizzle.
  static constexpr int sharedBytes = Stages * stageBytes + 1024;

  struct Accumulator {
    float v[BN / 2];
  };
  MOE_DEVICE float& at(Accumulator& sums, int i, int j) { return sums.v[j / 2 * 4 + i * 2 + j % 2]; }
  MOE_DEVICE int row(int i) { return threadIdx.x / 32 * 16 + i * 8 + threadIdx.x % 32 / 4; }
  MOE_DEVICE int step(int j) { return j / 2 * 8 + j % 2; }
  MOE_DEVICE int column(int j) { return threadIdx.x % 4 * 2 + step(j); }
};
using HopperLarge = TileHopper<256, 4>;
using HopperSmall = TileHopper<128, 6>;
/// A width in between, for products with few tiles, whose last wave would otherwise leave most multiprocessors idle.
using HopperMedium = TileHopper<192, 5>;
/// Only with a K-major b: 144 columns are not a whole number of boxes.
using HopperNarrow = TileHopper<144, 6>;

/// One output tile: the coordinates of its operands, and the number of steps of 64 k (with none, the result is zero).
/// All rows of the tile are read, but only `rows` rows are stored.
struct WorkTile {
  int rowA, matrixA, rowB, matrixB, k, steps, rows;
};

/// Starts the copies of one operand of a stage: `Outer` outer indices, 64 k.
template <int Outer, bool MnMajor>
MOE_DEVICE void copyOperand(unsigned char* to, const TensorMap& x, Barrier* full, int k, int outer, int matrix) {
  if constexpr (MnMajor) {
#pragma unroll
    for (int o = 0; o < Outer; o += 64) tmaLoad(to + o * 128, x, full, outer + o, k, matrix);
  } else {
    tmaLoad(to, x, full, k, outer, matrix);
  }
}

/// Descriptor of the first 16 of the 64 k of a stage. descriptorStep(k) is what to add to it for those starting at k.
template <bool MnMajor>
MOE_DEVICE uint64_t stageDescriptor(const unsigned char* stage) {
  return MnMajor ? mnMajorDescriptor(stage, 64 * 128) : kMajorDescriptor(stage, 0);
}
template <bool MnMajor>
MOE_DEVICE int descriptorStep(int k) {
  return MnMajor ? k * 8 : k / 8;
}

/// The ring of stages shared by producer and consumers. For each, `full` completes when the copies have arrived and
/// `empty` when all consumer warps have read it. `stage` and `parity` are the position of this side in the ring.
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

/// The persistent loop: processes tiles blockIdx.x, + gridDim.x, ... below `workTiles`. `workAt(j)` is called by whole
/// warps. `copy(stages, work, t)` is called by one thread of the producer warp and starts the copies of step t,
/// `stepBytes` in total. `multiply(j, work, stages)` is called by the consumer warpgroups; it must wait for each step,
/// arrive when it has been read, and advance to the next stage.
template <class Tile, class WorkAt, class Copy, class Multiply>
MOE_DEVICE void persistentPipeline(int workTiles, int stepBytes, WorkAt workAt, Copy copy, Multiply multiply) {
  MOE_DYNAMIC_SHARED(dynamic);
  MOE_SHARED(Barrier, full, [Tile::Stages]);
  MOE_SHARED(Barrier, empty, [Tile::Stages]);
  if (threadIdx.x == 0) {
    for (int s = 0; s < Tile::Stages; s++) {
      initBarrier(&full[s], 1);
      initBarrier(&empty[s], Tile::Producer); // one arrival per consumer warp
    }
    fenceBarrierInit();
  }
  __syncthreads();

  Stages<Tile> stages = {warpUniform(dynamic + (-sharedAddress(dynamic) & 1023)), warpUniform(full), warpUniform(empty), 0, 0};
  const int warp = __shfl_sync(wholeWarp, (int)threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  if (warp == Tile::Producer) {
    for (int j = blockIdx.x; j < workTiles; j += gridDim.x) {
      const WorkTile work = workAt(j);
      for (int t = 0; t < work.steps; t++, nextStage(stages)) {
        if (lane == 0) {
          wait(&empty[stages.stage], stages.parity ^ 1); // returns at once in the first round
          arriveAndExpectTx(&full[stages.stage], stepBytes);
          copy(stages, work, t);
        }
        __syncwarp();
      }
    }
    return;
  }
  for (int j = blockIdx.x; j < workTiles; j += gridDim.x) multiply(j, workAt(j), stages);
}

/// The bf16 main loop: `copy(to, full, work, t)` starts the copies of step t, `stageBytes` in total; `store(j, work,
/// sums)` is the epilogue, called by the consumer warpgroups.
template <class Tile, bool MnMajorA, bool MnMajorB, class WorkAt, class Copy, class Store>
MOE_DEVICE void persistentGemmSteps(int workTiles, WorkAt workAt, Copy copy, Store store) {
  persistentPipeline<Tile>(
      workTiles, Tile::stageBytes, workAt,
      [&](const Stages<Tile>& stages, const WorkTile& work, int t) { copy(stageOf(stages), &stages.full[stages.stage], work, t); },
      [&](int j, const WorkTile& work, Stages<Tile>& stages) {
        const int warp = __shfl_sync(wholeWarp, (int)threadIdx.x / 32, 0), lane = threadIdx.x % 32;
        // Descriptors of the first stage; those of the other stages are computed by an addition.
        const uint64_t left = warpUniform(stageDescriptor<MnMajorA>(stages.data + warp / 4 * (Tile::bytesA / 2))), right = warpUniform(stageDescriptor<MnMajorB>(stages.data + Tile::bytesA));
        typename Tile::Accumulator sums = {};
        int last = 0;
        for (int t = 0; t < work.steps; t++, nextStage(stages)) {
          const uint64_t a = advanceDescriptor(left, stages.stage * (Tile::stageBytes / 16)), b = advanceDescriptor(right, stages.stage * (Tile::stageBytes / 16));
          wait(&stages.full[stages.stage], stages.parity);
          wgmmaFence(sums.v);
#pragma unroll
          for (int k = 0; k < Tile::BK; k += 16) wgmma<Tile::BN, MnMajorB, MnMajorA>(sums.v, a + descriptorStep<MnMajorA>(k), b + descriptorStep<MnMajorB>(k));
          wgmmaCommit();
          // One group stays in flight, so that the tensor cores never idle between steps. The previous stage has been
          // read.
          wgmmaWait<1>(sums.v);
          if (t > 0 && lane == 0) arrive(&stages.empty[last]);
          last = stages.stage;
        }
        wgmmaWait<0>(sums.v);
        if (work.steps > 0 && lane == 0) arrive(&stages.empty[last]);
        store(j, work, sums);
      });
}

/// Persistent GEMM of two operands, each step 64 k of both.
template <class Tile, bool MnMajorA = false, bool MnMajorB = false, class WorkAt, class Store>
MOE_DEVICE void persistentGemm(const TensorMap& a, const TensorMap& b, int workTiles, WorkAt workAt, Store store) {
  if (threadIdx.x == Tile::Producer * 32) prefetchMap(a), prefetchMap(b);
  persistentGemmSteps<Tile, MnMajorA, MnMajorB>(
      workTiles, workAt,
      [&](unsigned char* to, Barrier* full, const WorkTile& work, int t) {
        copyOperand<Tile::BM, MnMajorA>(to, a, full, work.k + t * Tile::BK, work.rowA, work.matrixA);
        copyOperand<Tile::BN, MnMajorB>(to + Tile::bytesA, b, full, work.k + t * Tile::BK, work.rowB, work.matrixB);
      },
      store);
}
