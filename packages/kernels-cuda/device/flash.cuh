// Flash attention: two engines with the same interface, for which attention.cu is written once.
//   BM rows against BN columns; DK features of queries and keys, DV of values; Threads per block; scratchBytes of shared memory; Element in global memory
//   Scores                            a BM x BN tile; this thread holds Rows x Columns of it, at row(i), column(j)
//   Accumulator<D>                    a BM x D tile; this thread holds the same rows, and columns outputColumn<D>(j), j < outputColumns<D>, in runs of Run;
//                                     outputColumn<D>(j) is outputColumn<D>(0) + columnStep(j), and columnStep is the same for all threads
//   copyRows<Count, D>(...)           starts the asynchronous copy of Count rows of D features to shared memory (tileSize<Count, D> elements)
//   dot<D>(scores, x, y)              scores += x y^T; x has BM rows, y has BN rows
//   add<D>(sums, scores, y, scratch)  sums += scores y; y has BN rows; scores are rounded to Element
//   exponential(x)                    e^(x / Unit): 2^x if Unit = log2(e)
// A row is shared by RowLanes lanes, which differ in the lowest bits of their index. A warp never needs rows of another
// warp.
#pragma once
#include "tile.cuh"
#include "wide.cuh"

/// bf16 on tensor cores (mma.m16n8k16). `Warps` warps with MT x 16 rows each. Features are padded with zeros to DK and
/// DV (multiples of 64) in global memory.
template <int Warps, int MT, int BN_, int DK_, int DV_>
struct FlashBf16 {
  using Element = bf16;
  static constexpr int BM = Warps * MT * 16, BN = BN_, DK = DK_, DV = DV_, Threads = Warps * 32, Stages = 2;
  static constexpr int NT = BN / 8, Rows = MT * 2, Columns = NT * 2, RowLanes = 4, Run = 2;
  static constexpr int scratchBytes = 0;
  static constexpr float Unit = 1.4426950408889634f;
  MOE_DEVICE float exponential(float x) { return exp2Fast(x); }

  struct Scores {
    float v[MT][NT][4];
  };
  template <int D>
  struct Accumulator {
    float v[MT][D / 8][4];
  };
  MOE_DEVICE float& at(Scores& s, int i, int j) { return s.v[i / 2][j / 2][i % 2 * 2 + j % 2]; }
  template <int D>
  MOE_DEVICE float& at(Accumulator<D>& s, int i, int j) { return s.v[i / 2][j / 2][i % 2 * 2 + j % 2]; }
  MOE_DEVICE int row(int i) { return threadIdx.x / 32 * (MT * 16) + i * 8 + threadIdx.x % 32 / 4; }
  MOE_DEVICE int columnStep(int j) { return j / 2 * 8 + j % 2; }
  MOE_DEVICE int column(int j) { return threadIdx.x % 4 * 2 + columnStep(j); }
  template <int D>
  static constexpr int outputColumns = D / 4;
  template <int D>
  MOE_DEVICE int outputColumn(int j) { return column(j); }

  template <int Count, int D>
  static constexpr int tileSize = Count * D;
  template <int Count, int D>
  MOE_DEVICE void copyRows(bf16* tile, const bf16* from, int64_t ld, int rows, int) {
    copyTile<Count, D, Threads>(tile, from, ld, rows, D);
  }

  template <int D>
  MOE_DEVICE void dot(Scores& s, const bf16* x, const bf16* y) {
#pragma unroll 4
    for (int k = 0; k < D; k += 16) {
      uint32_t left[MT][4], right[4];
#pragma unroll
      for (int i = 0; i < MT; i++) loadA<D, false>(left[i], x, threadIdx.x / 32 * (MT * 16) + i * 16, k);
#pragma unroll
      for (int j = 0; j < NT; j += 2) {
        loadB<D, false>(right, y, j * 8, k);
#pragma unroll
        for (int i = 0; i < MT; i++) {
          mmaBf16(s.v[i][j], left[i], right[0], right[1]);
          mmaBf16(s.v[i][j + 1], left[i], right[2], right[3]);
        }
      }
    }
  }

