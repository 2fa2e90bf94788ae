// Products with quantized weights, dense and per expert. With few rows, kernels decode the weight in registers, so that
// reading the stored weight is the only cost. With more rows, the weight is expanded to f32 or bf16 for the kernels of
// gemm.cuh.
// Legend: M rows of x [M, K] and y [M, N]; weight [E, N, K] with E experts (1 if dense); scales [E, ceil(N / BN),
// ceil(K / BK)]; `offsets` is null if dense. Whole: K is a multiple of 8, and so is BK if there are scales.
#include "few-rows.cuh"
#include "stored.cuh"
#include "tensor-core.cuh"

/// Rows row .. row + count - 1 belong to `expert`. expert = E stands for the rows after the last expert's, count = 0
/// for a group without work.
struct Rows {
  int expert, row, count;
};

/// Group number `group`, with mostFewRows rows, if every expert's rows, and those after the last expert's, start a new
/// group. All threads of a block get the same result.
MOE_DEVICE Rows rowsOfGroup(const int* offsets, int E, int M, int group) {
  if (offsets == nullptr) return {0, 0, M};
  const int lane = threadIdx.x % 32;
  for (int first = 0; first <= E; first += 32) {
    const int e = first + lane;
    const int from = e <= E ? offsets[e] : M, to = e < E ? offsets[e + 1] : M;
    const int own = divUp(to - from, mostFewRows);
    int end = own; // inclusive prefix sum: groups of experts first .. e
    for (int step = 1; step < 32; step *= 2) {
      const int before = __shfl_up_sync(wholeWarp, end, step);
      if (lane >= step) end += before;
    }
    const unsigned later = __ballot_sync(wholeWarp, group < end);
    if (later != 0) {
      const int row = from + (group - (end - own)) * mostFewRows, found = __ffs(later) - 1;
      return {first + found, __shfl_sync(wholeWarp, row, found), __shfl_sync(wholeWarp, min(to - row, mostFewRows), found)};
    }
    group -= __shfl_sync(wholeWarp, end, 31);
  }
  return {E, M, 0};
}

struct Sizes {
  int N, K, BN, BK;
};

/// Moves the pointers to the weight and the scales of an expert.
template <Format F>
MOE_DEVICE void moveToExpert(const unsigned char*& weight, const float*& scales, int expert, Sizes z) {
  weight += expert * (z.N * rowBytes<F>(z.K));
  if (F != Format::bf16) scales += (int64_t)expert * divUp(z.N, z.BN) * divUp(z.K, z.BK);
}

/// Zeroes columns n .. n + Columns - 1 of at most mostFewRows rows that belong to no expert.
template <int Columns>
MOE_DEVICE void storeZeros(float* y, int rows, int n, int N) {
  const int i = threadIdx.x / Columns, j = n + threadIdx.x % Columns;
  if (i < rows && j < N) y[(int64_t)i * N + j] = 0.f;
}

