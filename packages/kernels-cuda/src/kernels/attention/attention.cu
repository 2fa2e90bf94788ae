// Flash attention (Dao 2023), forward and backward, with either engine of flash.cuh. A block has BM rows in shared
// memory and loops over tiles of BN columns; a warp has complete rows of scores and outputs.
// Legend: B batch, T queries, S keys, H heads, G key heads (each shared by H / G query heads); q [B, T, H, ldk], k [B,
// S, G, ldk], v [B, S, G, ldv], out and dout [B, T, H, ldv], where ld = features in memory, padding included.
#include "flash.cuh"

struct Sizes {
  int B, T, S, H, G, Dk, Dv, ldk, ldv, causal;
  float scale;
};

/// The forward pass. A block computes BM queries of head blockIdx.y of batch blockIdx.z, against all keys they attend
/// to, BN at a time.
template <class E, bool HasStarts>
MOE_DEVICE void attention(float* out, float* lse, const typename E::Element* q, const typename E::Element* k, const typename E::Element* v, const int* lengths, const int* firstKeys, Sizes z) {
  using Element = typename E::Element;
  constexpr int DK = E::DK, DV = E::DV, sizeK = E::template tileSize<E::BN, DK>, sizeV = E::template tileSize<E::BN, DV>;
  MOE_DYNAMIC_SHARED(shared);
  Element* const queries = (Element*)(shared + E::scratchBytes);
  Element* const stages = queries + E::template tileSize<E::BM, DK>;

  // The last queries attend to the most keys: they start first.
  const int b = blockIdx.z, h = blockIdx.y, g = h / (z.H / z.G), first = (gridDim.x - 1 - blockIdx.x) * E::BM;
  const Visible visible = Visible::of(z.T, z.S, lengths, b, z.causal);
  const Starts<HasStarts> starts = Starts<HasStarts>::of(firstKeys, z.T, b);
  const int end = visible.keys(min(first + E::BM, z.T) - 1), seenByAll = visible.keys(first);
  const auto begins = starts.range(first, E::BM);
  const int64_t ldq = (int64_t)z.H * z.ldk, ldk = (int64_t)z.G * z.ldk, ldv = (int64_t)z.G * z.ldv;
  q += (int64_t)b * z.T * ldq + first * ldq + h * z.ldk;
  k += (int64_t)b * z.S * ldk + g * z.ldk;
  v += (int64_t)b * z.S * ldv + g * z.ldv;

  auto copyKeys = [&](int key) {
    if (key < end) {
      Element* const stage = stages + key / E::BN % E::Stages * (sizeK + sizeV);
      E::template copyRows<E::BN, DK>(stage, k + key * ldk, ldk, end - key, z.ldk);
      E::template copyRows<E::BN, DV>(stage + sizeK, v + key * ldv, ldv, end - key, z.ldv);
    }
    cpAsyncCommit();
  };
  E::template copyRows<E::BM, DK>(queries, q, ldq, z.T - first, z.ldk);
  if (E::Stages > 1) copyKeys(begins.least);

  typename E::template Accumulator<DV> sums = {};
  OnlineSoftmax<E> softmax;
  OnlineSoftmax<E>::begin(softmax);
  for (int key = begins.least; key < end; key += E::BN) {
    if (E::Stages == 1) {
      __syncthreads(); // all threads have finished with the previous keys
      copyKeys(key);
    }
    cpAsyncWait<0>();
    __syncthreads();
    if (E::Stages > 1) copyKeys(key + E::BN); // overwrites a stage that all threads have finished reading
    const Element* const stage = stages + key / E::BN % E::Stages * (sizeK + sizeV);

    typename E::Scores s = {};
    E::template dot<DK>(s, queries, stage);
#pragma unroll
    for (int i = 0; i < E::Rows; i++) {
#pragma unroll
      for (int j = 0; j < E::Columns; j++) E::at(s, i, j) *= z.scale * E::Unit;
    }
    if (key + E::BN > seenByAll) {
#pragma unroll
      for (int i = 0; i < E::Rows; i++) {
        const int left = visible.keys(first + E::row(i)) - key;
#pragma unroll
        for (int j = 0; j < E::Columns; j++) E::at(s, i, j) = E::column(j) < left ? E::at(s, i, j) : -infinity();
      }
    }
    if (key < begins.most) {
#pragma unroll
      for (int i = 0; i < E::Rows; i++) {
        const int before = starts.from(first + E::row(i)) - key;
#pragma unroll
        for (int j = 0; j < E::Columns; j++) E::at(s, i, j) = E::column(j) < before ? -infinity() : E::at(s, i, j);
      }
    }
    OnlineSoftmax<E>::template apply<DV>(OnlineSoftmax<E>::exponentials(softmax, s), sums);
    E::template add<DV>(sums, s, stage + sizeK, shared);
  }
  cpAsyncWait<0>();

#pragma unroll
  for (int i = 0; i < E::Rows; i++) {
    float rowLse;
    const float factor = OnlineSoftmax<E>::finish(softmax, i, rowLse);
    const int t = first + E::row(i);
    if (t >= z.T) continue;
    if (E::column(0) == 0) lse[((int64_t)b * z.H + h) * z.T + t] = rowLse;
    storeRow<E, DV>(out + (((int64_t)b * z.T + t) * z.H + h) * z.Dv, sums, i, z.Dv, factor);
  }
}