  /// Two neighbouring accumulator blocks, rounded to bf16, are the A fragment of the next mma; the scores stay in
  /// registers.
  template <int D>
  MOE_DEVICE void add(Accumulator<D>& sums, Scores& s, const bf16* y, unsigned char*) {
#pragma unroll
    for (int k = 0; k < NT; k += 2) {
      uint32_t left[MT][4], right[4];
#pragma unroll
      for (int i = 0; i < MT; i++) {
        const float(&a)[4] = s.v[i][k], (&b)[4] = s.v[i][k + 1];
        left[i][0] = packBf16(a[0], a[1]);
        left[i][1] = packBf16(a[2], a[3]);
        left[i][2] = packBf16(b[0], b[1]);
        left[i][3] = packBf16(b[2], b[3]);
      }
#pragma unroll
      for (int j = 0; j < D / 8; j += 2) {
        loadB<D, true>(right, y, j * 8, k * 8);
#pragma unroll
        for (int i = 0; i < MT; i++) {
          mmaBf16(sums.v[i][j], left[i], right[0], right[1]);
          mmaBf16(sums.v[i][j + 1], left[i], right[2], right[3]);
        }
      }
    }
  }
};

/// f32 on CUDA cores: 16 x 16 threads with 2 rows each. Features are padded to DK and DV in shared memory only.
template <int DK_, int DV_>
struct FlashF32 {
  using Element = float;
  static constexpr int BM = 32, BN = 32, DK = DK_, DV = DV_, Threads = 256, Stages = 1;
  static constexpr int Rows = 2, Columns = 2, RowLanes = 16, Run = 4;
  static constexpr int LP = BN + 1, scratchBytes = BM * LP * 4;
  static constexpr float Unit = 1.f;
  MOE_DEVICE float exponential(float x) { return expf(x); }

  struct Scores {
    float v[Rows][Columns];
  };
  template <int D>
  struct Accumulator {
    float v[Rows][D / 16];
  };
  MOE_DEVICE float& at(Scores& s, int i, int j) { return s.v[i][j]; }
  template <int D>
  MOE_DEVICE float& at(Accumulator<D>& s, int i, int j) { return s.v[i][j]; }
  MOE_DEVICE int row(int i) { return threadIdx.x / 16 * 2 + i; }
  MOE_DEVICE int column(int j) { return threadIdx.x % 16 + j * 16; }
  template <int D>
  static constexpr int outputColumns = D / 16;
  template <int D>
  MOE_DEVICE int outputColumn(int j) { return threadIdx.x % 16 * 4 + columnStep(j); }
  MOE_DEVICE int columnStep(int j) { return j / 4 * 64 + j % 4; }

  /// Rows are padded by four elements, so that the same feature of eight rows is in different banks.
  template <int Count, int D>
  static constexpr int tileSize = Count * (D + 4);
  template <int Count, int D>
  MOE_DEVICE void copyRows(float* tile, const float* from, int64_t ld, int rows, int features) {
    if (features % 4 == 0) copyVectors<Count, D, 4>(tile, from, ld, rows, features);
    else copyVectors<Count, D, 1>(tile, from, ld, rows, features);
  }
  /// Neighbouring threads copy 64 features of a row at a time, Width each, so each thread needs only one address and one
  /// stride.
  template <int Count, int D, int Width>
  MOE_DEVICE void copyVectors(float* tile, const float* from, int64_t ld, int rows, int features) {
    constexpr int line = 64, lanes = line / Width, rowsPerStep = Threads / lanes;
    static_assert(Count % rowsPerStep == 0 && D % line == 0, "every thread copies as much");
    const int row = threadIdx.x / lanes, feature = threadIdx.x % lanes * Width;
    tile += row * (D + 4) + feature;
    from += row * ld + feature;
#pragma unroll(Width == 4 ? Count / rowsPerStep : 1)
    for (int step = 0; step < Count; step += rowsPerStep, from += rowsPerStep * ld) {
#pragma unroll
      for (int at = 0; at < D; at += line) {
        const bool valid = step + row < rows && at + feature < features;
        if constexpr (Width == 4) cpAsync16(tile + step * (D + 4) + at, from + at, valid);
        else cpAsync4(tile + step * (D + 4) + at, from + at, valid);
      }
    }
  }

  template <int D>
  MOE_DEVICE void dot(Scores& s, const float* x, const float* y) {
#pragma unroll 4
    for (int d = 0; d < D; d += 4) {
      float4 left[Rows], right[Columns];
#pragma unroll
      for (int i = 0; i < Rows; i++) left[i] = *(const float4*)(x + row(i) * (D + 4) + d);
#pragma unroll
      for (int j = 0; j < Columns; j++) right[j] = *(const float4*)(y + column(j) * (D + 4) + d);
#pragma unroll
      for (int i = 0; i < Rows; i++) {
#pragma unroll
        for (int j = 0; j < Columns; j++) {
          float sum = fmaf(left[i].x, right[j].x, s.v[i][j]);
          sum = fmaf(left[i].y, right[j].y, sum);
          sum = fmaf(left[i].z, right[j].z, sum);
          s.v[i][j] = fmaf(left[i].w, right[j].w, sum);
        }
      }
    }
  }

