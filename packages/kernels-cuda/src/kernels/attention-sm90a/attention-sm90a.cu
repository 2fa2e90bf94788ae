// Flash attention forward on Hopper (after Shah et al. 2024, without their overlap within a warpgroup). Legend as in attention.cu; features lie
// padded in q [B, T, H * DK] and k [B, S, G * DK]; v is transposed to [B, G * Dv, S], so that every operand is [outer][k].
#include "flash.cuh"
#include "hopper.cuh"

/// Two warpgroups of 64 queries each, and a warp that copies; an engine for the softmax and the stores of flash.cuh.
template <int DK_, int DV_>
struct FlashHopper {
  static constexpr int BM = 128, BN = 128, DK = DK_, DV = DV_, Copying = 8, Threads = (Copying + 1) * 32, Stages = 2;
  static constexpr int Rows = 2, Columns = BN / 4, RowLanes = 4, Run = 2;
  static constexpr int bytesQ = BM * DK * 2, bytesK = BN * DK * 2, bytesV = DV * BN * 2, stageBytes = bytesK + bytesV;
  static constexpr float Unit = 1.4426950408889634f;
  MOE_DEVICE float exponential(float x) { return exp2Fast(x); }

  struct Scores {
    float v[BN / 2];
  };
  template <int D>
  struct Sums {
    float v[D / 2];
  };
  MOE_DEVICE float& at(Scores& s, int i, int j) { return s.v[j / 2 * 4 + i * 2 + j % 2]; }
  template <int D>
  MOE_DEVICE float& at(Sums<D>& s, int i, int j) { return s.v[j / 2 * 4 + i * 2 + j % 2]; }
  MOE_DEVICE int row(int i) { return threadIdx.x / 32 * 16 + i * 8 + threadIdx.x % 32 / 4; }
  MOE_DEVICE int column(int j) { return j / 2 * 8 + threadIdx.x % 4 * 2 + j % 2; }
  template <int D>
  static constexpr int sumColumns = D / 4;
  template <int D>
  MOE_DEVICE int sumColumn(int j) { return column(j); }

  /// Element (row, k) of a tile of `rows` rows, of which 64 k at a time lie together.
  MOE_DEVICE uint64_t operand(const unsigned char* tile, int rows, int row, int k) { return operandAt(tile + (k / 64 * rows + row) * 128, k % 64); }
};

struct Sizes {
  int T, S, H, G, Dv, causal;
  float scale;
};

