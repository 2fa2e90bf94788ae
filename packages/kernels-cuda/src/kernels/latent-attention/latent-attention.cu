// Absorbed MLA decoding with split keys (flash-decoding): keys are the rows of the latent cache, values their first V
// features. A block computes a tile of the T x H query rows of one sequence for one split of its keys (Part); a second
// kernel combines the splits in order.
// Legend: B batch, T queries, H heads, S rows of the cache that a sequence has room for, C features, V value features,
// P rows of a page; row r of a sequence = query r / H, head r % H.
#include "four.cuh"
#include "latent.cuh"

constexpr int mostC = 576, mostV = 512;

/// Tiles of BN cache rows in bf16 in shared memory, with zeros from C to a multiple of 16 and past the last key.
/// `fetch` starts the copy of tile t: a warp copies whole rows. `land` converts what the same thread has copied to
/// bf16, if the cache is f32.
template <class Cache, int BN, int Threads>
struct KeyTiles;

template <int BN, int Threads>
struct KeyTiles<float, BN, Threads> {
  static constexpr int sharedBytes = BN * mostC * (2 + 4);
  MOE_DEVICE bf16* tile(unsigned char* shared, int) { return (bf16*)shared; }
  MOE_DEVICE float* raw(unsigned char* shared) { return (float*)(shared + BN * mostC * 2); }

  MOE_DEVICE void fetch(unsigned char* shared, int t, const float* cache, Part part, const LatentSizes& z) {
    for (int row = threadIdx.x / 32; row < BN; row += Threads / 32) {
      const int s = part.from + t * BN + row;
      const float* const keys = cache + (s < part.to ? z.rowOf(part.sequence, s) : 0) * z.C;
      float* const to = raw(shared) + row * mostC;
      for (int c = threadIdx.x % 32 * 4; c < z.C; c += 128) cpAsync16(to + c, keys + c, s < part.to);
    }
    cpAsyncCommit();
  }
  MOE_DEVICE void land(unsigned char* shared, int C) {
    for (int row = threadIdx.x / 32; row < BN; row += Threads / 32) {
      const float* const from = raw(shared) + row * mostC;
      for (int c = threadIdx.x % 32 * 4; c < divUp(C, 16) * 16; c += 128) {
        const float4 x = c < C ? *(const float4*)(from + c) : make_float4(0.f, 0.f, 0.f, 0.f);
        storeWideShared(tile(shared, 0) + swizzledOffset<mostC>(row, c / 8) + c % 8, packBf16(x.x, x.y), packBf16(x.z, x.w));
      }
    }
  }
};

template <int BN, int Threads>
struct KeyTiles<bf16, BN, Threads> {
  static constexpr int sharedBytes = 2 * BN * mostC * 2;
  MOE_DEVICE bf16* tile(unsigned char* shared, int t) { return (bf16*)shared + t % 2 * (BN * mostC); }

  MOE_DEVICE void fetch(unsigned char* shared, int t, const bf16* cache, Part part, const LatentSizes& z) {
    for (int row = threadIdx.x / 32; row < BN; row += Threads / 32) {
      const int s = part.from + t * BN + row;
      const bf16* const keys = cache + (s < part.to ? z.rowOf(part.sequence, s) : 0) * z.C;
      for (int c = threadIdx.x % 32 * 8; c < divUp(z.C, 16) * 16; c += 256) {
        cpAsync16(tile(shared, t) + swizzledOffset<mostC>(row, c / 8), keys + c, s < part.to && c < z.C);
      }
    }
    cpAsyncCommit();
  }
  MOE_DEVICE void land(unsigned char*, int) {}
};