  /// The scores of a row are exchanged among the lanes that share it through `scratch` in shared memory.
  template <int D>
  MOE_DEVICE void add(Accumulator<D>& sums, Scores& s, const float* y, unsigned char* scratch) {
    float* const rows = (float*)scratch + threadIdx.x / 16 * 2 * LP;
    __syncwarp();
#pragma unroll
    for (int i = 0; i < Rows; i++) {
#pragma unroll
      for (int j = 0; j < Columns; j++) rows[i * LP + column(j)] = s.v[i][j];
    }
    __syncwarp();
#pragma unroll 4
    for (int k = 0; k < BN; k++) {
      float left[Rows];
#pragma unroll
      for (int i = 0; i < Rows; i++) left[i] = rows[i * LP + k];
#pragma unroll
      for (int j = 0; j < D / 16; j += 4) {
        const float4 right = *(const float4*)(y + k * (D + 4) + outputColumn<D>(j));
#pragma unroll
        for (int i = 0; i < Rows; i++) {
          sums.v[i][j] = fmaf(left[i], right.x, sums.v[i][j]);
          sums.v[i][j + 1] = fmaf(left[i], right.y, sums.v[i][j + 1]);
          sums.v[i][j + 2] = fmaf(left[i], right.z, sums.v[i][j + 2]);
          sums.v[i][j + 3] = fmaf(left[i], right.w, sums.v[i][j + 3]);
        }
      }
    }
  }
};

/// storeRow if `left` features exist from this thread's first one on. Whole: all exist. Runs: runs are aligned and
/// never cut off.
template <class Engine, int D, bool Runs, bool Whole>
MOE_DEVICE void storeRuns(float* to, typename Engine::template Accumulator<D>& sums, int i, int left, float factor) {
  constexpr int Run = Engine::Run;
#pragma unroll
  for (int j = 0; j < Engine::template outputColumns<D>; j += Run) {
    const int step = Engine::columnStep(j);
    const auto x = [&](int r) { return Engine::template at<D>(sums, i, j + r) * factor; };
    if constexpr (!Runs) {
#pragma unroll
      for (int r = 0; r < Run; r++) {
        if (step + r < left) to[step + r] = x(r);
      }
    } else if (Whole || step < left) {
      if constexpr (Run == 2) storeWide(to + step, x(0), x(1));
      else storeWide(to + step, x(0), x(1), x(2), x(3));
    }
  }
}
/// Writes row i of `sums` times `factor` to `features` features, starting at `to`.
template <class Engine, int D>
MOE_DEVICE void storeRow(float* to, typename Engine::template Accumulator<D>& sums, int i, int features, float factor) {
  const int first = Engine::template outputColumn<D>(0);
  if (features >= D) storeRuns<Engine, D, true, true>(to + first, sums, i, D, factor);
  else if (features % Engine::Run == 0) storeRuns<Engine, D, true, false>(to + first, sums, i, features - first, factor);
  else storeRuns<Engine, D, false, false>(to + first, sums, i, features - first, factor);
}

/// Reductions over the lanes that share a row.
template <class Engine>
MOE_DEVICE float rowMax(float x) {
  return joinLanes<Max>(x, Engine::RowLanes);
}
template <class Engine>
MOE_DEVICE float rowSum(float x) {
  return joinLanes<Sum>(x, Engine::RowLanes);
}

/// The causal mask and the length of a sequence: query t may attend to keys below keys(t), starting with its first one
/// (Starts).
struct Visible {
  int T, limit;
  bool causal;
  MOE_DEVICE Visible of(int T, int S, const int* lengths, int b, int causal) {
    const int limit = lengths ? min(max(lengths[b], 0), S) : S;
    return {T, limit, causal != 0};
  }
  __device__ __forceinline__ int keys(int t) const { return causal ? min(limit, max(0, limit - T + t + 1)) : limit; }
  /// The first query that attends to key j (which is below the limit).
  __device__ __forceinline__ int firstQuery(int j) const { return causal ? max(0, j - limit + T) : 0; }
};

/// The first key of each of T queries, for packed sequences. Without HasStarts it is 0, at no cost.
template <bool HasStarts>
struct Starts {
  const int* starts;
  int T;
  MOE_DEVICE Starts of(const int* starts, int T, int b) { return {HasStarts ? starts + (int64_t)b * T : nullptr, T}; }
  __device__ __forceinline__ int from(int t) const { return HasStarts && t < T ? max(starts[t], 0) : 0; }

