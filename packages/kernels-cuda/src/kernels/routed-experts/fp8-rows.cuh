// Elementwise steps between the products of routed experts in precision 'fp8'. Each result is quantized directly to an
// operand of the next product, along the axis that this product sums over ("along" and "across" as in fp8.cuh). Rows
// [rows, ..] are in expert order. `Form` is how products take operands: Fp8InBf16, or Fp8Codes on Hopper.
#pragma once
#include "../permute-tokens/row-slices.cuh"
#include "fp8.cuh"

/// The gradients of one inner feature, from dinner as if the slot's weight were 1: the gradients of gate and up with
/// the weight, inner times the weight, and the feature's contribution to dweights, dinner * inner.
struct SwigluSlopes {
  float dgate, dup, weighted, dweight;
};
MOE_DEVICE SwigluSlopes swigluSlopes(float dinner, float gate, float up, float weight) {
  const float s = sigmoidFast(gate), silu = gate * s, inner = silu * up, own = dinner * weight;
  // d silu(g) / dg = s (1 + g (1 - s))
  return {own * up * (s * (1.f + gate * (1.f - s))), own * silu, weight * inner, dinner * inner};
}

/// Quantizes silu(gate) * up along rows. A warp processes 128 elements of a row; blockIdx.y selects them.
template <class Form>
MOE_DEVICE void swigluAlong(const Form& inner, const bf16* gate, const bf16* up, int rows, int I) {
  const int64_t row = rowOfWarp();
  const int at = blockIdx.y * fp8Tile + threadIdx.x % 32 * 4;
  if (row >= rows) return;
  const Four g = load4(gate + row * I, at, I), u = load4(up + row * I, at, I);
  const Four x = four([&](int i) { return g.v[i] * sigmoidFast(g.v[i]) * u.v[i]; });
  writeAlong(inner, row, at, x, scaleAlong(x));
}

/// Inputs of SwiGLU's gradient: dinner [rows, ld] as if every slot's weight were 1, gate and up [rows, I], and the slot
/// of each row.
struct GradientRows {
  const bf16 *dinner, *gate, *up;
  const float* weights;
  const int* order;
  int rows, I, ld;
};
MOE_DEVICE bool isSlot(const GradientRows& from, int slot) { return slot >= 0 && slot < from.rows; }

/// Quantizes dgate and dup along rows, and computes dweights, the dot product of dinner and inner. Outputs that are
/// null are skipped. One warp per row.
template <class Form>
MOE_DEVICE void swigluGradientAlong(const Form& dgate, const Form& dup, float* dweights, const GradientRows& from) {
  const int64_t row = rowOfWarp();
  if (row >= from.rows) return;
  const int slot = from.order[row];
  const float weight = isSlot(from, slot) ? from.weights[slot] : 0.f;
  float dot = 0.f;
  for (int first = 0; first < from.I; first += fp8Tile) {
    const int at = first + (int)threadIdx.x % 32 * 4;
    const Four d = load4(from.dinner + row * from.ld, at, from.I), g = load4(from.gate + row * from.I, at, from.I), u = load4(from.up + row * from.I, at, from.I);
    Four dg, du;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const SwigluSlopes own = swigluSlopes(d.v[i], g.v[i], u.v[i], weight);
      dg.v[i] = own.dgate;
      du.v[i] = own.dup;
      dot += own.dweight;
    }
    if (!isWanted(dgate)) continue;
    writeAlong(dgate, row, at, dg, scaleAlong(dg));
    writeAlong(dup, row, at, du, scaleAlong(du));
  }
  dot = warpSum(dot);
  if (dweights != nullptr && isSlot(from, slot) && threadIdx.x % 32 == 0) dweights[slot] = dot;
}

/// Quantizes dgate, dup and inner times the slot's weight across rows. Outputs that are null are skipped.
template <class Form>
MOE_DEVICE void swigluGradientAcross(const Form& dgate, const Form& dup, const Form& weighted, const GradientRows& from, const int* offsets, int experts) {
  MOE_SHARED(float, weights, [fp8Tile]);
  const RunTile tile = runTile(offsets, from.rows, from.I, experts);
  if (tile.left <= 0) return;
  if (threadIdx.x < fp8Tile && (int)threadIdx.x < tile.left) {
    const int slot = from.order[tile.row + threadIdx.x];
    weights[threadIdx.x] = isSlot(from, slot) ? from.weights[slot] : 0.f;
  }
  __syncthreads();
  roundAcross<3>(
      tile.left, from.I,
      [&](int row, int column, bool exists, float* to) {
        const int64_t r = tile.row + row;
        const auto load = [&](const bf16* x, int ld) { return exists ? toFloat(x[r * ld + column]) : 0.f; };
        const SwigluSlopes own = swigluSlopes(load(from.dinner, from.ld), load(from.gate, from.I), load(from.up, from.I), exists ? weights[row] : 0.f);
        to[0] = own.dgate;
        to[1] = own.dup;
        to[2] = own.weighted;
      },
      [&](int which, int column, int first, const float* x, Fp8Scale scale) {
        const Form& to = which == 0 ? dgate : which == 1 ? dup : weighted;
        if (isWanted(to)) writeAcross(to, tile, offsets, from.I, column, first, x, scale);
      });
}

/// Gathers the features [.., columns] of the rows' tokens (order[r] / K) and quantizes them across rows.
template <class Form>
MOE_DEVICE void tokensAcross(const Form& to, const float* from, const int* offsets, const int* order, int rows, int columns, int experts, int K) {
  MOE_SHARED(int, tokens, [fp8Tile]);
  const RunTile tile = runTile(offsets, rows, columns, experts);
  if (tile.left <= 0) return;
  if (threadIdx.x < fp8Tile && (int)threadIdx.x < tile.left) {
    const int slot = order[tile.row + threadIdx.x];
    tokens[threadIdx.x] = slot >= 0 && slot < rows ? slot / K : -1;
  }
  __syncthreads();
  roundAcross<1>(
      tile.left, columns,
      [&](int row, int column, bool exists, float* x) { *x = exists && tokens[row] >= 0 ? from[(int64_t)tokens[row] * columns + column] : 0.f; },
      [&](int, int column, int first, const float* x, Fp8Scale scale) { writeAcross(to, tile, offsets, columns, column, first, x, scale); });
}