/// bf16 on tensor cores. For scores, a warp has 16 x 16 of the BM x BN tile; for values, 32 x 128 of BM x mostV.
/// Exponentials and row statistics are exchanged through shared memory.
template <class Cache, int BM, int BN>
MOE_DEVICE void latentBf16(float* out, float* lse, const float* q, const Cache* cache, const int* lengths, LatentSizes z) {
  constexpr int Threads = BM * 4, columnWarps = BN / 16, scoreWarps = BM / 16 * columnWarps, MT = 2, NT = 16;
  using Keys = KeyTiles<Cache, BN, Threads>;
  constexpr int LP = BN == 16 ? 32 : BN; // row stride of the tile of exponentials
  MOE_DYNAMIC_SHARED(shared);
  bf16* const queries = (bf16*)shared;
  unsigned char* const keys = shared + BM * mostC * 2;
  bf16* const exponentials = (bf16*)(keys + Keys::sharedBytes);
  float* const perRow = (float*)(exponentials + BM * LP); // [columnWarps][BM]: maxima, finally sums

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, rows = z.T * z.H, C16 = divUp(z.C, 16) * 16;
  const Part part = Part::of<BM, BN>(lengths, z);
  const int first = part.first;
  const int tiles = divUp(part.to - part.from, BN);
  q += ((int64_t)part.sequence * rows + first) * z.C;
  auto fetch = [&](int t) {
    if (t < tiles) Keys::fetch(keys, t, cache, part, z);
  };
  fetch(0);

  for (int row = warp; row < BM; row += Threads / 32) {
    for (int c = lane * 2; c < C16; c += 64) {
      const float* const x = q + (int64_t)row * z.C + c;
      const bool exists = first + row < rows;
      const uint32_t pair = packBf16(exists && c < z.C ? x[0] : 0.f, exists && c + 1 < z.C ? x[1] : 0.f);
      *(uint32_t*)(queries + swizzledOffset<mostC>(row, c / 8) + c % 8) = pair;
    }
  }

  // This thread's rows of scores and rows of values, with the running maximum of each.
  const int scoreRow = warp / columnWarps * 16 + lane / 4, scoreColumn = warp % columnWarps * 16;
  const int valueRow = warp / 4 * 32, valueColumn = warp % 4 * 128;
  const bool scoring = warp < scoreWarps;
  int seen[2];
  float high[2], total[2] = {0.f, 0.f}, valueHigh[4];
#pragma unroll
  for (int i = 0; i < 2; i++) seen[i] = part.visible.keys((first + scoreRow + i * 8) / z.H), high[i] = -infinity();
#pragma unroll
  for (int i = 0; i < 4; i++) valueHigh[i] = -infinity();
  const float factor = z.scale * 1.4426950408889634f;
  float sums[MT][NT][4] = {};

  for (int t = 0; t < tiles; t++) {
    cpAsyncWait<0>();
    Keys::land(keys, z.C);
    __syncthreads();
    fetch(t + 1);
    const bf16* const tile = Keys::tile(keys, t);

    float s[2][4] = {};
    if (scoring) {
#pragma unroll 4
      for (int k = 0; k < C16; k += 16) {
        uint32_t left[4], right[4];
        loadA<mostC, false>(left, queries, warp / columnWarps * 16, k);
        loadB<mostC, false>(right, tile, scoreColumn, k);
        mmaBf16(s[0], left, right[0], right[1]);
        mmaBf16(s[1], left, right[2], right[3]);
      }
#pragma unroll
      for (int i = 0; i < 2; i++) {
        float best = -infinity();
#pragma unroll
        for (int j = 0; j < 4; j++) {
          float& x = s[j / 2][i * 2 + j % 2];
          const int key = part.from + t * BN + scoreColumn + j / 2 * 8 + lane % 4 * 2 + j % 2;
          x = key < seen[i] ? x * factor : -infinity();
          best = fmaxf(best, x);
        }
        best = joinLanes<Max>(best, 4);
        if (lane % 4 == 0) perRow[warp % columnWarps * BM + scoreRow + i * 8] = best;
      }
    }
    __syncthreads();

    auto updateMax = [&](float& highest, int row) { // raises the maximum and returns the factor that rescales earlier sums
      float best = highest;
#pragma unroll
      for (int w = 0; w < columnWarps; w++) best = fmaxf(best, perRow[w * BM + row]);
      const float shrink = exp2Fast(highest - (best == -infinity() ? 0.f : best));
      highest = best;
      return shrink;
    };
    if (scoring) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int row = scoreRow + i * 8;
        total[i] *= updateMax(high[i], row);
        const float base = high[i] == -infinity() ? 0.f : high[i];
#pragma unroll
        for (int j = 0; j < 2; j++) {
          const float a = exp2Fast(s[j][i * 2] - base), b = exp2Fast(s[j][i * 2 + 1] - base);
          total[i] += a + b;
          *(uint32_t*)(exponentials + swizzledOffset<LP>(row, scoreColumn / 8 + j) + lane % 4 * 2) = packBf16(a, b);
        }
      }
    }
    float shrink[4];
#pragma unroll
    for (int i = 0; i < 4; i++) shrink[i] = updateMax(valueHigh[i], valueRow + i * 8 + lane / 4);
    if (__any_sync(wholeWarp, shrink[0] != 1.f || shrink[1] != 1.f || shrink[2] != 1.f || shrink[3] != 1.f)) {
#pragma unroll
      for (int i = 0; i < MT; i++) {
#pragma unroll
        for (int j = 0; j < NT; j++) {
#pragma unroll
          for (int r = 0; r < 4; r++) sums[i][j][r] *= shrink[i * 2 + r / 2];
        }
      }
    }
    __syncthreads();