  /// The least and the greatest first key of `count` queries from t on. The same in all warps.
  struct Range {
    int least, most;
  };
  __device__ __forceinline__ Range range(int t, int count) const {
    if constexpr (!HasStarts) return {0, 0};
    int least = 0x7fffffff, most = 0;
    for (int i = threadIdx.x % 32; i < count; i += 32) {
      const int key = from(min(t + i, T - 1));
      least = min(least, key), most = max(most, key);
    }
    for (int step = 16; step > 0; step /= 2) {
      least = min(least, __shfl_xor_sync(wholeWarp, least, step));
      most = max(most, __shfl_xor_sync(wholeWarp, most, step));
    }
    return {least, most};
  }
  /// True if the first key of any of `count` queries from t on is after key j. Called by whole warps.
  __device__ __forceinline__ bool anyBehind(int t, int count, int j) const {
    if constexpr (!HasStarts) return false;
    bool behind = false;
    for (int i = threadIdx.x % 32; i < count; i += 32) behind |= from(t + i) > j;
    return __any_sync(wholeWarp, behind);
  }
  /// One past the last query, from t on, whose first key is before key j. Called once, by all `Threads` threads of the
  /// block.
  template <int Threads>
  __device__ __forceinline__ int endOfQueries(int t, int j) const {
    if constexpr (!HasStarts) return T;
    MOE_SHARED(int, end, [1]);
    if (threadIdx.x == 0) end[0] = 0;
    __syncthreads();
    int mine = 0;
    for (int i = t + threadIdx.x; i < T; i += Threads) mine = from(i) < j ? i + 1 : mine;
    atomicMax(&end[0], mine);
    __syncthreads();
    return end[0];
  }
};

/// Online softmax over tiles of keys: the running maximum and sum of each of this thread's rows, in units of
/// Engine::Unit.
template <class Engine>
struct OnlineSoftmax {
  float highest[Engine::Rows], total[Engine::Rows];

  MOE_DEVICE void begin(OnlineSoftmax& m) {
#pragma unroll
    for (int i = 0; i < Engine::Rows; i++) m.highest[i] = -infinity(), m.total[i] = 0.f;
  }

  /// The factors for everything accumulated before a new maximum, and whether any of them differs from 1.
  struct Shrink {
    float factor[Engine::Rows];
    bool grown;
  };

  /// Replaces scores (-infinity where masked) times a positive scale by exponentials relative to the running maximum.
  /// The scale costs nothing: one fused multiply-add applies it and subtracts the maximum.
  MOE_DEVICE Shrink exponentials(OnlineSoftmax& m, typename Engine::Scores& s, float scale = 1.f) {
    Shrink shrink;
    shrink.grown = false;
#pragma unroll
    for (int i = 0; i < Engine::Rows; i++) {
      float high = -infinity();
#pragma unroll
      for (int j = 0; j < Engine::Columns; j++) high = fmaxf(high, Engine::at(s, i, j));
      high = fmaxf(m.highest[i], rowMax<Engine>(high) * scale);
      const float base = high == -infinity() ? 0.f : high;
      shrink.factor[i] = Engine::exponential(m.highest[i] - base);
      shrink.grown = shrink.grown || high != m.highest[i];
      m.highest[i] = high;
      float sum = 0.f;
#pragma unroll
      for (int j = 0; j < Engine::Columns; j++) {
        float& p = Engine::at(s, i, j);
        p = Engine::exponential(fmaf(p, scale, -base));
        sum += p;
      }
      m.total[i] = m.total[i] * shrink.factor[i] + sum;
    }
    return shrink;
  }

  /// Rescales accumulators to the new maximum.
  template <int D>
  MOE_DEVICE void apply(const Shrink& shrink, typename Engine::template Accumulator<D>& sums) {
    if (!__any_sync(wholeWarp, shrink.grown)) return;
#pragma unroll
    for (int i = 0; i < Engine::Rows; i++) {
#pragma unroll
      for (int j = 0; j < Engine::template outputColumns<D>; j++) Engine::template at<D>(sums, i, j) *= shrink.factor[i];
    }
  }

  /// Returns the factor that normalizes row i of the accumulator; `lse` is set to the row's log-sum-exp.
  MOE_DEVICE float finish(OnlineSoftmax& m, int i, float& lse) {
    const float total = rowSum<Engine>(m.total[i]);
    lse = total == 0.f ? -infinity() : m.highest[i] * (1.f / Engine::Unit) + logf(total);
    return total == 0.f ? 0.f : 1.f / total;
  }
};
