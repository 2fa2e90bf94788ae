// Rows that are shared out to groups of threads: a warp, or a whole block.
//
// A thread has every `Threads`-th vector of four. Its first `Held` of them stay in registers, so that a row of up to
// 4 * Threads * Held elements is read once; what is beyond is read again, from the cache, by each pass over the row.
// `Whole` rows start at a multiple of 16 bytes and have a multiple of 4 elements. Others are rare, and hold nothing.
#pragma once
#include "four.cuh"

/// The row of this thread's group, in blocks of blockDim.x / Threads groups.
template <int Threads>
MOE_DEVICE int64_t rowOfGroup() {
  return (int64_t)blockIdx.x * (blockDim.x / Threads) + threadIdx.x / Threads;
}

/// Where this thread's vectors start. Rows that start between two multiples of 16 bytes begin with a part of a vector (from a
/// negative column on), so that all further vectors are aligned.
template <int Threads>
MOE_DEVICE int firstColumn(const float* row) {
  return 4 * (int)(threadIdx.x % Threads) - (int)(reinterpret_cast<uintptr_t>(row) / 4 % 4);
}

/// f(i, j) for each of the thread's vectors: i its column, j its place in registers (`Held` or more: it has none).
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

/// The thread's part of a row of n elements.
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
  /// Vector j, which is at column i; elements outside the row are `filler`.
  __device__ Four at(int i, int j) const { return j < Held ? held[j] : load4<Whole>(from, i, n, filler); }
};
