// Routed experts in bf16: the grouped products, with SwiGLU in the epilogue of the first, and the gathers, sums and
// gradients between them. Rows are M = N K slots in expert order.
// Legend: `slots` maps rows to slots (slot = token * K + choice; a row whose slot is not 0 .. M-1 is unused), `places`
// maps slots to rows. A row has `ld` elements, a multiple of 8; gate and up, which are tensors, have I.
#include "expert-tile.cuh"
#include "fp8-rows.cuh"
#include "gated-tile.cuh"

struct Eight {
  float v[8];
};
template <class F>
MOE_DEVICE Eight eight(F&& f) {
  return {{f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7)}};
}
/// Elements i .. i+7 of a row of n bf16. Whole: n is a multiple of 8.
template <bool Whole>
MOE_DEVICE Eight load8(const bf16* row, int i, int n) {
  if constexpr (Whole) {
    const uint4 x = *(const uint4*)(row + i);
    return {{lowBf16(x.x), highBf16(x.x), lowBf16(x.y), highBf16(x.y), lowBf16(x.z), highBf16(x.z), lowBf16(x.w), highBf16(x.w)}};
  } else {
    return eight([&](int j) { return i + j < n ? toFloat(row[i + j]) : 0.f; });
  }
}
MOE_DEVICE void store8(bf16* to, const Eight& x) {
  *(uint4*)to = make_uint4(packBf16(x.v[0], x.v[1]), packBf16(x.v[2], x.v[3]), packBf16(x.v[4], x.v[5]), packBf16(x.v[6], x.v[7]));
}

/// Calls f(i) for this lane's i = 0, 8, 16 .. below n within the block's slice.
template <class F>
MOE_DEVICE void eachEightOfSlice(int n, F&& f) {
  const int begin = (int)blockIdx.y * rowSlice, end = begin + rowSlice < n ? begin + rowSlice : n;
  for (int i = begin + 8 * (int)(threadIdx.x % 32); i < end; i += 256) f(i);
}

/// to[r] = from[slots[r] / K], or zeros if the row is unused.
MOE_KERNEL((256), moe_routed_experts_gather_bf16, (bf16* to, const bf16* __restrict__ from, const int* slots, int64_t rows, int K, int64_t tokens, int ld)) {
  const int64_t r = rowOfWarp();
  if (r >= rows) return;
  const int slot = slots[r];
  const int64_t token = slot < 0 ? tokens : slot / K;
  eachEightOfSlice(ld, [&](int i) {
    *(uint4*)(to + r * ld + i) = token < tokens ? *(const uint4*)(from + token * ld + i) : make_uint4(0, 0, 0, 0);
  });
}

/// out[n] = sum over k of weights[n, k] * y[places[n K + k]], where y has `rows` rows. Without weights, all are 1. Of
/// 256 features, a lane has four and another four 128 further on, so that neighbouring lanes store neighbouring
/// addresses; eight neighbours per lane would be two stores, each filling half of every sector. (Rows that are not
/// whole use only four, because of registers.)
template <bool Whole>
MOE_DEVICE void combine(float* out, const bf16* y, const float* weights, const int* places, int64_t tokens, int K, int64_t rows, int D, int ld) {
  const int64_t n = rowOfWarp();
  if (n >= tokens) return;
  constexpr int Parts = Whole ? 2 : 1;
  const int begin = (int)blockIdx.y * rowSlice, end = begin + rowSlice < D ? begin + rowSlice : D;
  for (int i = begin + 4 * (int)(threadIdx.x % 32); i < end; i += 128 * Parts) {
    Four total[Parts] = {};
    addSlots(total, weights, places, n, K, rows, [&](int64_t row, Four (&part)[Parts], bool exists) {
#pragma unroll
      for (int p = 0; p < Parts; p++) part[p] = exists && i + 128 * p < end ? load4<Whole>(y + row * ld, i + 128 * p, D) : Four{};
    });
#pragma unroll
    for (int p = 0; p < Parts; p++) {
      if (i + 128 * p < end) store4<Whole>(out + n * D, i + 128 * p, D, total[p]);
    }
  }
}
MOE_KERNEL((256), moe_routed_experts_combine_bf16, (float* out, const bf16* y, const float* weights, const int* places, int64_t tokens, int K, int64_t rows, int D, int ld)) {
  if (D % 4 == 0) combine<true>(out, y, weights, places, tokens, K, rows, D, ld);
  else combine<false>(out, y, weights, places, tokens, K, rows, D, ld);
}

