// Products of routed experts on Hopper with bf16 results (persistent GEMM, gemm-hopper.cuh and gemm-fp8.cuh), and the
// kernels that prepare their operands. Rows are in expert order or, if `packed`, in the layout of packed-rows.cuh.
#include "../routed-experts/fp8-rows.cuh"
#include "expert-tile.cuh"
#include "fp8-codes.cuh"
#include "gated-tile.cuh"
#include "gemm-fp8.cuh"
#include "packed-rows.cuh"

/// The mapping between slots and packed rows: slots[r] is the slot of row r or -1; places[s] is the row of slot s, or
/// -1 if the slot's position is after the last expert's, in which case dweights[s] is set to zero.
MOE_KERNEL((256), moe_routed_experts_places_sm90a, (int* slots, int* places, float* dweights, const int* order, const int* offsets, int64_t rows, int M, int experts)) {
  for (int64_t r = gridThread(); r < rows; r += gridThreads()) {
    int expert = 0; // binary search: the last expert that starts at or before r
    for (int from = 1, to = experts; from < to;) {
      const int middle = (from + to) / 2;
      if (packedStart(offsets, middle) <= r) expert = middle, from = middle + 1;
      else to = middle;
    }
    const int64_t p = offsets[expert] + (r - packedStart(offsets, expert));
    const int slot = p < offsets[expert + 1] ? order[p] : -1;
    const bool valid = slot >= 0 && slot < M;
    slots[r] = valid ? slot : -1;
    if (valid) places[slot] = (int)r;
    if (r < offsets[experts] || r >= M) continue;
    const int behind = order[r];
    if (behind < 0 || behind >= M) continue;
    places[behind] = -1;
    if (dweights != nullptr) dweights[behind] = 0.f;
  }
}

/// The work tile of a tile of experts' rows.
template <class Tile>
MOE_DEVICE WorkTile workTileOf(int2 tile, const int* offsets, int rows, int experts, int steps, int packed) {
  const ExpertTile found = expertTile<Tile::BM>(offsets, experts, rows, tile.x);
  const bool product = found.expert >= 0 && found.expert < experts;
  const int shift = packed && product ? packedStart(offsets, found.expert) - offsets[found.expert] : 0;
  // Packed rows do not exist after the last expert's.
  const int stored = packed && !product ? 0 : found.end - found.row;
  return {found.row + shift, 0, tile.y * Tile::BN, product ? found.expert : 0, 0, product ? steps : 0, stored};
}

/// y [rows, n] = x times the weight of each row's expert: [n, k] if Transpose; otherwise [k, n], summed over `pairs` (1
/// or 2) pairs of x and weight. Tiles read past the last row of their expert, but do not store those rows.
template <class Tile, bool Transpose>
MOE_DEVICE void product(bf16* y, const TensorMap& x, const TensorMap& weight, const TensorMap& x2, const TensorMap& weight2, int pairs, const int* offsets, int rows, int n, int k, int experts,
                        int ldy, int packed) {
  const int rowTiles = min(rows, divUp(rows, Tile::BM) + experts), columnTiles = divUp(n, Tile::BN), steps = divUp(k, Tile::BK);
  if (threadIdx.x == Tile::Producer * 32) prefetchMap(x), prefetchMap(weight);
  persistentGemmSteps<Tile, false, !Transpose>(
      rowTiles * columnTiles,
      [&](int j) { return workTileOf<Tile>(rasterize(j, rowTiles, columnTiles), offsets, rows, experts, steps * pairs, packed); },
      [&](unsigned char* to, Barrier* full, const WorkTile& work, int t) {
        const auto copy = [&](const TensorMap& a, const TensorMap& b, int at) {
          copyOperand<Tile::BM, false>(to, a, full, at, work.rowA, 0);
          copyOperand<Tile::BN, !Transpose>(to + Tile::bytesA, b, full, at, work.rowB, work.matrixB);
        };
        if (t < steps) copy(x, weight, t * Tile::BK);
        else copy(x2, weight2, (t - steps) * Tile::BK);
      },
      [&](int, const WorkTile& work, typename Tile::Accumulator& sums) {
        storeRounded<Tile>(y + (int64_t)work.rowA * ldy + work.rowB, ldy, work.rows, n - work.rowB, sums);
      });
}

