// Loop nests over operands with strides. The launcher has merged axes (src/strides.ts), so a nest is short: usually one or two axes.
#pragma once
#include "moe.cuh"

constexpr int maxAxes = 8;

/// For each axis, innermost first: its size, then the stride in elements of each of K operands.
template <int K>
using Nest = Args<int64_t, maxAxes*(K + 1)>;

/// Where element `i` of the nest, counted in row-major order, lies in each operand.
template <int K>
MOE_DEVICE void locate(int64_t (&at)[K], int64_t i, int rank, const Nest<K>& nest) {
  for (int k = 0; k < K; k++) at[k] = 0;
  // Not unrolled: eight axes of 64-bit divisions are more code than most kernels.
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