/// delta [B, H, T] = sum(dout out) of each query, one warp each.
MOE_KERNEL((256), moe_attention_delta_f32, (float* delta, const float* out, const float* dout, int B, int T, int H, int D)) {
  const int64_t rows = (int64_t)B * T * H;
  const int lane = threadIdx.x % 32;
  for (int64_t row = gridThread() / 32; row < rows; row += gridThreads() / 32) {
    float sum = 0.f;
    for (int d = lane; d < D; d += 32) sum = fmaf(out[row * D + d], dout[row * D + d], sum);
    sum = warpSum(sum);
    const int64_t b = row / ((int64_t)T * H), t = row / H % T, h = row % H;
    if (lane == 0) delta[(b * H + h) * T + t] = sum;
  }
}

/// Gradients of BM keys and/or values of key head blockIdx.y. Tiles of scores have keys as rows and queries as columns.
/// The query heads that share the key head are processed one after the other.
template <class E, bool HasStarts, bool OfKeys, bool OfValues>
MOE_DEVICE void attentionKeysBackward(float* dk, float* dv, const typename E::Element* q, const typename E::Element* k, const typename E::Element* v, const typename E::Element* dout, const float* lse, const float* delta, const int* lengths, const int* firstKeys, Sizes z) {
  using Element = typename E::Element;
  constexpr int DK = E::DK, DV = E::DV, sizeQ = E::template tileSize<E::BN, DK>, sizeO = E::template tileSize<E::BN, DV>;
  constexpr int stageBytes = (sizeQ + sizeO) * (int)sizeof(Element) + 2 * E::BN * 4;
  MOE_DYNAMIC_SHARED(shared);
  Element* const keys = (Element*)(shared + E::scratchBytes);
  Element* const values = keys + E::template tileSize<E::BM, DK>;
  unsigned char* const stages = (unsigned char*)(values + E::template tileSize<E::BM, DV>);

  const int b = blockIdx.z, g = blockIdx.y, first = blockIdx.x * E::BM, shares = z.H / z.G;
  const Visible visible = Visible::of(z.T, z.S, lengths, b, z.causal);
  const Starts<HasStarts> starts = Starts<HasStarts>::of(firstKeys, z.T, b);
  const int64_t ldq = (int64_t)z.H * z.ldk, ldo = (int64_t)z.H * z.ldv, ldk = (int64_t)z.G * z.ldk, ldv = (int64_t)z.G * z.ldv;
  // Tiles of queries of each head, from the first to the last query that attends to a key of this block.
  const int begin = visible.firstQuery(first) / E::BN * E::BN, end = starts.template endOfQueries<E::Threads>(begin, first + E::BM);
  const int tiles = first < visible.limit ? max(0, divUp(end - begin, E::BN)) * shares : 0;

  auto stageOf = [&](int tile) { return stages + tile % E::Stages * stageBytes; };
  auto copyQueries = [&](int tile, int h, int t) {
    if (tile < tiles) {
      const int rows = z.T - t;
      Element* const stage = (Element*)stageOf(tile);
      E::template copyRows<E::BN, DK>(stage, q + ((int64_t)b * z.T + t) * ldq + h * z.ldk, ldq, rows, z.ldk);
      E::template copyRows<E::BN, DV>(stage + sizeQ, dout + ((int64_t)b * z.T + t) * ldo + h * z.ldv, ldo, rows, z.ldv);
      float* const perQuery = (float*)(stage + sizeQ + sizeO);
      const int64_t at = ((int64_t)b * z.H + h) * z.T + t;
      if (threadIdx.x < E::BN) cpAsync4(perQuery + threadIdx.x, lse + at + threadIdx.x, threadIdx.x < rows);
      else if (threadIdx.x < 2 * E::BN) cpAsync4(perQuery + threadIdx.x, delta + at + threadIdx.x - E::BN, threadIdx.x - E::BN < rows);
    }
    cpAsyncCommit();
  };
  E::template copyRows<E::BM, DK>(keys, k + ((int64_t)b * z.S + first) * ldk + g * z.ldk, ldk, visible.limit - first, z.ldk);
  if (OfKeys) E::template copyRows<E::BM, DV>(values, v + ((int64_t)b * z.S + first) * ldv + g * z.ldv, ldv, visible.limit - first, z.ldv);
  int h = g * shares, t = begin;
  if (E::Stages > 1) copyQueries(0, h, t);

  typename E::template Accumulator<DK> sumsK = {};
  typename E::template Accumulator<DV> sumsV = {};
  for (int tile = 0; tile < tiles; tile++) {
    if (E::Stages == 1) {
      __syncthreads();
      copyQueries(tile, h, t);
    }
    cpAsyncWait<0>();
    __syncthreads();
    const bool nextHead = t + E::BN >= end;
    const int nextT = nextHead ? begin : t + E::BN;
    h += nextHead;
    if (E::Stages > 1) copyQueries(tile + 1, h, nextT);
    const Element* const stage = (const Element*)stageOf(tile);
    const float* const perQuery = (const float*)(stage + sizeQ + sizeO);

    typename E::Scores p = {};
    E::template dot<DK>(p, keys, stage);
#pragma unroll
    for (int j = 0; j < E::Columns; j++) {
      const int query = t + E::column(j);
      const int seen = query < z.T ? visible.keys(query) : 0;
      const float rowLse = perQuery[E::column(j)] * E::Unit;
#pragma unroll
      for (int i = 0; i < E::Rows; i++) {
        float& x = E::at(p, i, j);
        x = first + E::row(i) < seen ? E::exponential(x * (z.scale * E::Unit) - rowLse) : 0.f;
      }
    }
    if (starts.anyBehind(t, E::BN, first)) {
#pragma unroll
      for (int j = 0; j < E::Columns; j++) {
        const int before = starts.from(t + E::column(j)) - first;
#pragma unroll
        for (int i = 0; i < E::Rows; i++) E::at(p, i, j) = E::row(i) < before ? 0.f : E::at(p, i, j);
      }
    }
    if constexpr (OfValues) E::template add<DV>(sumsV, p, stage + sizeQ, shared);

    if constexpr (OfKeys) {
      typename E::Scores dp = {};
      E::template dot<DV>(dp, values, stage + sizeQ);
#pragma unroll
      for (int j = 0; j < E::Columns; j++) {
        const float shift = perQuery[E::BN + E::column(j)];
#pragma unroll
        for (int i = 0; i < E::Rows; i++) E::at(dp, i, j) = E::at(p, i, j) * (E::at(dp, i, j) - shift);
      }
      E::template add<DK>(sumsK, dp, stage, shared);
    }
    t = nextT;
  }
  cpAsyncWait<0>();

#pragma unroll
  for (int i = 0; i < E::Rows; i++) {
    const int key = first + E::row(i);
    if (key >= z.S) continue;
    const int64_t at = ((int64_t)b * z.S + key) * z.G + g;
    if (OfKeys) storeRow<E, DK>(dk + at * z.Dk, sumsK, i, z.Dk, z.scale);
    if (OfValues) storeRow<E, DV>(dv + at * z.Dv, sumsV, i, z.Dv, 1.f);
  }
}