/// SwiGLU's gradient, from dinner as if every slot's weight were 1: dgate and dup with the slot's weight, inner times
/// the weight, and dweights, the dot product of dinner and inner. Outputs that are null are skipped. dgate may be
/// dinner. gate and up are indexed by position in expert order, everything else by row. One warp per row.
template <bool Whole>
MOE_DEVICE void swigluGradient(bf16* dgate, bf16* dup, bf16* weighted, float* dweights, const bf16* dinner, const bf16* gate, const bf16* up, const float* weights,
                               const int* slots, const int* positions, int64_t rows, int M, int I, int ld) {
  const int64_t r = rowOfWarp();
  if (r >= rows) return;
  const int slot = slots[r];
  const int64_t p = slot >= 0 && slot < M ? positions[slot] : -1;
  const bool valid = p >= 0 && p < M;
  const float weight = valid ? weights[slot] : 0.f;
  float dot = 0.f;
  for (int i = 8 * (int)(threadIdx.x % 32); i < ld; i += 256) {
    Eight dg = {}, du = {}, in = {};
    if (valid) {
      const Eight d = load8<Whole>(dinner + r * ld, i, I), g = load8<Whole>(gate + p * I, i, I), u = load8<Whole>(up + p * I, i, I);
#pragma unroll
      for (int j = 0; j < 8; j++) {
        const SwigluSlopes own = swigluSlopes(d.v[j], g.v[j], u.v[j], weight);
        dg.v[j] = own.dgate;
        du.v[j] = own.dup;
        in.v[j] = own.weighted;
        dot += own.dweight;
      }
    }
    if (dgate != nullptr) store8(dgate + r * ld + i, dg);
    if (dup != nullptr) store8(dup + r * ld + i, du);
    if (weighted != nullptr) store8(weighted + r * ld + i, in);
  }
  dot = warpSum(dot);
  if (dweights != nullptr && valid && threadIdx.x % 32 == 0) dweights[slot] = dot;
}
MOE_KERNEL((256), moe_routed_experts_swiglu_bwd_bf16,
           (bf16* dgate, bf16* dup, bf16* weighted, float* dweights, const bf16* dinner, const bf16* gate, const bf16* up, const float* weights, const int* slots,
            const int* positions, int64_t rows, int M, int I, int ld)) {
  if (I % 8 == 0) swigluGradient<true>(dgate, dup, weighted, dweights, dinner, gate, up, weights, slots, positions, rows, M, I, ld);
  else swigluGradient<false>(dgate, dup, weighted, dweights, dinner, gate, up, weights, slots, positions, rows, M, I, ld);
}

/// y [rows, n] = x [rows, k] times the weight of each row's expert: [n, k] if TransposeW; otherwise [k, n], summed over
/// `pairs` (1 or 2) pairs of x and weight.
template <class Tile, bool TransposeW>
MOE_DEVICE void product(bf16* y, const bf16* x, const bf16* weight, const bf16* x2, const bf16* weight2, int pairs, const int* offsets, int rows, int n, int k, int experts, int ldy, int ldx,
                        int ldw) {
  MOE_DYNAMIC_SHARED(shared);
  const int2 tile = rasterize(blockIdx.x, min(rows, divUp(rows, Tile::BM) + experts), divUp(n, Tile::BN));
  const ExpertTile found = expertTile<Tile::BM>(offsets, experts, rows, tile.x);
  if (found.expert < 0) return;
  const int column = tile.y * Tile::BN;
  typename Tile::Accumulator sums = {};
  if (found.expert < experts) {
    const int64_t at = (int64_t)found.expert * (TransposeW ? n : k) * ldw + (TransposeW ? (int64_t)column * ldw : column);
#pragma unroll 1
    for (int pair = 0; pair < (TransposeW ? 1 : pairs); pair++) { // multiply() ends with a barrier after its last read of shared memory
      const bf16* const left = pair == 0 ? x : x2;
      const bf16* const right = pair == 0 ? weight : weight2;
      Tile::template multiply<false, TransposeW>(sums, shared, {left + (int64_t)found.row * ldx, ldx, found.end - found.row}, {right + at, ldw, n - column}, k);
    }
  }
  storeRounded<Tile>(y + (int64_t)found.row * ldy + column, ldy, found.end - found.row, n - column, sums);
}

