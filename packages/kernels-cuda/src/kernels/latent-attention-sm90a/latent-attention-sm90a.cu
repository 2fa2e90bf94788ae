// Absorbed MLA decoding on Hopper over a bf16 cache. What is computed, the split of keys and the legend are those of
// latent-attention.cu.
// A tile of the cache is copied once and is both the keys (K-major, its features are contiguous) and the values
// (MN-major). The output accumulators of 64 rows are too many for one warpgroup, so each of two has all rows and half
// of the value features. They compute the scores of alternate tiles and exchange the exponentials through shared memory
// (after the schedule of FlashMLA, DeepSeek 2025).
#include "flash-hopper.cuh"
#include "latent.cuh"

/// `DK` features of keys, of which the first DV are values; `Stages` tiles in shared memory.
template <int DK_, int DV_, int Stages_>
struct LatentHopper : WarpgroupTile<64> {
  static constexpr int BM = 64, DK = DK_, DV = DV_, Half = DV / 2, Stages = Stages_, Threads = 256;
  /// Bytes of a box: 64 features of a tile.
  static constexpr int box = BN * 128;
  static constexpr int stageBytes = DK / 64 * box, bytesQ = BM * DK * 2, bytesP = BM * BN * 2;
  /// A tile consists of three parts: the values of the first warpgroup, those of the second, and the other features.
  /// Each part is refilled as soon as it has been read.
  static constexpr int Parts = 3, Rest = 2;
  MOE_DEVICE int firstBox(int part) { return part * (Half / 64); }
  MOE_DEVICE int boxes(int part) { return part == Rest ? (DK - DV) / 64 : Half / 64; }
};

/// State shared by both warpgroups, in shared memory.
template <class E>
struct LatentBlock {
  unsigned char *queries, *stages, *exponentials;
  Barrier *full;   // [Stages][Parts]: the copy has completed
  Barrier *scored; // [2]: exponentials and maxima of an even or odd tile are available
  float *rowMaxima;    // [2][BM]: running maxima up to that tile
  float *rowSums;   // [2][BM]: one per warpgroup
  int tiles;
  Part part;
};

/// Starts the copy of a part of tile t, which may consist of several small pages. Called by one thread.
template <class E>
MOE_DEVICE void copyPart(const LatentBlock<E>& block, const TensorMap& cache, int t, int part, const LatentSizes& z) {
  unsigned char* const to = block.stages + t % E::Stages * E::stageBytes;
  Barrier* const full = &block.full[t % E::Stages * E::Parts + part];
  arriveAndExpectTx(full, E::boxes(part) * E::box);
  const int rows = z.pages == nullptr ? E::BN : min(E::BN, z.P);
  for (int row = 0; row < E::BN; row += rows) {
    const int s = block.part.from + t * E::BN + row;
    // After the last row in use there may be no page. Reading outside of a page gives zeros.
    const LatentSizes::Place at = s < block.part.to ? z.place(block.part.sequence, s) : LatentSizes::Place{0, z.P};
    for (int i = E::firstBox(part); i < E::firstBox(part) + E::boxes(part); i++) tmaLoad(to + i * E::box + row * 128, cache, full, i * 64, at.row, at.page);
  }
}

