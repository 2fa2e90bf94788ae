// Kernels that process a row with a group of threads: a warp, or a whole block.
//
// Thread t of a group has vectors (of four elements) t, t + Threads, and so on. It holds its first `Held` vectors in
// registers, so a row of up to 4 * Threads * Held elements is read once. The rest of longer rows is read again, from
// the cache, in each pass.
// Whole: rows are aligned to 16 bytes and have a multiple of 4 elements. Other rows are rare, and are not held in
// registers.
#pragma once
#include "four.cuh"

/// The row of this thread's group; a block has blockDim.x / Threads groups.
template <int Threads>
MOE_DEVICE int64_t rowOfGroup() {
  return (int64_t)blockIdx.x * (blockDim.x / Threads) + threadIdx.x / Threads;
}

/// The column of this thread's first vector. If a row is not aligned to 16 bytes, it starts with a partial vector (at a
/// negative column), so that all other vectors are aligned.
template <int Threads>
MOE_DEVICE int firstColumn(const float* row) {
  return 4 * (int)(threadIdx.x % Threads) - (int)(reinterpret_cast<uintptr_t>(row) / 4 % 4);
}

/// Calls f(i, j) for each of the thread's vectors: i is its column, j its index in registers (`Held` or more: not in
/// registers).
template <int Threads, int Held, class F>
MOE_DEVICE void eachVector(int first, int n, F&& f) {
#pragma unroll
  for (int j = 0; j < Held; j++) {
    const int i = first + 4 * Threads * j;
    if (i < n) f(i, j);
  }
#pragma unroll 2
  for (int i = first + 4 * Threads * Held; i < n; i += 4 * Threads) f(i, Held);
}

/// This thread's part of a row of n elements.
template <int Threads, int Held, bool Whole>
struct Row {
  const float* from;
  int n;
  float filler;
  Four held[Held > 0 ? Held : 1];

  __device__ Row(const float* from, int first, int n, float filler = 0.f) : from(from), n(n), filler(filler) {
#pragma unroll
    for (int j = 0; j < Held; j++) {
      const int i = first + 4 * Threads * j;
      if (i < n) held[j] = load4<Whole>(from, i, n, filler);
    }
  }
  /// Vector j, at column i. Elements outside of the row are `filler`.
  __device__ Four at(int i, int j) const { return j < Held ? held[j] : load4<Whole>(from, i, n, filler); }
};
