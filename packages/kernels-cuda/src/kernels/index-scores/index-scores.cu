// Index scores of sparse attention: weighted sums over heads of ReLU(q . k). A block computes the products of a tile of
// keys (its rows) and the heads of one or two queries (its columns), which are summed over the heads in registers.
// Legend: B batch, T queries, J heads, D features, S keys.
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