/// The main loop of one warpgroup: the scores of tiles Group, Group + 2, ..., and its half of the value features of all
/// tiles.
template <class E, int Group>
MOE_DEVICE void consumeTiles(float* out, float* lse, const TensorMap& cache, const LatentBlock<E>& block, LatentSizes z) {
  const int lane = threadIdx.x % 32, tiles = block.tiles;
  const int firstSeen = block.part.visible.keys(block.part.first / z.H);
  const float scale = z.scale * E::Unit;
  auto stageOf = [&](int t) { return block.stages + t % E::Stages * E::stageBytes; };
  const uint64_t queriesAt = warpUniform(kMajorDescriptor(block.queries, 0)), keysAt = warpUniform(kMajorDescriptor(block.stages, 0));
  const uint64_t exponentialsAt = warpUniform(kMajorDescriptor(block.exponentials, 0)), valuesAt = warpUniform(mnMajorTileDescriptor(block.stages + Group * (E::Half / 64) * E::box, E::BN));
  auto valuesOf = [&](int t) { return advanceDescriptor(valuesAt, t % E::Stages * (E::stageBytes / 16)); };
  auto waitFull = [&](int t, int part) { wait(&block.full[t % E::Stages * E::Parts + part], t / E::Stages & 1); };

  typename E::template Accumulator<E::Half> sums = {};
  float high[E::Rows], total[E::Rows], shrink[E::Rows];
#pragma unroll
  for (int i = 0; i < E::Rows; i++) high[i] = -infinity(), total[i] = 0.f;

  // Raises the running maximum to `best` and computes the factor that rescales earlier sums.
  auto updateMax = [&](int i, float best) {
    const float base = best == -infinity() ? 0.f : best;
    shrink[i] = exp2Fast(high[i] - base);
    high[i] = best;
    total[i] *= shrink[i];
    return base;
  };
  auto rescale = [&] {
    if (!__any_sync(wholeWarp, shrink[0] != 1.f || shrink[1] != 1.f)) return;
#pragma unroll
    for (int i = 0; i < E::Half / 2; i++) sums.v[i] *= shrink[i / 2 % 2];
  };
  // Rows of the last tile past the end may contain anything, and 0 times NaN is not 0. Their scores have been computed.
  auto zeroTail = [&](int t) {
    const int keys = block.part.to - block.part.from - t * E::BN;
    if (keys >= E::BN) return;
    for (int i = threadIdx.x % 128; i < (E::BN - keys) * (E::Half / 8); i += 128) {
      const int row = keys + i / (E::Half / 8), chunk = i % (E::Half / 8);
      *(uint4*)(stageOf(t) + (E::firstBox(Group) + chunk / 8) * E::box + row * 128 + chunk % 8 * 16) = make_uint4(0, 0, 0, 0);
    }
    fenceProxyAsync();
    syncWarpgroup();
  };
  // All products with this tile's values have completed: start the copy of the next tile into this stage.
  auto refill = [&](int t, bool scoredHere) {
    syncWarpgroup();
    if (threadIdx.x % 128 == 0 && t + E::Stages < tiles) {
      copyPart(block, cache, t + E::Stages, Group, z);
      if (scoredHere) copyPart(block, cache, t + E::Stages, E::Rest, z);
    }
    __syncwarp();
  };
  // sums += exponentials of a tile of the other warpgroup times its values.
  auto addOtherTile = [&](int t) {
    wait(&block.scored[t % 2], t / 2 & 1);
    waitFull(t, Group);
    zeroTail(t);
#pragma unroll
    for (int i = 0; i < E::Rows; i++) updateMax(i, block.rowMaxima[t % 2 * E::BM + E::groupRow(i)]);
    rescale();
    const uint64_t values = valuesOf(t);
    wgmmaFence(sums.v);
#pragma unroll
    for (int k = 0; k < E::BN; k += 16) wgmma<E::Half, true>(sums.v, kMajorAt(exponentialsAt, E::BM, 0, k), mnMajorAt(values, E::BN, k, 0));
    wgmmaCommit();
  };

  for (int t = Group; t < tiles; t += 2) {
    const uint64_t queries = advanceDescriptor(queriesAt), keys = advanceDescriptor(keysAt, t % E::Stages * (E::stageBytes / 16));
    typename E::Scores s = {};
    // Parts are processed in the order in which they were refilled: the first are multiplied while the last is still
    // being copied.
    const auto multiplyPart = [&](int part) {
      waitFull(t, part);
      wgmmaFence(s.v); // ptxas requires another fence after a loop
#pragma unroll
      for (int d = E::firstBox(part) * 64; d < (E::firstBox(part) + E::boxes(part)) * 64; d += 16) {
        wgmma<E::BN>(s.v, kMajorAt(queries, E::BM, 0, d), kMajorAt(keys, E::BN, 0, d));
      }
    };
    multiplyPart(Group);
    multiplyPart(E::Rest);
    multiplyPart(1 - Group);
    wgmmaCommit();
    wgmmaWait<0>(s.v);
    if (Group == 1) addOtherTile(t - 1); // overlaps with the exponentials

    const int key = block.part.from + t * E::BN;
    if (key + E::BN > firstSeen) {
#pragma unroll
      for (int i = 0; i < E::Rows; i++) {
        const int left = block.part.visible.keys((block.part.first + E::groupRow(i)) / z.H) - key - E::column(0);
#pragma unroll
        for (int j = 0; j < E::Columns; j++) E::at(s, i, j) = E::columnStep(j) < left ? E::at(s, i, j) : -infinity();
      }
    }
#pragma unroll
    for (int i = 0; i < E::Rows; i++) {
      float best = -infinity();
#pragma unroll
      for (int j = 0; j < E::Columns; j++) best = fmaxf(best, E::at(s, i, j));
      const float base = updateMax(i, fmaxf(high[i], rowMax<E>(best) * scale));
#pragma unroll
      for (int j = 0; j < E::Columns; j++) {
        float& x = E::at(s, i, j);
        x = exp2Fast(fmaf(x, scale, -base));
        total[i] += x;
      }
    }
    uint32_t p[E::BN / 16][4];
    E::pack(p, s);
    if (Group == 1) {
      computeFirst(total);
      wgmmaWait<0>(sums.v);
      refill(t - 1, false);
    }
    // This warpgroup has read the previous exponentials and has synchronized since.
#pragma unroll
    for (int k = 0; k < E::BN / 16; k++) {
#pragma unroll
      for (int r = 0; r < 4; r++) {
        const int row = E::groupRow(r % 2), chunk = k * 2 + r / 2;
        *(uint32_t*)(block.exponentials + row * 128 + (chunk ^ row % 8) * 16 + lane % 4 * 4) = p[k][r];
      }
    }
    if (lane % 4 == 0) {
#pragma unroll
      for (int i = 0; i < E::Rows; i++) block.rowMaxima[Group * E::BM + E::groupRow(i)] = high[i];
    }
    fenceProxyAsync();
    __syncwarp();
    if (lane == 0) arrive(&block.scored[Group]);
    if (t == tiles - 1) {
      syncWarpgroup(); // all scores have been computed
      zeroTail(t);
    }
    rescale();
    const uint64_t values = valuesOf(t);
    wgmmaFence(sums.v);
#pragma unroll
    for (int k = 0; k < E::BN; k += 16) wgmma<E::Half, true>(sums.v, p[k / 16], mnMajorAt(values, E::BN, k, 0));
    wgmmaCommit();
    wgmmaWait<0>(sums.v);
    refill(t, true);
    if (Group == 0 && t + 1 < tiles) {
      addOtherTile(t + 1);
      wgmmaWait<0>(sums.v);
      refill(t + 1, false);
    }
  }
  if (Group == 1 && tiles % 2 > 0) {
    addOtherTile(tiles - 1);
    wgmmaWait<0>(sums.v);
  }

#pragma unroll
  for (int i = 0; i < E::Rows; i++) {
    total[i] = rowSum<E>(total[i]);
    if (lane % 4 == 0) block.rowSums[Group * E::BM + E::groupRow(i)] = total[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < E::Rows; i++) {
    const int row = E::groupRow(i);
    const bool exists = block.part.first + row < z.T * z.H;
    const float sum = block.rowSums[row] + block.rowSums[E::BM + row];
    const int64_t to = partRow(z, block.part, block.part.first + row);
    if (exists && Group == 0 && lane % 4 == 0 && gridDim.y > 1) lse[to] = sum == 0.f ? -infinity() : high[i] * (1.f / E::Unit) + logf(sum);
    storeRowIf<E, E::Half>(exists, out + to * z.V + Group * E::Half, sums, i, z.V - Group * E::Half, sum == 0.f ? 0.f : 1.f / sum);
  }
}

/// A block computes a tile of the T x H query rows of one sequence for one split of its keys (Part).
template <class E>
MOE_DEVICE void latentAttention(float* out, float* lse, const float* q, const TensorMap& cache, const int* lengths, LatentSizes z) {
  MOE_DYNAMIC_SHARED(dynamic);
  MOE_SHARED(Barrier, full, [E::Stages * E::Parts]);
  MOE_SHARED(Barrier, scored, [2]);
  MOE_SHARED(float, rowMaxima, [2 * E::BM]);
  MOE_SHARED(float, rowSums, [2 * E::BM]);
  LatentBlock<E> block;
  block.queries = warpUniform(dynamic + (-sharedAddress(dynamic) & 1023));
  block.stages = block.queries + E::bytesQ;
  block.exponentials = block.stages + E::Stages * E::stageBytes;
  block.full = warpUniform(full), block.scored = warpUniform(scored), block.rowMaxima = rowMaxima, block.rowSums = rowSums;
  block.part = Part::of<E::BM, E::BN>(lengths, z);
  block.tiles = divUp(block.part.to - block.part.from, E::BN);

  if (threadIdx.x == 0) {
    for (int i = 0; i < E::Stages * E::Parts; i++) initBarrier(&full[i], 1);
    for (int i = 0; i < 2; i++) initBarrier(&scored[i], 4); // one arrival per warp
    fenceBarrierInit();
    for (int t = 0; t < min(E::Stages, block.tiles); t++) {
      for (int part = 0; part < E::Parts; part++) copyPart(block, cache, t, part, z);
    }
  }
  q += ((int64_t)block.part.sequence * z.T * z.H + block.part.first) * z.C;
  for (int i = threadIdx.x; i < E::BM * (E::DK / 8); i += E::Threads) {
    const int row = i / (E::DK / 8), chunk = i % (E::DK / 8);
    float4 a = make_float4(0.f, 0.f, 0.f, 0.f), b = a;
    if (block.part.first + row < z.T * z.H && chunk * 8 < z.C) {
      a = *(const float4*)(q + (int64_t)row * z.C + chunk * 8);
      b = *(const float4*)(q + (int64_t)row * z.C + chunk * 8 + 4);
    }
    const uint4 eight = make_uint4(packBf16(a.x, a.y), packBf16(a.z, a.w), packBf16(b.x, b.y), packBf16(b.z, b.w));
    *(uint4*)(block.queries + (chunk / 8 * E::BM + row) * 128 + (chunk ^ row) % 8 * 16) = eight;
  }
  fenceProxyAsync();
  __syncthreads();
  if (__shfl_sync(wholeWarp, (int)threadIdx.x / 128, 0) == 0) consumeTiles<E, 0>(out, lse, cache, block, z);
  else consumeTiles<E, 1>(out, lse, cache, block, z);
}

#define LATENT_ATTENTION(name, Engine)                                                                                                                       \
  MOE_KERNEL((Engine::Threads, 1), moe_latent_attention_sm90a_##name, (float* out, float* lse, const float* q, const __grid_constant__ TensorMap cache, const int* lengths, int B, int T, int S, int H, int C, int V, float scale, const int* pages, int P)) { \
    latentAttention<Engine>(out, lse, q, cache, lengths, {B, T, S, H, C, V, scale, pages, P});                                                                \
  }
using Large = LatentHopper<576, 512, 2>;
using Medium = LatentHopper<320, 256, 4>;
using Small = LatentHopper<192, 128, 4>;
LATENT_ATTENTION(576_512, Large)
LATENT_ATTENTION(320_256, Medium)
LATENT_ATTENTION(192_128, Small)