/// Gradients of BM queries of head blockIdx.y.
template <class E, bool HasStarts>
MOE_DEVICE void attentionQueriesBackward(float* dq, const typename E::Element* q, const typename E::Element* k, const typename E::Element* v, const typename E::Element* dout, const float* lse, const float* delta, const int* lengths, const int* firstKeys, Sizes z) {
  using Element = typename E::Element;
  constexpr int DK = E::DK, DV = E::DV, sizeK = E::template tileSize<E::BN, DK>, sizeV = E::template tileSize<E::BN, DV>;
  MOE_DYNAMIC_SHARED(shared);
  Element* const queries = (Element*)(shared + E::scratchBytes);
  Element* const douts = queries + E::template tileSize<E::BM, DK>;
  Element* const stages = douts + E::template tileSize<E::BM, DV>;

  const int b = blockIdx.z, h = blockIdx.y, g = h / (z.H / z.G), first = (gridDim.x - 1 - blockIdx.x) * E::BM;
  const Visible visible = Visible::of(z.T, z.S, lengths, b, z.causal);
  const Starts<HasStarts> starts = Starts<HasStarts>::of(firstKeys, z.T, b);
  const int end = visible.keys(min(first + E::BM, z.T) - 1);
  const auto begins = starts.range(first, E::BM);
  const int64_t ldq = (int64_t)z.H * z.ldk, ldo = (int64_t)z.H * z.ldv, ldk = (int64_t)z.G * z.ldk, ldv = (int64_t)z.G * z.ldv;
  k += (int64_t)b * z.S * ldk + g * z.ldk;
  v += (int64_t)b * z.S * ldv + g * z.ldv;

  auto copyKeys = [&](int key) {
    if (key < end) {
      Element* const stage = stages + key / E::BN % E::Stages * (sizeK + sizeV);
      E::template copyRows<E::BN, DK>(stage, k + key * ldk, ldk, end - key, z.ldk);
      E::template copyRows<E::BN, DV>(stage + sizeK, v + key * ldv, ldv, end - key, z.ldv);
    }
    cpAsyncCommit();
  };
  E::template copyRows<E::BM, DK>(queries, q + ((int64_t)b * z.T + first) * ldq + h * z.ldk, ldq, z.T - first, z.ldk);
  E::template copyRows<E::BM, DV>(douts, dout + ((int64_t)b * z.T + first) * ldo + h * z.ldv, ldo, z.T - first, z.ldv);
  if (E::Stages > 1) copyKeys(begins.least);

  float rowLse[E::Rows], shift[E::Rows];
#pragma unroll
  for (int i = 0; i < E::Rows; i++) {
    const int t = first + E::row(i);
    const int64_t at = ((int64_t)b * z.H + h) * z.T + t;
    rowLse[i] = t < z.T ? lse[at] * E::Unit : 0.f;
    shift[i] = t < z.T ? delta[at] : 0.f;
  }
  typename E::template Accumulator<DK> sums = {};
  for (int key = begins.least; key < end; key += E::BN) {
    if (E::Stages == 1) {
      __syncthreads();
      copyKeys(key);
    }
    cpAsyncWait<0>();
    __syncthreads();
    if (E::Stages > 1) copyKeys(key + E::BN);
    const Element* const stage = stages + key / E::BN % E::Stages * (sizeK + sizeV);

    typename E::Scores p = {}, dp = {};
    E::template dot<DK>(p, queries, stage);
    E::template dot<DV>(dp, douts, stage + sizeK);
#pragma unroll
    for (int i = 0; i < E::Rows; i++) {
      const int keys = visible.keys(first + E::row(i));
#pragma unroll
      for (int j = 0; j < E::Columns; j++) {
        const float x = key + E::column(j) < keys ? E::exponential(E::at(p, i, j) * (z.scale * E::Unit) - rowLse[i]) : 0.f;
        E::at(dp, i, j) = x * (E::at(dp, i, j) - shift[i]);
      }
    }
    if (key < begins.most) {
#pragma unroll
      for (int i = 0; i < E::Rows; i++) {
        const int before = starts.from(first + E::row(i)) - key;
#pragma unroll
        for (int j = 0; j < E::Columns; j++) E::at(dp, i, j) = E::column(j) < before ? 0.f : E::at(dp, i, j);
      }
    }
    E::template add<DK>(sums, dp, stage, shared);
  }
  cpAsyncWait<0>();

#pragma unroll
  for (int i = 0; i < E::Rows; i++) {
    const int t = first + E::row(i);
    if (t >= z.T) continue;
    storeRow<E, DK>(dq + (((int64_t)b * z.T + t) * z.H + h) * z.Dk, sums, i, z.Dk, z.scale);
  }
}

