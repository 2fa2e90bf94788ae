// A grid of warps over the rows of a matrix: along x, 8 rows to a block of 256 threads; along y, slices of a row.
#pragma once
#include "four.cuh"

/// Features of a slice: 16 vectors of four for each lane.
constexpr int rowSlice = 2048;

MOE_DEVICE int64_t rowOfWarp() { return (int64_t)blockIdx.x * 8 + threadIdx.x / 32; }

/// f(i) for i = 0, 4, 8 .. below D that this lane has in its slice.
template <class F>
MOE_DEVICE void eachOfSlice(int D, F&& f) {
  const int begin = (int)blockIdx.y * rowSlice, end = begin + rowSlice < D ? begin + rowSlice : D;
  for (int i = begin + 4 * (int)(threadIdx.x % 32); i < end; i += 128) f(i);
}