#pragma unroll
    for (int k = 0; k < BN; k += 16) {
      uint32_t left[MT][4], right[4];
#pragma unroll
      for (int i = 0; i < MT; i++) loadA<LP, false>(left[i], exponentials, valueRow + i * 16, k);
#pragma unroll
      for (int j = 0; j < NT; j += 2) {
        if (valueColumn + j * 8 >= z.V) continue;
        loadB<mostC, true>(right, tile, valueColumn + j * 8, k);
#pragma unroll
        for (int i = 0; i < MT; i++) {
          mmaBf16(sums[i][j], left[i], right[0], right[1]);
          mmaBf16(sums[i][j + 1], left[i], right[2], right[3]);
        }
      }
    }
    __syncthreads(); // the tile and the exponentials are overwritten next
  }
  cpAsyncWait<0>();

  if (scoring) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      total[i] = joinLanes<Sum>(total[i], 4);
      if (lane % 4 == 0) perRow[warp % columnWarps * BM + scoreRow + i * 8] = total[i];
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int row = valueRow + i * 8 + lane / 4;
    if (first + row >= rows) continue;
    float sum = 0.f;
    for (int w = 0; w < columnWarps; w++) sum += perRow[w * BM + row];
    const float inverse = sum == 0.f ? 0.f : 1.f / sum;
    const int64_t to = partRow(z, part, first + row);
    if (lane % 4 == 0 && warp % 4 == 0 && gridDim.y > 1) {
      lse[to] = sum == 0.f ? -infinity() : valueHigh[i] * 0.6931471805599453f + logf(sum);
    }
#pragma unroll
    for (int j = 0; j < NT; j++) {
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const int column = valueColumn + j * 8 + lane % 4 * 2 + r;
        if (column < z.V) out[to * z.V + column] = sums[i / 2][j][i % 2 * 2 + r] * inverse;
      }
    }
  }
}

/// Copies a row of C features to shared memory as f32, by 16 threads, padded with zeros to a multiple of 4. A row that
/// does not exist is all zeros.
MOE_DEVICE void copyRowF32(float* to, const float* from, int C, bool exists) {
  for (int c = threadIdx.x % 16 * 4; c < divUp(C, 4) * 4; c += 64) {
    if (C % 4 == 0) cpAsync16(to + c, from + c, exists);
    else {
      for (int i = c; i < c + 4; i++) cpAsync4(to + i, from + i, exists && i < C);
    }
  }
  cpAsyncCommit();
}
MOE_DEVICE void copyRowF32(float* to, const bf16* from, int C, bool exists) {
  for (int c = threadIdx.x % 16; c < divUp(C, 4) * 4; c += 16) to[c] = exists && c < C ? toFloat(from[c]) : 0.f;
}

/// f32 on CUDA cores: 16 rows against 16 keys, 16 threads per row, each with one score and mostV / 16 outputs.
template <class Cache>
MOE_DEVICE void latentF32(float* out, float* lse, const float* q, const Cache* cache, const int* lengths, LatentSizes z) {
  constexpr int BM = 16, BN = 16, L = mostC + 4; // padded by four elements: eight rows are in different banks
  MOE_DYNAMIC_SHARED(shared);
  float* const queries = (float*)shared;
  float* const tile = queries + BM * L;
  float* const exponentials = tile + BN * L; // [BM][BN + 1]

  const int rows = z.T * z.H, C4 = divUp(z.C, 4) * 4;
  const Part part = Part::of<BM, BN>(lengths, z);
  const int row = threadIdx.x / 16, lane = threadIdx.x % 16, r = part.first + row;
  copyRowF32(queries + row * L, q + ((int64_t)part.sequence * rows + r) * z.C, z.C, r < rows);

  const int seen = part.visible.keys(r / z.H);
  float high = -infinity(), total = 0.f, sums[mostV / 16] = {};
  for (int key = part.from; key < part.to; key += BN) {
    __syncthreads();
    const bool exists = key + row < part.to;
    copyRowF32(tile + row * L, cache + (exists ? z.rowOf(part.sequence, key + row) : 0) * z.C, z.C, exists);
    cpAsyncWait<0>();
    __syncthreads();
    float s = 0.f;
#pragma unroll 4
    for (int c = 0; c < C4; c += 4) {
      const float4 x = *(const float4*)(queries + row * L + c), y = *(const float4*)(tile + lane * L + c);
      s = fmaf(x.x, y.x, s), s = fmaf(x.y, y.y, s), s = fmaf(x.z, y.z, s), s = fmaf(x.w, y.w, s);
    }
    s = key + lane < seen ? s * z.scale : -infinity();
    const float best = joinLanes<Max>(fmaxf(high, s), 16);
    const float base = best == -infinity() ? 0.f : best, shrink = expf(high - base), p = expf(s - base);
    high = best;
    total = total * shrink + p;
    __syncwarp();
    exponentials[row * (BN + 1) + lane] = p;
    __syncwarp();
#pragma unroll
    for (int j = 0; j < mostV / 16; j++) sums[j] *= shrink;
#pragma unroll 2
    for (int k = 0; k < BN; k++) {
      const float left = exponentials[row * (BN + 1) + k];
#pragma unroll
      for (int j = 0; j < mostV / 16; j += 4) {
        if (j * 16 + lane * 4 >= z.V) continue;
        const float4 y = *(const float4*)(tile + k * L + j * 16 + lane * 4);
        sums[j] = fmaf(left, y.x, sums[j]), sums[j + 1] = fmaf(left, y.y, sums[j + 1]);
        sums[j + 2] = fmaf(left, y.z, sums[j + 2]), sums[j + 3] = fmaf(left, y.w, sums[j + 3]);
      }
    }
  }
  cpAsyncWait<0>();
  total = joinLanes<Sum>(total, 16);
  if (r >= rows) return;
  const float inverse = total == 0.f ? 0.f : 1.f / total;
  const int64_t to = partRow(z, part, r);
  if (lane == 0 && gridDim.y > 1) lse[to] = total == 0.f ? -infinity() : high + logf(total);
#pragma unroll
  for (int j = 0; j < mostV / 16; j++) {
    const int column = j / 4 * 64 + lane * 4 + j % 4;
    if (column < z.V) out[to * z.V + column] = sums[j] * inverse;
  }
}