/// inner [rows, I] = silu(gate) * up, where gate and up are x [rows, D] times the weights [I, D] of each row's expert.
/// One half of a tile's columns is gate's and the other up's, for the same inner features. gate and up are also stored
/// unless gateRows is null.
template <class Tile>
MOE_DEVICE void gated(bf16* inner, bf16* gateRows, bf16* upRows, const TensorMap& x, const TensorMap& gate, const TensorMap& up, const int* offsets, int rows, int I, int D, int experts, int ld) {
  constexpr int Half = Tile::BN / 2;
  const int rowTiles = min(rows, divUp(rows, Tile::BM) + experts), columnTiles = divUp(I, Half), steps = divUp(D, Tile::BK);
  if (threadIdx.x == Tile::Producer * 32) prefetchMap(x), prefetchMap(gate), prefetchMap(up);
  persistentGemmSteps<Tile, false, false>(
      rowTiles * columnTiles,
      [&](int j) {
        WorkTile work = workTileOf<Tile>(rasterize(j, rowTiles, columnTiles), offsets, rows, experts, steps, 0);
        work.rowB /= 2;
        return work;
      },
      [&](unsigned char* to, Barrier* full, const WorkTile& work, int t) {
        copyOperand<Tile::BM, false>(to, x, full, t * Tile::BK, work.rowA, 0);
        copyOperand<Half, false>(to + Tile::bytesA, gate, full, t * Tile::BK, work.rowB, work.matrixB);
        copyOperand<Half, false>(to + Tile::bytesA + Tile::bytesB / 2, up, full, t * Tile::BK, work.rowB, work.matrixB);
      },
      [&](int, const WorkTile& work, typename Tile::Accumulator& sums) { storeGated<Tile>(inner, gateRows, upRows, work.rowA, work.rowB, work.rows, I, ld, sums); });
}

#define PRODUCT(name, Tile)                                                                                                                                    \
  MOE_KERNEL((Tile::Threads, 1), moe_routed_experts_product_sm90a_##name##_t, (bf16* y, const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap weight, const int* offsets, int rows, int n, int k, int experts, int ldy)) { \
    product<Tile, true>(y, x, weight, x, weight, 1, offsets, rows, n, k, experts, ldy, 0);                                                                     \
  }                                                                                                                                                            \
  MOE_KERNEL((Tile::Threads, 1), moe_routed_experts_product_sm90a_##name##_n, (bf16* y, const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap weight, const __grid_constant__ TensorMap x2, const __grid_constant__ TensorMap weight2, int pairs, const int* offsets, int rows, int n, int k, int experts, int ldy)) { \
    product<Tile, false>(y, x, weight, x2, weight2, pairs, offsets, rows, n, k, experts, ldy, 1);                                                              \
  }
#define GATED(name, Tile)                                                                                                                                      \
  MOE_KERNEL((Tile::Threads, 1), moe_routed_experts_gated_sm90a_##name, (bf16* inner, bf16* gateRows, bf16* upRows, const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap gate, const __grid_constant__ TensorMap up, const int* offsets, int rows, int I, int D, int experts, int ld)) { \
    gated<Tile>(inner, gateRows, upRows, x, gate, up, offsets, rows, I, D, experts, ld);                                                                       \
  }
PRODUCT(128x256, HopperLarge)
PRODUCT(128x128, HopperSmall)
GATED(128x128, HopperLarge)
GATED(128x64, HopperSmall)

// For precision 'fp8'. Rows, and the slots in `order`, are in expert order.

