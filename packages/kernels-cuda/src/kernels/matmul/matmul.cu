// Dense and batched matrix products, in f32 on CUDA cores and in bf16 on tensor cores, and the rounding of operands to
// bf16. A block computes one tile of one matrix (gemm.cuh), or a few columns if there are few rows (few-rows.cuh).
#include "few-rows.cuh"
#include "gemm.cuh"

/// Element blockIdx.y. Does not index the array dynamically, which would copy the parameter to local memory.
template <class T>
MOE_DEVICE T pick(Args<T, 4> x) {
  return blockIdx.y < 2 ? (blockIdx.y == 0 ? x[0] : x[1]) : (blockIdx.y == 2 ? x[2] : x[3]);
}

/// Rounds matrices [rows, columns] from f32 to bf16 with rows of `ld` elements (a multiple of 8), padded with zeros.
/// One matrix per blockIdx.y.
MOE_KERNEL((256), moe_round_bf16, (Args<bf16*, 4> to, Args<const float*, 4> from, Args<int64_t, 4> rows, Args<int, 4> columns, Args<int, 4> lds)) {
  bf16* const y = pick(to);
  const float* const x = pick(from);
  const int64_t m = pick(rows);
  const int n = pick(columns), ld = pick(lds);
  const int perRow = ld / 8;
  for (int64_t i = gridThread(); i < m * perRow; i += gridThreads()) {
    alignas(16) float v[8];
    if (n == ld) {
      *(float4*)v = *(const float4*)(x + i * 8);
      *(float4*)(v + 4) = *(const float4*)(x + i * 8 + 4);
    } else {
      const int64_t row = i / perRow;
      const int first = (int)(i - row * perRow) * 8;
#pragma unroll
      for (int j = 0; j < 8; j++) v[j] = first + j < n ? x[row * n + first + j] : 0.f;
    }
    *(uint4*)(y + i * 8) = make_uint4(packBf16(v[0], v[1]), packBf16(v[2], v[3]), packBf16(v[4], v[5]), packBf16(v[6], v[7]));
  }
}

/// c = a b (or c += a b). blockIdx.x = batch and tile, blockIdx.z = split of k: with several splits, c is one result
/// for each (split-K).
template <class Tile, bool TransposeA, bool TransposeB>
MOE_DEVICE void product(float* c, const typename Tile::Element* a, const typename Tile::Element* b, int m, int n, int k, int lda, int ldb, int add) {
  MOE_DYNAMIC_SHARED(shared);
  const int tilesM = divUp(m, Tile::BM), tilesN = divUp(n, Tile::BN);
  const int64_t batch = blockIdx.x / (tilesM * tilesN), batches = gridDim.x / (tilesM * tilesN);
  const int2 tile = rasterize(blockIdx.x % (tilesM * tilesN), tilesM, tilesN);
  const int row = tile.x * Tile::BM, column = tile.y * Tile::BN;
  const int part = divUp(divUp(k, (int)gridDim.z), Tile::BK) * Tile::BK;
  const int from = blockIdx.z * part, size = k - from < part ? k - from : part;

  a += batch * (TransposeA ? k : m) * lda + (TransposeA ? (int64_t)from * lda + row : (int64_t)row * lda + from);
  b += batch * (TransposeB ? n : k) * ldb + (TransposeB ? (int64_t)column * ldb + from : (int64_t)from * ldb + column);
  typename Tile::Accumulator sums = {};
  Tile::template multiply<TransposeA, TransposeB>(sums, shared, {a, lda, m - row}, {b, ldb, n - column}, size);
  c += ((blockIdx.z * batches + batch) * m + row) * n + column;
  storeTile<Tile>(c, n, m - row, n - column, sums, add != 0);
}

#define MATMUL(blocks, name, Tile, TransposeA, TransposeB)                                                                                     \
  MOE_KERNEL((Tile::Threads, blocks), moe_matmul_##name, (float* c, const Tile::Element* a, const Tile::Element* b, int m, int n, int k, int lda, int ldb, int add)) { \
    product<Tile, TransposeA, TransposeB>(c, a, b, m, n, k, lda, ldb, add);                                                                    \
  }
#define MATMUL_FORMS(blocks, name, Tile)          \
  MATMUL(blocks, name##_nn, Tile, false, false) \
  MATMUL(blocks, name##_nt, Tile, false, true)  \
  MATMUL(blocks, name##_tn, Tile, true, false)  \
  MATMUL(blocks, name##_tt, Tile, true, true)

MATMUL_FORMS(2, f32_128x128, F32Large)
MATMUL_FORMS(3, f32_64x64, F32Small)
MATMUL_FORMS(1, bf16_128x256, Bf16Large)
MATMUL_FORMS(2, bf16_128x128, Bf16Medium)
MATMUL_FORMS(3, bf16_64x64, Bf16Small)

/// The reduction of split-K: c = the sum of `parts` results of `size` elements, first to last (plus c itself if `add`).
MOE_KERNEL((256), moe_matmul_sum_f32, (float* c, const float* results, int64_t size, int parts, int add)) {
  for (int64_t i = gridThread(); i < size; i += gridThreads()) {
    float sum = add ? c[i] : 0.f;
    for (int p = 0; p < parts; p++) sum += results[p * size + i];
    c[i] = sum;
  }
}

/// c [m, n] = a [m, k] b^T with b [n, k], for m up to mostFewRows: 4 columns of c per block; blockIdx.z = batch.
template <bool Bf16>
MOE_DEVICE void productOfFewRows(float* c, const float* a, const float* b, int m, int n, int k) {
  const int column = blockIdx.x * 4;
  const int64_t batch = blockIdx.z;
  fewRows<Bf16>(c + batch * m * n + column, a + batch * m * k, b + (batch * n + column) * k, m, min(n - column, 4), k, n);
}
MOE_KERNEL((128), moe_matmul_few_f32, (float* c, const float* a, const float* b, int m, int n, int k)) { productOfFewRows<false>(c, a, b, m, n, k); }
MOE_KERNEL((128), moe_matmul_few_bf16, (float* c, const float* a, const float* b, int m, int n, int k)) { productOfFewRows<true>(c, a, b, m, n, k); }

/// The same with b [k, n], where n is a multiple of 4: 128 columns of c per block.
template <bool Bf16>
MOE_DEVICE void productOfFewRowsAndColumns(float* c, const float* a, const float* b, int m, int n, int k) {
  MOE_SHARED(__align__(16) float, parts, [4][1024]);
  const int column = blockIdx.x * 128, columns = min(n - column, 128);
  const int64_t batch = blockIdx.z;
  c += batch * m * n + column, a += batch * m * k, b += batch * k * n + column;
  if (m <= 1) fewRowsTimesColumns<1, Bf16>(parts, c, a, b, m, columns, k, n);
  else fewRowsTimesColumns<8, Bf16>(parts, c, a, b, m, columns, k, n);
}
MOE_KERNEL((128, 4), moe_matmul_few_columns_f32, (float* c, const float* a, const float* b, int m, int n, int k)) {
  productOfFewRowsAndColumns<false>(c, a, b, m, n, k);
}
MOE_KERNEL((128, 4), moe_matmul_few_columns_bf16, (float* c, const float* a, const float* b, int m, int n, int k)) {
  productOfFewRowsAndColumns<true>(c, a, b, m, n, k);
}
