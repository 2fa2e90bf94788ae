// Index scores of sparse attention: weighted sums over heads of ReLU(q . k). A block computes the products of a tile of
// keys (its rows) and the heads of one or two queries (its columns), which are summed over the heads in registers. The
// gradients compute the products again, as attention does its scores: once for blocks of heads, once for blocks of keys.
// Legend: B batch, T queries, J heads, D features, S keys.
#include "flash.cuh"
#include "gemm.cuh"

/// Queries per tile. In bf16, each fills half of the columns.
template <class Tile>
constexpr int queriesOf = sizeof(typename Tile::Element) == 2 ? 2 : 1;

/// NaN stays NaN.
MOE_DEVICE float rectified(float x) { return x <= 0.f ? 0.f : x; }

/// Products of a tile with `heads` heads of each query, from `first` and `second` on.
template <class Tile>
MOE_DEVICE void headProducts(typename Tile::Accumulator& products, unsigned char* shared, Operand<typename Tile::Element> keys, const typename Tile::Element* first, const typename Tile::Element* second, int ldq, int heads, int D) {
  if constexpr (queriesOf<Tile> == 2) {
    Tile::template multiply<false, true>(products, shared, keys, Halves<bf16>{first, second, ldq, heads}, D);
  } else {
    Tile::template multiply<false, true>(products, shared, keys, {first, ldq, heads}, D);
  }
}

