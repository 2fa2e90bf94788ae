// Matrix products: one block computes one tile of c = a b with one of the two engines below, which have the same
// interface.
//   Element, BM, BN, BK, Threads, sharedBytes   operand type, tile size, k per stage, block size, dynamic shared memory
//   Accumulator                                 this thread's part of the tile: Rows x Columns elements
//   row(i), column(j), at(sums, i, j)           their positions; columns come in runs of Run neighbours; in bf16 tiles, column(j + Columns / 2) is
//                                               column(j) + BN / 2, so that a thread holds both if two operands fill half of the columns each
//   step(j)                                     column(j) - column(0), the same for all threads
//   RowLanes, RowWarps                          a row is shared by RowLanes lanes (which differ in the lowest bits) of RowWarps warps
//   multiply<TransposeA, TransposeB>(...)       the main loop: a multi-stage cp.async pipeline
// The epilogue (storing the tile, or reducing it to a softmax) is up to the kernel. gemm-hopper.cuh has a third engine,
// with another main loop.
// Legend: o, k as in tile.cuh; a is [m, k] ([k, m] if transposed), b is [k, n] ([n, k] if transposed).
#pragma once
#include "tile.cuh"
#include "wide.cuh"

/// An operand, starting at the tile's first outer index and first k. `outer` outer indices exist; rows in memory are ld
/// elements apart.
template <class T>
struct Operand {
  const T* data;
  int64_t ld;
  int outer;
};

/// Two B operands of the same shape: `first` fills the first half of the tile's columns, `second` the second half.
template <class T>
struct Halves {
  const T *first, *second;
  int64_t ld;
  int outer;
};

/// f32 on CUDA cores. 16 x 16 threads with (BM / 16) x (BN / 16) elements each, in runs of 4.
template <int BM_, int BN_>
struct TileF32 {
  using Element = float;
  static constexpr int BM = BM_, BN = BN_, BK = 16, Stages = 3, Threads = 256;
  static constexpr int Rows = BM / 16, Columns = BN / 16, Run = 4, RowLanes = 16, RowWarps = 1;
  // A stage is [k][o]. Rows are padded by four elements to spread transposing stores over the banks.
  static constexpr int LA = BM + 4, LB = BN + 4, stageSize = BK * (LA + LB);
  static constexpr int sharedBytes = Stages * stageSize * 4;

  struct Accumulator {
    float v[Rows][Columns];
  };
  MOE_DEVICE float& at(Accumulator& sums, int i, int j) { return sums.v[i][j]; }
  MOE_DEVICE int row(int i) { return i / 4 * 64 + threadIdx.x / 16 * 4 + i % 4; }
  MOE_DEVICE int step(int j) { return j / 4 * 64 + j % 4; }
  MOE_DEVICE int column(int j) { return threadIdx.x % 16 * 4 + step(j); }

  /// k is contiguous in memory unless Strided.
  template <int B, bool Strided>
  MOE_DEVICE void copy(float* tile, Operand<float> x, int k0, int k) {
    constexpr int along = Strided ? B : BK, perStep = Threads / along; // neighbouring threads copy neighbouring elements
    const int inner = threadIdx.x % along, outer = threadIdx.x / along;
    const int o = Strided ? inner : outer, kk = Strided ? outer : inner;
    float* const to = tile + kk * (B + 4) + o;
    const float* from = x.data + (Strided ? (k0 + kk) * x.ld + o : o * x.ld + k0 + kk);
    int left = Strided ? k - k0 - kk : x.outer - o;
    if (Strided ? o >= x.outer : k0 + kk >= k) left = 0;
#pragma unroll
    for (int step = 0; step < B * BK / Threads; step++, from += perStep * x.ld) {
      cpAsync4(to + step * perStep * (Strided ? B + 4 : 1), from, step * perStep < left);
    }
  }

