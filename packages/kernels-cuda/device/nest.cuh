// Loop nests over operands with strides. The launcher merges axes first (src/strides.ts), so most nests have only one
// or two.
#pragma once
#include "moe.cuh"

constexpr int maxAxes = 8;

/// For each axis, innermost first: its size, then the stride of each of the K operands, in elements.
template <int K>
using Nest = Args<int64_t, maxAxes*(K + 1)>;

/// Computes the offset of element `i` of the nest (in row-major order) in each operand.
template <int K>
MOE_DEVICE void locate(int64_t (&at)[K], int64_t i, int rank, const Nest<K>& nest) {
  for (int k = 0; k < K; k++) at[k] = 0;
  // Not unrolled: the 64-bit divisions of eight axes are more code than most kernels.
#pragma unroll 1
  for (int axis = 0; axis < rank; axis++) {
    const int64_t size = nest[axis * (K + 1)];
    // The outermost axis needs no division.
    const int64_t rest = axis == rank - 1 ? 0 : i / size;
    const int64_t index = i - rest * size;
    for (int k = 0; k < K; k++) at[k] += index * nest[axis * (K + 1) + 1 + k];
    i = rest;
  }
}