/// y [rows, 4 columns from n on] for at most R rows of x. Each thread takes 8 elements of K at a time, at as many
/// positions as make 16 bytes of each column (fewer if many rows need the registers). The threads' partial sums are
/// added in a fixed order.
template <Format F, bool Whole, int R>
MOE_DEVICE void fewRowsTimesStored(float (*parts)[32], float* y, const float* x, const unsigned char* weight, const float* scales, int rows, int n, Sizes z) {
  constexpr bool scaled = F != Format::bf16;
  constexpr int words = R > 1 && F == Format::int4 ? 2 : 4;
  constexpr int places = Whole && R < 8 ? words / Eight<F>::words : 1, step = 128 * 8;
  const int columns = min(z.N - n, 4), across = scaled ? divUp(z.K, z.BK) : 0;
  const int64_t bytes = rowBytes<F>(z.K);
  weight += n * bytes;
  int scaleRow[4] = {};
#pragma unroll
  for (int j = 0; j < 4 && scaled; j++) scaleRow[j] = min(n + j, z.N - 1) / z.BN * across;
  ScaleBlock block = ScaleBlock::of(threadIdx.x * 8, z.BK);
  const ScaleBlock stride = ScaleBlock::of(step, z.BK);

  float sums[R][4] = {};
  auto multiply = [&](const float (&w)[4][8], const float (&scale)[4], int at) {
#pragma unroll
    for (int i = 0; i < R; i++) {
      if (i >= rows) continue;
      const float* const from = x + (int64_t)i * z.K + at;
      alignas(16) float v[8];
      if (Whole) {
        *(float4*)v = *(const float4*)from;
        *(float4*)(v + 4) = *(const float4*)(from + 4);
      } else {
#pragma unroll
        for (int e = 0; e < 8; e++) v[e] = at + e < z.K ? from[e] : 0.f;
      }
#pragma unroll
      for (int j = 0; j < 4; j++) {
        float sum = scaled && Whole ? 0.f : sums[i][j];
#pragma unroll
        for (int e = 0; e < 8; e++) sum = fmaf(v[e], w[j][e], sum);
        sums[i][j] = scaled && Whole ? fmaf(sum, scale[j], sums[i][j]) : sum;
      }
    }
  };
#pragma unroll 1
  for (int first = threadIdx.x * 8; first < z.K; first += places * step) {
    float w[4][8], scale[places][4] = {};
    if constexpr (Whole) {
      Eight<F> raw[places][4] = {};
#pragma unroll
      for (int p = 0; p < places; p++) {
        const int at = first + p * step;
#pragma unroll
        for (int j = 0; j < 4; j++) {
          if (j >= columns || at >= z.K) continue;
          raw[p][j] = Eight<F>::load(weight + j * bytes, at);
          if (scaled) scale[p][j] = scales[scaleRow[j] + block.block];
        }
        if (scaled) block.advance(stride.block, stride.within);
      }
#pragma unroll
      for (int p = 0; p < places; p++) {
        if (first + p * step >= z.K) continue;
#pragma unroll
        for (int j = 0; j < 4; j++) raw[p][j].unpack(w[j]);
        multiply(w, scale[p], first + p * step);
      }
    } else {
#pragma unroll
      for (int j = 0; j < 4; j++) loadScaled<F>(w[j], weight + j * bytes, scales + scaleRow[j], block, first, j < columns ? z.K : 0);
      multiply(w, scale[0], first);
      block.advance(stride.block, stride.within);
    }
  }
#pragma unroll
  for (int i = 0; i < R; i++) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const float sum = warpSum(sums[i][j]);
      if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32][i * 4 + j] = sum;
    }
  }
  __syncthreads();
  const int i = threadIdx.x / 4, j = threadIdx.x % 4;
  if (i < rows && j < columns) {
    y[(int64_t)i * z.N + n + j] = parts[0][threadIdx.x] + parts[1][threadIdx.x] + parts[2][threadIdx.x] + parts[3][threadIdx.x];
  }
}

/// A block computes 4 columns (blockIdx.x) of a group of rows (blockIdx.y).
template <Format F, bool Whole>
MOE_DEVICE void fewRowsOfExperts(float* y, const float* x, const unsigned char* weight, const float* scales, const int* offsets, int M, int E, Sizes z) {
  MOE_SHARED(float, parts, [4][32]);
  const Rows group = rowsOfGroup(offsets, E, M, blockIdx.y);
  const int n = blockIdx.x * 4;
  y += (int64_t)group.row * z.N, x += (int64_t)group.row * z.K;
  if (group.expert >= E) return storeZeros<4>(y, group.count, n, z.N);
  moveToExpert<F>(weight, scales, group.expert, z);
  if (group.count <= 1) fewRowsTimesStored<F, Whole, 1>(parts, y, x, weight, scales, group.count, n, z);
  else if (Whole && group.count <= 4) fewRowsTimesStored<F, Whole, 4>(parts, y, x, weight, scales, group.count, n, z);
  else fewRowsTimesStored<F, Whole, 8>(parts, y, x, weight, scales, group.count, n, z);
}

/// Two values truncated to bf16: their upper halves.
MOE_DEVICE uint32_t packUpper(float low, float high) { return asBits(low) >> 16 | (asBits(high) & 0xffff0000u); }