  /// sums += a b over k.
  template <bool TransposeA, bool TransposeB>
  MOE_DEVICE void multiply(Accumulator& sums, unsigned char* shared, Operand<float> a, Operand<float> b, int k) {
    float* const stages = (float*)shared;
    const int steps = divUp(k, BK);
    auto copyStep = [&](int t) {
      if (t < steps) {
        float* const stage = stages + t % Stages * stageSize;
        copy<BM, TransposeA>(stage, a, t * BK, k);
        copy<BN, !TransposeB>(stage + BK * LA, b, t * BK, k);
      }
      cpAsyncCommit();
    };
    for (int t = 0; t < Stages - 1; t++) copyStep(t);
    for (int t = 0; t < steps; t++) {
      cpAsyncWait<Stages - 2>();
      __syncthreads();
      copyStep(t + Stages - 1); // overwrites the stage that all threads have finished reading
      const float* const ta = stages + t % Stages * stageSize + threadIdx.x / 16 * 4;
      const float* const tb = stages + t % Stages * stageSize + BK * LA + threadIdx.x % 16 * 4;
#pragma unroll
      for (int kk = 0; kk < BK; kk++) {
        alignas(16) float left[Rows], right[Columns];
#pragma unroll
        for (int i = 0; i < Rows; i += 4) *(float4*)(left + i) = *(const float4*)(ta + kk * LA + i * 16);
#pragma unroll
        for (int j = 0; j < Columns; j += 4) *(float4*)(right + j) = *(const float4*)(tb + kk * LB + j * 16);
#pragma unroll
        for (int i = 0; i < Rows; i++) {
#pragma unroll
          for (int j = 0; j < Columns; j++) sums.v[i][j] = fmaf(left[i], right[j], sums.v[i][j]);
        }
      }
    }
    cpAsyncWait<0>();
  }
};

/// bf16 on tensor cores. Each warp computes WM x WN elements, half of its columns in each half of the tile. ld of both
/// operands is a multiple of 8; where k is contiguous in memory, rows are padded with zeros to a multiple of 8.
template <int BM_, int BN_, int WM, int WN>
struct TileBf16 {
  using Element = bf16;
  static constexpr int BM = BM_, BN = BN_, BK = 32, Stages = 4, Threads = BM / WM * (BN / WN) * 32;
  static constexpr int Rows = WM / 8, Columns = WN / 4, Run = 2, RowLanes = 4, RowWarps = BN / WN;
  static constexpr int stageSize = (BM + BN) * BK, sharedBytes = Stages * stageSize * 2;
  static constexpr int MT = WM / 16, NT = WN / 8; // mma tiles of 16 x 8 per warp

  struct Accumulator {
    float v[MT][NT][4];
  };
  MOE_DEVICE float& at(Accumulator& sums, int i, int j) { return sums.v[i / 2][j / 2][i % 2 * 2 + j % 2]; }
  MOE_DEVICE int warpRow() { return threadIdx.x / 32 / RowWarps * WM; }
  /// The warp's first column in each half of the tile.
  MOE_DEVICE int warpColumn() { return threadIdx.x / 32 % RowWarps * (WN / 2); }
  MOE_DEVICE int row(int i) { return warpRow() + i * 8 + threadIdx.x % 32 / 4; }
  MOE_DEVICE int step(int j) {
    constexpr int Half = Columns / 2;
    return j / Half * (BN / 2) + j % Half / 2 * 8 + j % 2;
  }
  MOE_DEVICE int column(int j) { return warpColumn() + threadIdx.x % 4 * 2 + step(j); }

  /// The tile in shared memory is [o][k], or [k][o] if Strided.
  template <int B, bool Strided>
  MOE_DEVICE void copy(bf16* tile, Operand<bf16> x, int k0, int k) {
    if (Strided) copyTile<BK, B, Threads>(tile, x.data + k0 * x.ld, x.ld, k - k0, x.outer);
    else copyTile<B, BK, Threads>(tile, x.data + k0, x.ld, x.outer, k - k0);
  }
  template <int B, bool Strided>
  MOE_DEVICE void copy(bf16* tile, Halves<bf16> x, int k0, int k) {
    static_assert(!Strided, "k runs along memory");
    copy<B / 2, false>(tile, Operand<bf16>{x.first, x.ld, x.outer}, k0, k);
    copy<B / 2, false>(tile + B / 2 * BK, Operand<bf16>{x.second, x.ld, x.outer}, k0, k);
  }