/// scores [B, T, S]. Tiles of keys that the block's queries do not see (limits [B, T], or nullptr) are not computed.
template <class Tile>
MOE_DEVICE void indexScoresTile(float* scores, const typename Tile::Element* q, const typename Tile::Element* keys, const float* weights, const int* limits, int T, int J, int D, int S, int ldq, int ldk) {
  MOE_DYNAMIC_SHARED(shared);
  constexpr int Queries = queriesOf<Tile>, Heads = Tile::BN / Queries, Columns = Tile::Columns / Queries;
  const int across = divUp(S, Tile::BM), down = divUp(T, Queries);
  const int batch = blockIdx.x / (across * down);
  const int2 tile = rasterize(blockIdx.x % (across * down), across, down);
  const int key = tile.x * Tile::BM, t = tile.y * Queries;
  const int64_t query = (int64_t)batch * T + t;
  const auto exists = [&](int n) { return t + n < T; };
  const auto limit = [&](int n) { return !exists(n) ? 0 : limits ? limits[query + n] : S; };

  // The sums of each warp that shares a row. In registers they would have to survive the products of the next heads.
  MOE_SHARED(float, sums, [Queries][Tile::RowWarps][Tile::BM]);
  const int warp = threadIdx.x / 32 % Tile::RowWarps;
  const auto add = [&](int n, int i, float x, bool first) {
    for (int step = Tile::RowLanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(wholeWarp, x, step);
    float& sum = sums[n][warp][Tile::row(i)];
    if (threadIdx.x % Tile::RowLanes == 0) sum = first ? x : sum + x;
  };
  if (key < limit(0) || (Queries == 2 && key < limit(1))) {
    for (int head = 0; head < J; head += Heads) {
      const int heads = J - head < Heads ? J - head : Heads;
      const typename Tile::Element* const first = q + (query * J + head) * ldq;
      typename Tile::Accumulator products = {};
      headProducts<Tile>(products, shared, {keys + ((int64_t)batch * S + key) * ldk, ldk, S - key}, first, exists(1) ? first + (int64_t)J * ldq : first, ldq, heads, D);
#pragma unroll
      for (int n = 0; n < Queries; n++) {
        const float* const ofQuery = weights + (query + n) * J + head;
        float weight[Columns];
#pragma unroll
        for (int j = 0; j < Columns; j++) weight[j] = exists(n) && Tile::column(j) < heads ? ofQuery[Tile::column(j)] : 0.f;
        // Heads that do not exist are zeros, whose products with infinite keys are NaN.
        const auto product = [&](int i, int j) { return Tile::column(j) < heads ? Tile::at(products, i, n * Columns + j) : 0.f; };
#pragma unroll
        for (int i = 0; i < Tile::Rows; i++) {
          float sum = 0.f;
#pragma unroll
          for (int j = 0; j < Columns; j++) sum = fmaf(weight[j], rectified(product(i, j)), sum);
          add(n, i, sum, head == 0);
        }
      }
      __syncthreads(); // the next product overwrites the operands, and below, other threads read the sums
    }
  }
  for (int at = threadIdx.x; at < Queries * Tile::BM; at += Tile::Threads) {
    const int n = at / Tile::BM, r = at % Tile::BM;
    if (!exists(n) || key + r >= S) continue;
    const bool seen = key + r < limit(n);
    float score = seen ? 0.f : -infinity();
    for (int w = 0; w < Tile::RowWarps && seen && J > 0; w++) score += sums[n][w][r];
    scores[(query + n) * S + key + r] = score;
  }
}

#define INDEX_SCORES(blocks, name, Tile)                                                                                                                  \
  MOE_KERNEL((Tile::Threads, blocks), moe_index_scores_fwd_##name, (float* scores, const Tile::Element* q, const Tile::Element* keys, const float* weights, const int* limits, int T, int J, int D, int S, int ldq, int ldk)) { \
    indexScoresTile<Tile>(scores, q, keys, weights, limits, T, J, D, S, ldq, ldk);                                                                        \
  }
INDEX_SCORES(3, f32_64x64, F32Small)
INDEX_SCORES(2, bf16_128x128, Bf16Medium)
INDEX_SCORES(3, bf16_64x64, Bf16Small)

struct IndexSizes {
  int T, J, D, S;
};

/// The distance of rows of queries and keys in global memory.
template <class E>
MOE_DEVICE int rowPitch(IndexSizes z) {
  return sizeof(typename E::Element) == 2 ? E::DK : z.D;
}

/// The number of keys that query t of sequence b sees.
struct SeenKeys {
  const int* limits;
  int S;
  MOE_DEVICE SeenKeys of(const int* limits, IndexSizes z, int b) { return {limits ? limits + (int64_t)b * z.T : nullptr, z.S}; }
  __device__ __forceinline__ int by(int t) const { return limits ? min(limits[t], S) : S; }
};

/// Heads of one query that a warp processes at a time, or several warps together.
constexpr int groupSize = 32;

/// dq [B, T, J, D] and dweights [B, T, J] of some groups of heads. Tiles have heads as rows and keys as columns.
template <class E>
MOE_DEVICE void indexQueriesBackward(float* dq, float* dweights, const typename E::Element* q, const typename E::Element* keys, const float* weights, const float* dscores, const int* limits, IndexSizes z) {
  using Element = typename E::Element;
  constexpr int groups = E::BM / groupSize, sizeQ = E::template tileSize<groupSize, E::DK>, sizeK = E::template tileSize<E::BN, E::DK>;
  MOE_DYNAMIC_SHARED(shared);
  Element* const queries = (Element*)(shared + E::scratchBytes);
  Element* const stages = queries + groups * sizeQ;

  const int ld = rowPitch<E>(z), perQuery = divUp(z.J, groupSize), across = divUp(z.T * perQuery, groups);
  const int b = blockIdx.x / across, first = blockIdx.x % across * groups;
  const SeenKeys seen = SeenKeys::of(limits, z, b);
  const int64_t query = (int64_t)b * z.T;
  keys += (int64_t)b * z.S * ld;

  int end = 0;
  for (int n = 0; n < groups; n++) {
    const int t = (first + n) / perQuery, head = (first + n) % perQuery * groupSize;
    if (t < z.T) end = max(end, seen.by(t));
    E::template copyRows<groupSize, E::DK>(queries + n * sizeQ, q + ((query + t) * z.J + head) * ld, ld, t < z.T ? z.J - head : 0, ld);
  }
  const auto copyKeys = [&](int key) {
    if (key < end) E::template copyRows<E::BN, E::DK>(stages + key / E::BN % E::Stages * sizeK, keys + (int64_t)key * ld, ld, end - key, ld);
    cpAsyncCommit();
  };
  if (E::Stages > 1) copyKeys(0);

  const int group = first + E::row(0) / groupSize, t = group / perQuery, head = group % perQuery * groupSize;
  const int limit = t < z.T ? seen.by(t) : 0;
  const float* const slopes = dscores + (query + t) * z.S;
  float dweight[E::Rows] = {};
  typename E::template Accumulator<E::DK> sums = {};
  for (int key = 0; key < end; key += E::BN) {
    if (E::Stages == 1) {
      __syncthreads();
      copyKeys(key);
    }
    cpAsyncWait<0>();
    __syncthreads();
    if (E::Stages > 1) copyKeys(key + E::BN);
    float slope[E::Columns];
#pragma unroll
    for (int j = 0; j < E::Columns; j++) slope[j] = key + E::column(j) < limit ? slopes[key + E::column(j)] : 0.f;
    const Element* const stage = stages + key / E::BN % E::Stages * sizeK;
    typename E::Scores p = {};
    E::template dot<E::DK>(p, queries, stage);
#pragma unroll
    for (int j = 0; j < E::Columns; j++) {
#pragma unroll
      for (int i = 0; i < E::Rows; i++) {
        const float x = E::at(p, i, j);
        dweight[i] = fmaf(slope[j], rectified(x), dweight[i]);
        E::at(p, i, j) = x <= 0.f ? 0.f : slope[j];
      }
    }
    E::template add<E::DK>(sums, p, stage, shared);
  }
  cpAsyncWait<0>();

#pragma unroll
  for (int i = 0; i < E::Rows; i++) {
    const float total = rowSum<E>(dweight[i]);
    const int j = head + E::row(i) % groupSize;
    if (t >= z.T || j >= z.J) continue;
    const int64_t at = (query + t) * z.J + j;
    if (E::column(0) == 0) dweights[at] = total;
    storeRow<E, E::DK>(dq + at * z.D, sums, i, z.D, weights[at]);
  }
}

/// dkeys [B, S, D] of BM keys, summed over the queries that are left over by blockIdx.y when divided by gridDim.y; each
/// of these remainders has its own dkeys. Tiles have keys as rows and heads of one query as columns.
template <class E>
MOE_DEVICE void indexKeysBackward(float* dkeys, const typename E::Element* q, const typename E::Element* keys, const float* weights, const float* dscores, const int* limits, IndexSizes z) {
  using Element = typename E::Element;
  constexpr int sizeQ = E::template tileSize<E::BN, E::DK>, stageBytes = sizeQ * (int)sizeof(Element) + E::BN * 4;
  MOE_DYNAMIC_SHARED(shared);
  Element* const ownKeys = (Element*)(shared + E::scratchBytes);
  unsigned char* const stages = (unsigned char*)(ownKeys + E::template tileSize<E::BM, E::DK>);

  const int ld = rowPitch<E>(z), across = divUp(z.S, E::BM), B = gridDim.x / across;
  const int b = blockIdx.x / across, first = blockIdx.x % across * E::BM;
  const SeenKeys seen = SeenKeys::of(limits, z, b);
  const int64_t query = (int64_t)b * z.T;
  /// The block's first query from t on that sees any of the keys.
  const auto nextQuery = [&](int t) {
    while (t < z.T && seen.by(t) <= first) t += gridDim.y;
    return t;
  };
  const auto copyHeads = [&](int tile, int t, int head) {
    if (t < z.T) {
      Element* const stage = (Element*)(stages + tile % E::Stages * stageBytes);
      const int64_t at = (query + t) * z.J + head;
      E::template copyRows<E::BN, E::DK>(stage, q + at * ld, ld, z.J - head, ld);
      if (threadIdx.x < E::BN) cpAsync4((float*)(stage + sizeQ) + threadIdx.x, weights + at + threadIdx.x, head + (int)threadIdx.x < z.J);
    }
    cpAsyncCommit();
  };
  const int64_t key = (int64_t)b * z.S + first;
  E::template copyRows<E::BM, E::DK>(ownKeys, keys + key * ld, ld, z.S - first, ld);
  int t = nextQuery(blockIdx.y), head = 0;
  if (E::Stages > 1) copyHeads(0, t, head);

  typename E::template Accumulator<E::DK> sums = {};
  for (int tile = 0; t < z.T; tile++) {
    if (E::Stages == 1) {
      __syncthreads();
      copyHeads(tile, t, head);
    }
    cpAsyncWait<0>();
    __syncthreads();
    const bool isLast = head + E::BN >= z.J;
    const int nextT = isLast ? nextQuery(t + gridDim.y) : t, nextHead = isLast ? 0 : head + E::BN;
    if (E::Stages > 1) copyHeads(tile + 1, nextT, nextHead);
    const int limit = seen.by(t);
    const float* const slopes = dscores + (query + t) * z.S + first;
    float slope[E::Rows];
#pragma unroll
    for (int i = 0; i < E::Rows; i++) slope[i] = first + E::row(i) < limit ? slopes[E::row(i)] : 0.f;
    const Element* const stage = (const Element*)(stages + tile % E::Stages * stageBytes);
    const float* const ofHeads = (const float*)(stage + sizeQ);
    typename E::Scores p = {};
    E::template dot<E::DK>(p, ownKeys, stage);
#pragma unroll
    for (int j = 0; j < E::Columns; j++) {
      const float weight = ofHeads[E::column(j)];
#pragma unroll
      for (int i = 0; i < E::Rows; i++) E::at(p, i, j) = E::at(p, i, j) <= 0.f ? 0.f : slope[i] * weight;
    }
    // Heads that do not exist have no weight; their products with infinite keys are NaN.
    E::template add<E::DK>(sums, p, stage, shared);
    t = nextT, head = nextHead;
  }
  cpAsyncWait<0>();

#pragma unroll
  for (int i = 0; i < E::Rows; i++) {
    if (first + E::row(i) >= z.S) continue;
    storeRow<E, E::DK>(dkeys + ((int64_t)blockIdx.y * B * z.S + key + E::row(i)) * z.D, sums, i, z.D, 1.f);
  }
}

#define INDEX_SCORES_BACKWARD(blocks, name, Engine)                                                                                                       \
  MOE_KERNEL((Engine::Threads, blocks), moe_index_scores_bwd_queries_##name, (float* dq, float* dweights, const Engine::Element* q, const Engine::Element* keys, const float* weights, const float* dscores, const int* limits, int T, int J, int D, int S)) { \
    indexQueriesBackward<Engine>(dq, dweights, q, keys, weights, dscores, limits, {T, J, D, S});                                                          \
  }                                                                                                                                                       \
  MOE_KERNEL((Engine::Threads, blocks), moe_index_scores_bwd_keys_##name, (float* dkeys, const Engine::Element* q, const Engine::Element* keys, const float* weights, const float* dscores, const int* limits, int T, int J, int D, int S)) { \
    indexKeysBackward<Engine>(dkeys, q, keys, weights, dscores, limits, {T, J, D, S});                                                                    \
  }
using IndexF32 = FlashF32<128, 128>;
using IndexBf16 = FlashBf16<4, 2, 32, 128, 128>;
INDEX_SCORES_BACKWARD(2, f32, IndexF32)
INDEX_SCORES_BACKWARD(2, bf16, IndexBf16)
