// Grids of warps over the rows of a matrix: along x, 8 rows per block of 256 threads; along y, slices of a row.
#pragma once
#include "four.cuh"

/// Features per slice: 16 vectors of four per lane.
constexpr int rowSlice = 2048;

MOE_DEVICE int64_t rowOfWarp() { return (int64_t)blockIdx.x * 8 + threadIdx.x / 32; }

/// Calls f(i) for this lane's i = 0, 4, 8 .. below D within the block's slice.
template <class F>
MOE_DEVICE void eachOfSlice(int D, F&& f) {
  const int begin = (int)blockIdx.y * rowSlice, end = begin + rowSlice < D ? begin + rowSlice : D;
  for (int i = begin + 4 * (int)(threadIdx.x % 32); i < end; i += 128) f(i);
}

/// total += the sum over the K choices of token n of weights[s] * load(rows[s], part), where s is the choice's slot.
/// Without weights, all are 1. Rows outside of 0 .. end - 1 are not loaded. `load(row, part, exists)` sets parts that
/// do not exist to 0. Four rows are in flight at a time: one after the other, each would wait for its index, its weight
/// and its data.
template <int Count, class Load>
MOE_DEVICE void addSlots(Four (&total)[Count], const float* weights, const int* rows, int64_t n, int K, int64_t end, Load load) {
  constexpr int together = 4;
  for (int first = 0; first < K; first += together) {
    int row[together];
    float weight[together];
    Four part[together][Count];
#pragma unroll
    for (int k = 0; k < together; k++) {
      const int64_t s = n * K + first + k;
      const bool exists = first + k < K;
      row[k] = exists ? rows[s] : -1;
      weight[k] = weights == nullptr ? 1.f : exists ? weights[s] : 0.f;
    }
#pragma unroll
    for (int k = 0; k < together; k++) {
      const bool exists = row[k] >= 0 && row[k] < end;
      if (!exists) weight[k] = 0.f;
      load((int64_t)row[k], part[k], exists);
    }
#pragma unroll
    for (int k = 0; k < together; k++) {
#pragma unroll
      for (int c = 0; c < Count; c++) {
        for (int j = 0; j < 4; j++) total[c].v[j] += weight[k] * part[k][c].v[j];
      }
    }
  }
}