  /// sums += a b over k.
  template <bool TransposeA, bool TransposeB, class Right = Operand<bf16>>
  MOE_DEVICE void multiply(Accumulator& sums, unsigned char* shared, Operand<bf16> a, Right b, int k) {
    constexpr int WA = TransposeA ? BM : BK, WB = TransposeB ? BK : BN;
    bf16* const stages = (bf16*)shared;
    const int steps = divUp(k, BK);
    if (steps <= 0) return;
    auto copyStep = [&](int t) {
      if (t < steps) {
        bf16* const stage = stages + t % Stages * stageSize;
        copy<BM, TransposeA>(stage, a, t * BK, k);
        copy<BN, !TransposeB>(stage + BM * BK, b, t * BK, k);
      }
      cpAsyncCommit();
    };
    // Fragments are double-buffered: those of the next 16 k are loaded while the current ones are multiplied.
    uint32_t left[2][MT][4], right[2][NT / 2][4];
    auto load = [&](int buffer, int t, int k16) {
      const bf16* const stage = stages + t % Stages * stageSize;
#pragma unroll
      for (int i = 0; i < MT; i++) loadA<WA, TransposeA>(left[buffer][i], stage, warpRow() + i * 16, k16);
#pragma unroll
      for (int j = 0; j < NT / 2; j++) {
        const int o = j / (NT / 4) * (BN / 2) + warpColumn() + j % (NT / 4) * 16;
        loadB<WB, !TransposeB>(right[buffer][j], stage + BM * BK, o, k16);
      }
    };
    auto product = [&](int buffer) {
#pragma unroll
      for (int i = 0; i < MT; i++) {
#pragma unroll
        for (int j = 0; j < NT; j++) {
          const uint32_t(&r)[4] = right[buffer][j / 2];
          mmaBf16(sums.v[i][j], left[buffer][i], r[j % 2 * 2], r[j % 2 * 2 + 1]);
        }
      }
    };
    for (int t = 0; t < Stages - 1; t++) copyStep(t);
    cpAsyncWait<Stages - 2>();
    __syncthreads();
    load(0, 0, 0);
    for (int t = 0; t < steps; t++) {
      load(1, t, 16);
      copyStep(t + Stages - 1); // overwrites the stage that all threads had finished reading at the last barrier
      product(0);
      cpAsyncWait<Stages - 2>();
      __syncthreads();
      if (t + 1 < steps) load(0, t + 1, 0);
      product(1);
    }
    cpAsyncWait<0>();
  }
};

using F32Large = TileF32<128, 128>;
using F32Small = TileF32<64, 64>;
using Bf16Large = TileBf16<128, 256, 64, 64>;
using Bf16Medium = TileBf16<128, 128, 64, 64>;
using Bf16Small = TileBf16<64, 64, 32, 32>;

/// Rasterization: the tile (row, column) of block number `block`. Blocks go down bands of 8 rows of tiles, column by
/// column, so that blocks that run at the same time share operands in the L2 cache.
MOE_DEVICE int2 rasterize(int block, int rows, int columns) {
  const int band = block / (8 * columns) * 8;
  const int height = rows - band < 8 ? rows - band : 8;
  const int within = block % (8 * columns);
  return make_int2(band + within % height, within / height);
}

