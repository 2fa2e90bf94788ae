// Matrix products: one block computes one tile of c = a b with one of the two engines below, which have the same interface:
//   Element, BM, BN, BK, Threads, sharedBytes   operand type, sizes of the tile, of a step along k, of the block, of its dynamic shared memory
//   Sums                                        this thread's part of the tile: Rows x Columns elements
//   row(i), column(j), at(sums, i, j)           where they lie; columns come in runs of Run neighbours; of tiles in bf16 column(j + Columns / 2) is
//                                               column(j) + BN / 2, so that a thread has both where two operands have half of the columns each
//   step(j)                                     column(j) - column(0), the same for all threads
//   RowLanes, RowWarps                          a row is shared by RowLanes lanes (differing in the lowest bits) of RowWarps warps
//   multiply<TransposeA, TransposeB>(...)       the main loop
// What becomes of the tile (stored, reduced to a softmax) is the kernel's business. gemm-hopper.cuh has a third one, with another main loop.
// Legend: o, k as in tile.cuh; a is [m, k] ([k, m] when transposed), b is [k, n] ([n, k] when transposed).
#pragma once
#include "tile.cuh"
#include "wide.cuh"

/// An operand from its first outer index and first k on. `outer` outer indices exist; ld elements lie between rows of memory.
template <class T>
struct Operand {
  const T* data;
  int64_t ld;
  int outer;
};

/// Two right operands alike: the first has one half of a tile's columns, the second the other.
template <class T>
struct Halves {
  const T *first, *second;
  int64_t ld;
  int outer;
};

/// f32 on the ordinary cores. 16 x 16 threads, each with (BM / 16) x (BN / 16) elements in runs of 4.
template <int BM_, int BN_>
struct TileF32 {
  using Element = float;
  static constexpr int BM = BM_, BN = BN_, BK = 16, Stages = 3, Threads = 256;
  static constexpr int Rows = BM / 16, Columns = BN / 16, Run = 4, RowLanes = 16, RowWarps = 1;
  // A tile in shared memory is [k][o]; four more elements a row spread the transposing stores over the banks.
  static constexpr int LA = BM + 4, LB = BN + 4, stageSize = BK * (LA + LB);
  static constexpr int sharedBytes = Stages * stageSize * 4;

  struct Sums {
    float v[Rows][Columns];
  };
  MOE_DEVICE float& at(Sums& sums, int i, int j) { return sums.v[i][j]; }
  MOE_DEVICE int row(int i) { return i / 4 * 64 + threadIdx.x / 16 * 4 + i % 4; }
  MOE_DEVICE int step(int j) { return j / 4 * 64 + j % 4; }
  MOE_DEVICE int column(int j) { return threadIdx.x % 16 * 4 + step(j); }

  /// k runs along memory unless Strided.
  template <int B, bool Strided>
  MOE_DEVICE void copy(float* tile, Operand<float> x, int k0, int k) {
    constexpr int along = Strided ? B : BK, perStep = Threads / along; // neighbouring threads copy neighbours in memory
    const int inner = threadIdx.x % along, outer = threadIdx.x / along;
    const int o = Strided ? inner : outer, kk = Strided ? outer : inner;
    float* const to = tile + kk * (B + 4) + o;
    const float* from = x.data + (Strided ? (k0 + kk) * x.ld + o : o * x.ld + k0 + kk);
    int left = Strided ? k - k0 - kk : x.outer - o;
    if (Strided ? o >= x.outer : k0 + kk >= k) left = 0;
#pragma unroll
    for (int step = 0; step < B * BK / Threads; step++, from += perStep * x.ld) {
      copyAsync4(to + step * perStep * (Strided ? B + 4 : 1), from, step * perStep < left);
    }
  }

  /// sums += a b over k.
  template <bool TransposeA, bool TransposeB>
  MOE_DEVICE void multiply(Sums& sums, unsigned char* shared, Operand<float> a, Operand<float> b, int k) {
    float* const stages = (float*)shared;
    const int steps = divUp(k, BK);
    auto copyStep = [&](int t) {
      if (t < steps) {
        float* const stage = stages + t % Stages * stageSize;
        copy<BM, TransposeA>(stage, a, t * BK, k);
        copy<BN, !TransposeB>(stage + BK * LA, b, t * BK, k);
      }
      commitCopies();
    };
    for (int t = 0; t < Stages - 1; t++) copyStep(t);
    for (int t = 0; t < steps; t++) {
      waitCopies<Stages - 2>();
      __syncthreads();
      copyStep(t + Stages - 1); // over the tile that all threads have left behind
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
    waitCopies<0>();
  }
};

/// bf16 on tensor cores. Each warp has WM x WN elements of the tile, half of the columns in each half of it. ld of both operands is a multiple of 8, and where k runs along
/// memory, rows are padded with zeros to one.
template <int BM_, int BN_, int WM, int WN>
struct TileBf16 {
  using Element = bf16;
  static constexpr int BM = BM_, BN = BN_, BK = 32, Stages = 4, Threads = BM / WM * (BN / WN) * 32;
  static constexpr int Rows = WM / 8, Columns = WN / 4, Run = 2, RowLanes = 4, RowWarps = BN / WN;
  static constexpr int stageSize = (BM + BN) * BK, sharedBytes = Stages * stageSize * 2;
  static constexpr int MT = WM / 16, NT = WN / 8; // products of 16 x 8 in a warp's tile