/// One block: BM queries of head blockIdx.y of batch blockIdx.z, all keys that they see, BN at a time.
template <class E>
MOE_DEVICE void attention(float* out, float* lse, const TensorMap& q, const TensorMap& k, const TensorMap& v, const int* lengths, Sizes z) {
  MOE_DYNAMIC_SHARED(dynamic);
  MOE_SHARED(Barrier, ready, [1]);
  MOE_SHARED(Barrier, full, [E::Stages]);
  MOE_SHARED(Barrier, empty, [E::Stages]);
  unsigned char* const queries = dynamic + (-sharedAddress(dynamic) & 1023);
  unsigned char* const stages = queries + E::bytesQ;
  if (threadIdx.x == 0) {
    initBarrier(ready, 1);
    for (int s = 0; s < E::Stages; s++) {
      initBarrier(&full[s], 1);
      initBarrier(&empty[s], E::Copying); // one arrival of each multiplying warp
    }
    fenceBarriers();
  }
  __syncthreads();

  // The last queries see the most keys: they begin first.
  const int b = blockIdx.z, h = blockIdx.y, g = h / (z.H / z.G), first = (gridDim.x - 1 - blockIdx.x) * E::BM;
  const Visible visible = Visible::of(z.T, z.S, lengths, b, z.causal);
  const int end = visible.keys(min(first + E::BM, z.T) - 1), seenByAll = visible.keys(first);
  const int warp = __shfl_sync(wholeWarp, (int)threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  int stage = 0, parity = 0;
  auto next = [&] {
    if (++stage == E::Stages) stage = 0, parity ^= 1;
  };
  if (warp == E::Copying) {
    if (lane > 0 || end == 0) return;
    arriveAndExpect(ready, E::bytesQ);
    for (int d = 0; d < E::DK; d += 64) copyBox(queries + d * E::BM * 2, q, ready, h * E::DK + d, first, b);
    for (int key = 0; key < end; key += E::BN, next()) {
      unsigned char* const to = stages + stage * E::stageBytes;
      wait(&empty[stage], parity ^ 1);
      arriveAndExpect(&full[stage], E::stageBytes);
      for (int d = 0; d < E::DK; d += 64) copyBox(to + d * E::BN * 2, k, &full[stage], g * E::DK + d, key, b);
      for (int s = 0; s < E::BN; s += 64) copyBox(to + E::bytesK + s * E::DV * 2, v, &full[stage], key + s, g * z.Dv, b);
    }
    return;
  }

  typename E::template Sums<E::DV> sums = {};
  OnlineSoftmax<E> softmax;
  OnlineSoftmax<E>::begin(softmax);
  if (end > 0) wait(ready, 0);
  for (int key = 0; key < end; key += E::BN, next()) {
    const unsigned char* const keys = stages + stage * E::stageBytes;
    const unsigned char* const values = keys + E::bytesK;
    typename E::Scores s = {};
    wait(&full[stage], parity);
    fenceProducts(s.v);
#pragma unroll
    for (int d = 0; d < E::DK; d += 16) multiplyGroup<E::BN>(s.v, E::operand(queries, E::BM, warp / 4 * 64, d), E::operand(keys, E::BN, 0, d));
    commitProducts();
    waitProducts<0>(s.v);

    const bool whole = key + E::BN <= seenByAll;
#pragma unroll
    for (int i = 0; i < E::Rows; i++) {
      const int seen = whole ? z.S : visible.keys(first + E::row(i));
#pragma unroll
      for (int j = 0; j < E::Columns; j++) {
        float& x = E::at(s, i, j);
        x = key + E::column(j) < seen ? x * (z.scale * E::Unit) : -infinity();
      }
    }
    OnlineSoftmax<E>::template update<E::DV>(softmax, s, sums);
    uint32_t p[E::BN / 16][4];
#pragma unroll
    for (int i = 0; i < E::BN / 4; i++) p[i / 4][i % 4] = packBf16(s.v[2 * i], s.v[2 * i + 1]);
    fenceProducts(sums.v);
#pragma unroll
    for (int j = 0; j < E::BN; j += 16) multiplyGroup<E::DV>(sums.v, p[j / 16], E::operand(values, E::DV, 0, j));
    commitProducts();
    waitProducts<0>(sums.v);
    if (lane == 0) arrive(&empty[stage]);
  }

#pragma unroll
  for (int i = 0; i < E::Rows; i++) {
    float rowLse;
    const float factor = OnlineSoftmax<E>::finish(softmax, i, rowLse);
    const int t = first + E::row(i);
    if (t >= z.T) continue;
    if (E::column(0) == 0) lse[((int64_t)b * z.H + h) * z.T + t] = rowLse;
    storeRow<E, E::DV>(out + (((int64_t)b * z.T + t) * z.H + h) * z.Dv, sums, i, z.Dv, factor);
  }
}

#define ATTENTION(name, Engine)                                                                                                                              \
  MOE_KERNEL((Engine::Threads, 1), moe_attention_fwd_sm90a_##name, (float* out, float* lse, const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k, const __grid_constant__ TensorMap v, const int* lengths, int T, int S, int H, int G, int Dv, int causal, float scale)) { \
    attention<Engine>(out, lse, q, k, v, lengths, {T, S, H, G, Dv, causal, scale});                                                      \
  }
using Small = FlashHopper<64, 64>;
using Medium = FlashHopper<128, 128>;
using Large = FlashHopper<192, 128>;
ATTENTION(64_64, Small)
ATTENTION(128_128, Medium)
ATTENTION(192_128, Large)