/// The same on tensor cores, for more than about one row. A block computes 16 columns; each of its 8 warps has an
/// eighth of K. The weight, which bf16 represents exactly in every format, is the A operand, and x is B, whose columns
/// are the rows of x. `Terms` = 3 bf16 terms represent an f32 exactly. A lane has 8 neighbouring k, which the mma takes
/// for other k; this is correct because both operands agree. K and BK are multiples of 32.
template <Format F, int Terms>
MOE_DEVICE void fewRowsOnTensorCores(float* y, const float* x, const unsigned char* weight, const float* scales, const int* offsets, int M, int E, Sizes z) {
  constexpr bool scaled = F != Format::bf16;
  constexpr int places = 4 / Eight<F>::words, span = places * 32;
  MOE_SHARED(float, parts, [8][mostFewRows * 16]);
  const Rows group = rowsOfGroup(offsets, E, M, blockIdx.y);
  const int n = blockIdx.x * 16;
  y += (int64_t)group.row * z.N;
  if (group.expert >= E) return storeZeros<16>(y, group.count, n, z.N);
  moveToExpert<F>(weight, scales, group.expert, z);

  const int warp = threadIdx.x / 32, outer = threadIdx.x % 32 / 4, inner = threadIdx.x % 4;
  x += (int64_t)(group.row + min(outer, group.count - 1)) * z.K + inner * 8; // reads a row or column twice instead of one that does not exist
  const unsigned char* row[2];
  const float* scaleRow[2];
#pragma unroll
  for (int j = 0; j < 2; j++) {
    const int column = min(n + outer + j * 8, z.N - 1);
    row[j] = weight + column * rowBytes<F>(z.K);
    scaleRow[j] = scaled ? scales + (int64_t)(column / z.BN) * divUp(z.K, z.BK) : nullptr;
  }
  ScaleBlock block = ScaleBlock::of(warp * span, z.BK);
  const ScaleBlock stride = ScaleBlock::of(7 * span, z.BK);
  float sums[4] = {};
#pragma unroll 1
  for (int first = warp * span; first < z.K; first += 8 * span) {
    Eight<F> raw[places][2] = {};
    float scale[places][2] = {};
#pragma unroll
    for (int p = 0; p < places; p++) {
      const int at = first + p * 32;
      if (at >= z.K) continue;
#pragma unroll
      for (int j = 0; j < 2; j++) {
        raw[p][j] = Eight<F>::load(row[j], at + inner * 8);
        if (scaled) scale[p][j] = scaleRow[j][block.block];
      }
      block.advance(0, 32);
    }
    block.advance(stride.block, stride.within);
#pragma unroll
    for (int p = 0; p < places; p++) {
      const int at = first + p * 32;
      if (at >= z.K) continue;
      alignas(16) float v[8];
      *(float4*)v = *(const float4*)(x + at);
      *(float4*)(v + 4) = *(const float4*)(x + at + 4);
      uint32_t left[2][4], right[Terms][4];
#pragma unroll
      for (int j = 0; j < 2; j++) {
        float w[8];
        raw[p][j].unpack(w);
#pragma unroll
        for (int i = 0; i < 4; i++) left[i / 2][i % 2 * 2 + j] = packUpper(w[2 * i], w[2 * i + 1]);
      }
#pragma unroll
      for (int term = 0; term < Terms; term++) {
#pragma unroll
        for (int i = 0; i < 4; i++) right[term][i] = Terms == 1 ? packBf16(v[2 * i], v[2 * i + 1]) : packUpper(v[2 * i], v[2 * i + 1]);
#pragma unroll
        for (int i = 0; i < 8 && term + 1 < Terms; i++) {
          const float rest = v[i] - asFloat(asBits(v[i]) & 0xffff0000u);
          v[i] = term == 0 && fabsf(v[i]) == infinity() ? 0.f : rest;
        }
      }
      float product[4] = {};
#pragma unroll
      for (int term = Terms - 1; term >= 0; term--) { // smallest term first
        mmaBf16(scaled ? product : sums, left[0], right[term][0], right[term][1]);
        mmaBf16(scaled ? product : sums, left[1], right[term][2], right[term][3]);
      }
#pragma unroll
      for (int i = 0; i < 4 && scaled; i++) sums[i] = fmaf(product[i], scale[p][i / 2], sums[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < 4; i++) parts[warp][(inner * 2 + i % 2) * 16 + outer + i / 2 * 8] = sums[i];
  __syncthreads();
  const int i = threadIdx.x / 16, j = n + threadIdx.x % 16;
  if (i < group.count && j < z.N) {
    float sum = 0.f;
#pragma unroll
    for (int part = 0; part < 8; part++) sum += parts[part][threadIdx.x];
    y[(int64_t)i * z.N + j] = sum;
  }
}

MOE_DEVICE void storeEight(float* to, const float (&v)[8]) {
  *(float4*)to = make_float4(v[0], v[1], v[2], v[3]);
  *(float4*)(to + 4) = make_float4(v[4], v[5], v[6], v[7]);
}
MOE_DEVICE void storeEight(bf16* to, const float (&v)[8]) {
  *(uint4*)to = make_uint4(packBf16(v[0], v[1]), packBf16(v[2], v[3]), packBf16(v[4], v[5]), packBf16(v[6], v[7]));
}

/// Expands rows of weight to `to`, with ld elements (a multiple of 8) per row and zeros after K. The `rows` rows belong
/// to E = rows / n experts; each expert's rows are numbers first .. first + n - 1 of the N rows that have scales.
/// Experts without rows of x are skipped.
template <Format F, class T>
MOE_DEVICE void expand(T* to, const unsigned char* weight, const float* scales, const int* offsets, int rows, int n, int first, int ld, int whole, Sizes z) {
  const int perRow = ld / 8, across = divUp(z.K, z.BK);
  for (int64_t i = gridThread(); i < (int64_t)rows * perRow; i += gridThreads()) {
    // 32-bit divisions are faster and suffice for all but a single huge matrix.
    const int row = i >> 32 == 0 ? (uint32_t)i / (uint32_t)perRow : i / perRow;
    const int expert = row / n, at = (int)(i - (int64_t)row * perRow) * 8;
    if (offsets != nullptr && offsets[expert] >= offsets[expert + 1]) continue;
    const unsigned char* const from = weight + row * rowBytes<F>(z.K);
    const ScaleBlock block = ScaleBlock::of(at, z.BK);
    const float* const scale = scales + ((int64_t)expert * divUp(z.N, z.BN) + (row - expert * n + first) / z.BN) * across;
    float v[8];
    if (whole) {
      Eight<F>::load(from, at).unpack(v);
      if (F != Format::bf16) {
        const float factor = scale[block.block];
#pragma unroll
        for (int e = 0; e < 8; e++) v[e] *= factor;
      }
    } else {
      loadScaled<F>(v, from, scale, block, at, z.K);
    }
    storeEight(to + (int64_t)row * ld + at, v);
  }
}

#define FEW(format, name, Whole)                                                                                                                        \
  MOE_KERNEL((128, 3), moe_quantized_matmul_few_##format##_##name, (float* y, const float* x, const unsigned char* weight, const float* scales, const int* offsets, int M, int E, int N, int K, int BN, int BK)) { \
    fewRowsOfExperts<Format::format, Whole>(y, x, weight, scales, offsets, M, E, {N, K, BN, BK});                                                        \
  }
#define TENSOR(format, precision, Terms)                                                                                                                \
  MOE_KERNEL((256, 3), moe_quantized_matmul_few_##format##_tensor_##precision, (float* y, const float* x, const unsigned char* weight, const float* scales, const int* offsets, int M, int E, int N, int K, int BN, int BK)) { \
    fewRowsOnTensorCores<Format::format, Terms>(y, x, weight, scales, offsets, M, E, {N, K, BN, BK});                                                    \
  }
#define EXPAND(format, type, T)                                                                                                                         \
  MOE_KERNEL((256), moe_quantized_matmul_expand_##format##_##type, (T* to, const unsigned char* weight, const float* scales, const int* offsets, int rows, int n, int first, int ld, int whole, int N, int K, int BN, int BK)) { \
    expand<Format::format>(to, weight, scales, offsets, rows, n, first, ld, whole, {N, K, BN, BK});                                                      \
  }
#define FORMAT(format)          \
  FEW(format, whole, true)      \
  FEW(format, any, false)       \
  TENSOR(format, f32, 3)        \
  TENSOR(format, bf16, 1)       \
  EXPAND(format, f32, float)    \
  EXPAND(format, bf16, bf16)
FORMAT(bf16)
FORMAT(fp8)
FORMAT(int8)
FORMAT(int4)

/// Copies a matrix to columns first .. first + columns - 1 of y [M, N]. Rows are blockIdx.y, + gridDim.y, ...
MOE_KERNEL((256), moe_quantized_matmul_place_f32, (float* y, const float* part, int M, int N, int first, int columns)) {
  for (int row = blockIdx.y; row < M; row += gridDim.y) {
    for (int column = gridThread(); column < columns; column += gridThreads()) {
      y[(int64_t)row * N + first + column] = part[(int64_t)row * columns + column];
    }
  }
}