/// inner [rows, I] = silu(gate) * up, where gate and up are x [rows, D] times the weights [I, D] of each row's expert.
/// gate and up are also stored unless gateRows is null.
template <class Tile>
MOE_DEVICE void gated(bf16* inner, bf16* gateRows, bf16* upRows, const bf16* x, const bf16* gate, const bf16* up, const int* offsets, int rows, int I, int D, int experts, int ld, int ldx,
                      int ldw) {
  MOE_DYNAMIC_SHARED(shared);
  constexpr int Half = Tile::BN / 2;
  const int2 tile = rasterize(blockIdx.x, min(rows, divUp(rows, Tile::BM) + experts), divUp(I, Half));
  const ExpertTile found = expertTile<Tile::BM>(offsets, experts, rows, tile.x);
  if (found.expert < 0) return;
  const int column = tile.y * Half;
  typename Tile::Accumulator sums = {};
  if (found.expert < experts) {
    const int64_t at = ((int64_t)found.expert * I + column) * ldw;
    const Halves<bf16> weights = {gate + at, up + at, ldw, I - column};
    Tile::template multiply<false, true>(sums, shared, {x + (int64_t)found.row * ldx, ldx, found.end - found.row}, weights, D);
  }
  storeGated<Tile>(inner, gateRows, upRows, found.row, column, found.end - found.row, I, ld, sums);
}

#define PRODUCT(blocks, name, Tile)                                                                                                                              \
  MOE_KERNEL((Tile::Threads, blocks), moe_routed_experts_product_bf16_##name##_t, (bf16* y, const bf16* x, const bf16* weight, const int* offsets, int rows, int n, int k, int experts, int ldy, int ldx, int ldw)) { \
    product<Tile, true>(y, x, weight, nullptr, nullptr, 1, offsets, rows, n, k, experts, ldy, ldx, ldw);                                                         \
  }                                                                                                                                                              \
  MOE_KERNEL((Tile::Threads, blocks), moe_routed_experts_product_bf16_##name##_n, (bf16* y, const bf16* x, const bf16* weight, const bf16* x2, const bf16* weight2, int pairs, const int* offsets, int rows, int n, int k, int experts, int ldy, int ldx, int ldw)) { \
    product<Tile, false>(y, x, weight, x2, weight2, pairs, offsets, rows, n, k, experts, ldy, ldx, ldw);                                                         \
  }
#define GATED(blocks, name, Tile)                                                                                                                                \
  MOE_KERNEL((Tile::Threads, blocks), moe_routed_experts_gated_bf16_##name, (bf16* inner, bf16* gateRows, bf16* upRows, const bf16* x, const bf16* gate, const bf16* up, const int* offsets, int rows, int I, int D, int experts, int ld, int ldx, int ldw)) { \
    gated<Tile>(inner, gateRows, upRows, x, gate, up, offsets, rows, I, D, experts, ld, ldx, ldw);                                                               \
  }
PRODUCT(1, 128x256, Bf16Large)
PRODUCT(1, 128x128, Bf16Medium)
PRODUCT(1, 64x64, Bf16Small)
GATED(1, 128x128, Bf16Large)
GATED(1, 128x64, Bf16Medium)
GATED(1, 64x32, Bf16Small)

// For precision 'fp8'. Rows, and the slots in `order`, are in expert order.
MOE_KERNEL((256), moe_routed_experts_fp8_swiglu_bf16, (bf16* inner, int ld, const bf16* gate, const bf16* up, int rows, int I)) {
  swigluAlong(Fp8InBf16{inner, ld}, gate, up, rows, I);
}
MOE_KERNEL((256), moe_routed_experts_fp8_swiglu_bwd_along_bf16,
           (bf16* dgate, bf16* dup, int ld, float* dweights, const bf16* dinner, const bf16* gate, const bf16* up, const float* weights, const int* order, int rows, int I, int ldDinner)) {
  swigluGradientAlong(Fp8InBf16{dgate, ld}, Fp8InBf16{dup, ld}, dweights, {dinner, gate, up, weights, order, rows, I, ldDinner});
}
MOE_KERNEL((256), moe_routed_experts_fp8_swiglu_bwd_across_bf16,
           (bf16* dgate, bf16* dup, bf16* weighted, int ld, const bf16* dinner, const bf16* gate, const bf16* up, const float* weights, const int* order, const int* offsets, int rows, int I,
            int ldDinner, int experts)) {
  swigluGradientAcross(Fp8InBf16{dgate, ld}, Fp8InBf16{dup, ld}, Fp8InBf16{weighted, ld}, {dinner, gate, up, weights, order, rows, I, ldDinner}, offsets, experts);
}
MOE_KERNEL((256), moe_routed_experts_fp8_tokens_across_bf16, (bf16* to, int ld, const float* from, const int* order, const int* offsets, int rows, int columns, int experts, int K)) {
  tokensAcross(Fp8InBf16{to, ld}, from, offsets, order, rows, columns, experts, K);
}