/// Gathers the codes of the rows' tokens [rows][ld] and their scales [tiles][ldScales].
MOE_KERNEL((256), moe_routed_experts_fp8_gather_sm90a,
           (uint8_t* to, float* toScales, const uint8_t* from, const float* fromScales, const int* order, int rows, int K, int tokens, int ld, int ldScales, int ldFromScales, int tiles)) {
  const auto tokenOf = [&](int row) {
    const int slot = order[row], token = slot / K;
    return slot >= 0 && token < tokens ? token : -1;
  };
  const int64_t row = rowOfWarp();
  if (row < rows) {
    const int64_t token = tokenOf((int)row);
    for (int i = (int)threadIdx.x % 32 * 16; i < ld; i += 512)
      *(uint4*)(to + row * ld + i) = token >= 0 ? *(const uint4*)(from + token * ld + i) : make_uint4(0, 0, 0, 0);
  }
  // The scales of one tile of eight rows are one sector.
  for (int i = threadIdx.x; i < 8 * tiles; i += 256) {
    const int own = blockIdx.x * 8 + i % 8, tile = i / 8;
    if (own >= rows) continue;
    const int token = tokenOf(own);
    toScales[(int64_t)tile * ldScales + own] = token >= 0 ? fromScales[(int64_t)tile * ldFromScales + token] : 0.f;
  }
}
MOE_KERNEL((256), moe_routed_experts_fp8_swiglu_sm90a, (uint8_t* inner, float* scales, int ld, int ldScales, const bf16* gate, const bf16* up, int rows, int I)) {
  swigluAlong(Fp8Codes{inner, scales, ld, ldScales}, gate, up, rows, I);
}
MOE_KERNEL((256), moe_routed_experts_fp8_swiglu_bwd_along_sm90a,
           (uint8_t* dgate, float* dgateScales, uint8_t* dup, float* dupScales, int ld, int ldScales, float* dweights, const bf16* dinner, const bf16* gate, const bf16* up, const float* weights,
            const int* order, int rows, int I, int ldDinner)) {
  swigluGradientAlong(Fp8Codes{dgate, dgateScales, ld, ldScales}, Fp8Codes{dup, dupScales, ld, ldScales}, dweights, {dinner, gate, up, weights, order, rows, I, ldDinner});
}
MOE_KERNEL((256), moe_routed_experts_fp8_swiglu_bwd_across_sm90a,
           (uint8_t* dgate, float* dgateScales, uint8_t* dup, float* dupScales, uint8_t* weighted, float* weightedScales, int ld, int ldScales, const bf16* dinner, const bf16* gate, const bf16* up,
            const float* weights, const int* order, const int* offsets, int rows, int I, int ldDinner, int experts)) {
  swigluGradientAcross(Fp8Codes{dgate, dgateScales, ld, ldScales}, Fp8Codes{dup, dupScales, ld, ldScales}, Fp8Codes{weighted, weightedScales, ld, ldScales},
                       {dinner, gate, up, weights, order, rows, I, ldDinner}, offsets, experts);
}
MOE_KERNEL((256), moe_routed_experts_fp8_tokens_across_sm90a,
           (uint8_t* to, float* scales, int ld, int ldScales, const float* from, const int* order, const int* offsets, int rows, int columns, int experts, int K)) {
  tokensAcross(Fp8Codes{to, scales, ld, ldScales}, from, offsets, order, rows, columns, experts, K);
}

/// y [rows, n] = x [rows, k] times the weight of each row's expert (codes [n][k]), summed over `pairs` (1 or 2) pairs
/// of x and weight.
MOE_KERNEL((TileFp8::Threads, 1), moe_routed_experts_fp8_product_sm90a,
           (bf16* y, const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap weight, const __grid_constant__ TensorMap x2, const __grid_constant__ TensorMap weight2, const float* scalesX,
            const float* scalesW, const float* scalesX2, const float* scalesW2, int ldX, int ldW, int pairs, const int* offsets, int rows, int n, int k, int experts, int ldy)) {
  using Tile = TileFp8;
  const int rowTiles = min(rows, divUp(rows, Tile::BM) + experts), columnTiles = divUp(n, Tile::BN), steps = divUp(k, Tile::BK);
  if (threadIdx.x == Tile::Producer * 32) prefetchMap(x), prefetchMap(weight);
  persistentGemmFp8Steps(
      [&](int t, auto use) {
        if (t < steps) use(x, weight, Fp8Scales{scalesX, steps, ldX}, Fp8Scales{scalesW, steps, ldW}, t);
        else use(x2, weight2, Fp8Scales{scalesX2, steps, ldX}, Fp8Scales{scalesW2, steps, ldW}, t - steps);
      },
      rows, rowTiles * columnTiles, [&](int j) { return workTileOf<Tile>(rasterize(j, rowTiles, columnTiles), offsets, rows, experts, steps * pairs, 0); },
      [&](int, const WorkTile& work, Tile::Accumulator& sums) {
        storeRounded<Tile>(y + (int64_t)work.rowA * ldy + work.rowB, ldy, work.rows, n - work.rowB, sums);
      });
}