/// Calls f(at, i, j, left) for each run of neighbours of this thread, starting at column j of row i: `at` is its
/// address in c, `left` the number of columns that exist from there on. Whole: all exist.
template <class Tile, bool Whole, class F>
MOE_DEVICE void eachRun(float* c, int64_t ld, int rows, int columns, F f) {
  const int left = columns - Tile::column(0);
#pragma unroll
  for (int i = 0; i < Tile::Rows; i++) {
    if (Tile::row(i) >= rows) continue;
    float* const first = c + Tile::row(i) * ld + Tile::column(0);
#pragma unroll
    for (int j = 0; j < Tile::Columns; j += Tile::Run) {
      if (Whole || Tile::step(j) < left) f(first + Tile::step(j), i, j, left - Tile::step(j));
    }
  }
}

/// The first of four neighbouring columns that this lane stores (after an exchange, if runs are pairs), of those that
/// start with the tile's column 0. For those that start with column j, add step(j).
template <class Tile>
MOE_DEVICE int firstOfFour() {
  static_assert(Tile::Run == 4 || Tile::Columns % 4 == 0, "fours, or pairs eight columns apart");
  return Tile::Run == 4 ? Tile::column(0) : Tile::column(0) - threadIdx.x % 4 * 2 + gatheredColumn();
}

/// sums += the tile of c.
template <class Tile, bool Whole>
MOE_DEVICE void addRuns(float* c, int64_t ld, int rows, int columns, typename Tile::Accumulator& sums) {
  const auto at = [&](int i, int j) -> float& { return Tile::at(sums, i, j); };
  eachRun<Tile, Whole>(c, ld, rows, columns, [&](const float* from, int i, int j, int) {
    if constexpr (Tile::Run == 2) {
      const float2 x = *(const float2*)from;
      at(i, j) += x.x, at(i, j + 1) += x.y;
    } else {
      const float4 x = *(const float4*)from;
      at(i, j) += x.x, at(i, j + 1) += x.y, at(i, j + 2) += x.z, at(i, j + 3) += x.w;
    }
  });
  __syncwarp(); // a lane may store what another lane has read
}

/// storeTile if groups of four columns are aligned and never cut off.
template <class Tile>
MOE_DEVICE void storeFours(float* c, int64_t ld, int rows, int columns, typename Tile::Accumulator& sums) {
  const auto at = [&](int i, int j) -> float& { return Tile::at(sums, i, j); };
  float* const to = c + firstOfFour<Tile>();
#pragma unroll
  for (int j = 0; j < Tile::Columns; j += 4) {
#pragma unroll
    for (int i = 0; i < Tile::Rows; i++) {
      const int left = Tile::row(i) < rows ? columns - firstOfFour<Tile>() : 0;
      float4 x = make_float4(at(i, j), at(i, j + 1), at(i, j + 2), at(i, j + 3));
      if constexpr (Tile::Run == 2) x = gatherFour(x.x, x.y, x.z, x.w);
      storeWideIf(Tile::step(j) < left, to + Tile::row(i) * ld + Tile::step(j), x.x, x.y, x.z, x.w);
    }
  }
}

/// The epilogue that writes the tile to c, or adds it, if `rows` rows and `columns` columns exist from here on. Uniform
/// conditions are tested outside of the loops, where they would cost a branch per store. A tile that is added to is
/// read completely first; otherwise each load would wait for the store before it.
template <class Tile>
MOE_DEVICE void storeTile(float* c, int64_t ld, int rows, int columns, typename Tile::Accumulator& sums, bool add) {
  if (ld % 4 == 0) {
    if (add && columns >= Tile::BN) addRuns<Tile, true>(c, ld, rows, columns, sums);
    else if (add) addRuns<Tile, false>(c, ld, rows, columns, sums);
    return storeFours<Tile>(c, ld, rows, columns, sums);
  }
  const auto eachElement = [&](auto f) {
    eachRun<Tile, false>(c, ld, rows, columns, [&](float* run, int i, int j, int left) {
#pragma unroll
      for (int r = 0; r < Tile::Run; r++) {
        if (r < left) f(run[r], Tile::at(sums, i, j + r));
      }
    });
  };
  if (add) eachElement([](const float& from, float& x) { x += from; });
  eachElement([](float& to, float x) { to = x; });
}