#define ATTENTION_FORWARD_KERNEL(blocks, name, Engine, HasStarts)                                                                                                 \
  MOE_KERNEL((Engine::Threads, blocks), moe_attention_fwd_##name, (float* out, float* lse, const Engine::Element* q, const Engine::Element* k, const Engine::Element* v, const int* lengths, const int* starts, int B, int T, int S, int H, int G, int Dk, int Dv, int ldk, int ldv, int causal, float scale)) { \
    attention<Engine, HasStarts>(out, lse, q, k, v, lengths, starts, {B, T, S, H, G, Dk, Dv, ldk, ldv, causal, scale});                                           \
  }
#define ATTENTION_KEYS_KERNEL(blocks, of, name, Engine, HasStarts, OfKeys, OfValues)                                                                              \
  MOE_KERNEL((Engine::Threads, blocks), moe_attention_bwd_##of##_##name, (float* dk, float* dv, const Engine::Element* q, const Engine::Element* k, const Engine::Element* v, const Engine::Element* dout, const float* lse, const float* delta, const int* lengths, const int* starts, int B, int T, int S, int H, int G, int Dk, int Dv, int ldk, int ldv, int causal, float scale)) { \
    attentionKeysBackward<Engine, HasStarts, OfKeys, OfValues>(dk, dv, q, k, v, dout, lse, delta, lengths, starts, {B, T, S, H, G, Dk, Dv, ldk, ldv, causal, scale}); \
  }