  struct Sums {
    float v[MT][NT][4];
  };
  MOE_DEVICE float& at(Sums& sums, int i, int j) { return sums.v[i / 2][j / 2][i % 2 * 2 + j % 2]; }
  MOE_DEVICE int warpRow() { return threadIdx.x / 32 / RowWarps * WM; }
  /// Of both halves.
  MOE_DEVICE int warpColumn() { return threadIdx.x / 32 % RowWarps * (WN / 2); }
  MOE_DEVICE int row(int i) { return warpRow() + i * 8 + threadIdx.x % 32 / 4; }
  MOE_DEVICE int step(int j) {
    constexpr int Half = Columns / 2;
    return j / Half * (BN / 2) + j % Half / 2 * 8 + j % 2;
  }
  MOE_DEVICE int column(int j) { return warpColumn() + threadIdx.x % 4 * 2 + step(j); }

  /// The tile is [o][k], or [k][o] when Strided.
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
  MOE_DEVICE void multiply(Sums& sums, unsigned char* shared, Operand<bf16> a, Right b, int k) {
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
      commitCopies();
    };
    // Fragments of the next 16 of k are on their way while those before are multiplied.
    uint32_t left[2][MT][4], right[2][NT / 2][4];
    auto load = [&](int buffer, int t, int k16) {
      const bf16* const stage = stages + t % Stages * stageSize;
#pragma unroll
      for (int i = 0; i < MT; i++) loadLeft<WA, TransposeA>(left[buffer][i], stage, warpRow() + i * 16, k16);
#pragma unroll
      for (int j = 0; j < NT / 2; j++) {
        const int o = j / (NT / 4) * (BN / 2) + warpColumn() + j % (NT / 4) * 16;
        loadRight<WB, !TransposeB>(right[buffer][j], stage + BM * BK, o, k16);
      }
    };
    auto product = [&](int buffer) {
#pragma unroll
      for (int i = 0; i < MT; i++) {
#pragma unroll
        for (int j = 0; j < NT; j++) {
          const uint32_t(&r)[4] = right[buffer][j / 2];
          multiplyBf16(sums.v[i][j], left[buffer][i], r[j % 2 * 2], r[j % 2 * 2 + 1]);
        }
      }
    };
    for (int t = 0; t < Stages - 1; t++) copyStep(t);
    waitCopies<Stages - 2>();
    __syncthreads();
    load(0, 0, 0);
    for (int t = 0; t < steps; t++) {
      load(1, t, 16);
      copyStep(t + Stages - 1); // over the tile that all threads left behind before the last barrier
      product(0);
      waitCopies<Stages - 2>();
      __syncthreads();
      if (t + 1 < steps) load(0, t + 1, 0);
      product(1);
    }
    waitCopies<0>();
  }
};

using F32Large = TileF32<128, 128>;
using F32Small = TileF32<64, 64>;
using Bf16Large = TileBf16<128, 256, 64, 64>;
using Bf16Medium = TileBf16<128, 128, 64, 64>;
using Bf16Small = TileBf16<64, 64, 32, 32>;

/// Row and column of tiles for block number `block`: down a column of 8 tiles, then the next column, so that blocks that run at the
/// same time share operands in the L2 cache.
MOE_DEVICE int2 tileOf(int block, int rows, int columns) {
  const int band = block / (8 * columns) * 8;
  const int height = rows - band < 8 ? rows - band : 8;
  const int within = block % (8 * columns);
  return make_int2(band + within % height, within / height);
}

/// f(at, i, j, left) for this thread's runs of neighbours, from column j of row i on: `at` is their place in c, `left` how many columns exist from there on (Whole: all).
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

/// Where the four columns begin that a lane has then, of those that begin with the tile's column 0; of those that begin with column j it is step(j) further.
template <class Tile>
MOE_DEVICE int firstOfFour() {
  static_assert(Tile::Run == 4 || Tile::Columns % 4 == 0, "fours, or pairs eight columns apart");
  return Tile::Run == 4 ? Tile::column(0) : Tile::column(0) - threadIdx.x % 4 * 2 + gatheredColumn();
}

/// sums += the tile of c.
template <class Tile, bool Whole>
MOE_DEVICE void addRuns(float* c, int64_t ld, int rows, int columns, typename Tile::Sums& sums) {
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
  __syncwarp(); // what one lane has read another may store
}

/// storeTile where four columns are aligned and never cut.
template <class Tile>
MOE_DEVICE void storeFours(float* c, int64_t ld, int rows, int columns, typename Tile::Sums& sums) {
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

/// Writes (or adds) the tile to c, of which `rows` rows and `columns` columns exist from here on. What is the same for all is asked first: in the loops it would be a
/// branch at every store, and a tile that is added is read whole before, or each load would wait for the store before it.
template <class Tile>
MOE_DEVICE void storeTile(float* c, int64_t ld, int rows, int columns, typename Tile::Sums& sums, bool add) {
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