#define LATENT_ATTENTION(bounds, name, Cache, body)                                                                                                          \
  MOE_KERNEL(bounds, moe_latent_attention_##name, (float* out, float* lse, const float* q, const Cache* cache, const int* lengths, int B, int T, int S, int H, int C, int V, float scale, const int* pages, int P)) { \
    body(out, lse, q, cache, lengths, {B, T, S, H, C, V, scale, pages, P});                                                                                   \
  }
// The name: arithmetic, tile, and dtype of the cache.
LATENT_ATTENTION((256, 1), bf16_64x32_f32, float, (latentBf16<float, 64, 32>))
LATENT_ATTENTION((256, 1), bf16_64x32_bf16, bf16, (latentBf16<bf16, 64, 32>))
LATENT_ATTENTION((128, 1), bf16_32x16_f32, float, (latentBf16<float, 32, 16>))
LATENT_ATTENTION((128, 1), bf16_32x16_bf16, bf16, (latentBf16<bf16, 32, 16>))
LATENT_ATTENTION((256), f32_16x16_f32, float, latentF32<float>)
LATENT_ATTENTION((256), f32_16x16_bf16, bf16, latentF32<bf16>)

/// out [V] = the weighted sum of `count` rows, `stride` elements apart, by a block of `Threads` threads. Whole: V is a
/// multiple of 4.
template <int Threads, bool Whole>
MOE_DEVICE void addRows(float* out, const float* from, int64_t stride, const float* weights, int count, int V) {
  for (int d = 4 * (int)threadIdx.x; d < V; d += 4 * Threads) {
    Four sum = {};
#pragma unroll 8
    for (int p = 0; p < count; p++) {
      const Four part = load4<Whole>(from + p * stride, d, V);
#pragma unroll
      for (int i = 0; i < 4; i++) sum.v[i] = fmaf(weights[p], part.v[i], sum.v[i]);
    }
    store4<Whole>(out, d, V, sum);
  }
}

/// out [rows, V] = the splits' results, weighted by their share of the total sum of exponentials. One block per row.
/// There are at most as many splits as threads: each thread reads the log-sum-exp of one, so that the block waits for
/// memory only once.
MOE_KERNEL((128), moe_latent_attention_combine_f32, (float* out, const float* parts, const float* lse, int count, int64_t rows, int V)) {
  constexpr int threads = 128;
  MOE_SHARED(float, weights, [threads]);
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const float own = (int)threadIdx.x < count ? lse[threadIdx.x * rows + row] : -infinity();
    const float high = blockMax<threads>(own);
    const float exponential = expf(own - (high == -infinity() ? 0.f : high));
    const float total = blockSum<threads>(exponential);
    weights[threadIdx.x] = total == 0.f ? 0.f : exponential / total;
    __syncthreads();
    if (V % 4 == 0) addRows<threads, true>(out + row * V, parts + row * V, rows * V, weights, count, V);
    else addRows<threads, false>(out + row * V, parts + row * V, rows * V, weights, count, V);
  }
}