#define ATTENTION_QUERIES_KERNEL(blocks, name, Engine, HasStarts)                                                                                                 \
  MOE_KERNEL((Engine::Threads, blocks), moe_attention_bwd_queries_##name, (float* dq, const Engine::Element* q, const Engine::Element* k, const Engine::Element* v, const Engine::Element* dout, const float* lse, const float* delta, const int* lengths, const int* starts, int B, int T, int S, int H, int G, int Dk, int Dv, int ldk, int ldv, int causal, float scale)) { \
    attentionQueriesBackward<Engine, HasStarts>(dq, q, k, v, dout, lse, delta, lengths, starts, {B, T, S, H, G, Dk, Dv, ldk, ldv, causal, scale});                \
  }
#define ATTENTION_FORWARD(blocks, name, Engine)                           \
  ATTENTION_FORWARD_KERNEL(blocks, name, Engine, false)                   \
  ATTENTION_FORWARD_KERNEL(blocks, name##_starts, Engine, true)
#define ATTENTION_BACKWARD(blocks, name, Engine)                          \
  ATTENTION_KEYS_KERNEL(blocks, keys, name, Engine, false, true, true)    \
  ATTENTION_KEYS_KERNEL(blocks, keys, name##_starts, Engine, true, true, true) \
  ATTENTION_QUERIES_KERNEL(blocks, name, Engine, false)                   \
  ATTENTION_QUERIES_KERNEL(blocks, name##_starts, Engine, true)
/// The gradients of keys and of values as separate kernels.
#define ATTENTION_BACKWARD_APART(blocks, name, Engine)                    \
  ATTENTION_KEYS_KERNEL(blocks, keys, name, Engine, false, true, false)   \
  ATTENTION_KEYS_KERNEL(blocks, keys, name##_starts, Engine, true, true, false) \
  ATTENTION_KEYS_KERNEL(blocks, values, name, Engine, false, false, true) \
  ATTENTION_KEYS_KERNEL(blocks, values, name##_starts, Engine, true, false, true) \
  ATTENTION_QUERIES_KERNEL(blocks, name, Engine, false)                   \
  ATTENTION_QUERIES_KERNEL(blocks, name##_starts, Engine, true)

using Bf16Small = FlashBf16<4, 2, 32, 64, 64>;
using Bf16Medium = FlashBf16<4, 2, 32, 128, 128>;
using Bf16Large = FlashBf16<4, 2, 32, 192, 128>;
// One mma tile of rows (16) per warp, because its accumulators take 128 registers; 99 KiB of shared memory have room
// for 8 warps and 16 keys at a time.
using Bf16Huge = FlashBf16<8, 1, 16, 256, 256>;
ATTENTION_FORWARD(2, bf16_64_64, Bf16Small)
ATTENTION_FORWARD(2, bf16_128_128, Bf16Medium)
ATTENTION_FORWARD(2, bf16_192_128, Bf16Large)
ATTENTION_FORWARD(1, bf16_256_256, Bf16Huge)

// In the backward pass, the gradients of keys and values fill the registers: 16 rows per warp. With 256 features, they
// do not fit at the same time.
using Bf16SmallBackward = FlashBf16<4, 1, 32, 64, 64>;
using Bf16MediumBackward = FlashBf16<4, 1, 32, 128, 128>;
using Bf16LargeBackward = FlashBf16<4, 1, 32, 192, 128>;
using Bf16HugeBackward = FlashBf16<4, 1, 16, 256, 256>;
ATTENTION_BACKWARD(2, bf16_64_64, Bf16SmallBackward)
ATTENTION_BACKWARD(2, bf16_128_128, Bf16MediumBackward)
ATTENTION_BACKWARD(2, bf16_192_128, Bf16LargeBackward)
ATTENTION_BACKWARD_APART(2, bf16_256_256, Bf16HugeBackward)

using F32Small = FlashF32<64, 64>;
using F32Medium = FlashF32<192, 128>;
using F32Large = FlashF32<256, 256>;
ATTENTION_FORWARD(2, f32_64_64, F32Small)
ATTENTION_FORWARD(2, f32_192_128, F32Medium)
ATTENTION_FORWARD(1, f32_256_256, F32Large)
ATTENTION_BACKWARD(1, f32_64_64, F32Small)
ATTENTION_BACKWARD(1, f32_192_128, F32Medium)
ATTENTION_BACKWARD(1, f32_256_256, F32Large)
