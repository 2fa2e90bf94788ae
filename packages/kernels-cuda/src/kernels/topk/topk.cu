// The k largest elements of each row, largest first; ties are broken by the lowest index, and NaN counts as -Infinity.
// Chunks of a row are sorted in shared memory (bitonic sort); then sorted runs are merged in pairs and cut off at k,
// until one run per row is left.
#include "moe.cuh"

/// Padding, which sorts after every element.
constexpr uint64_t nothing = ~0ull;

/// A sort key in the order of the result: the value, largest first, in the upper half, the index in the lower one.
MOE_DEVICE uint64_t keyOf(float x, int index) {
  if (x != x) x = -infinity();
  const uint32_t bits = x == 0.f ? 0u : asBits(x);
  const uint32_t descending = bits >> 31 != 0 ? bits : ~(bits | 0x80000000u);
  return (uint64_t)descending << 32 | (uint32_t)index;
}

/// Stores the element at position `at` of all runs: its key, or value and index if runs is null.
MOE_DEVICE void put(float* values, int* indices, uint64_t* runs, int64_t at, uint64_t key, const float* row) {
  if (runs != nullptr) {
    runs[at] = key;
  } else {
    const int index = (int)(uint32_t)key;
    values[at] = row[index];
    indices[at] = index;
  }
}

/// A block sorts one chunk of `size` (a power of two) elements of a row and stores the first `keep`.
MOE_KERNEL((512), moe_topk_sort,
           (float* values, int* indices, uint64_t* runs, const float* x, int n, int size, int chunks, int keep)) {
  MOE_DYNAMIC_SHARED(memory);
  uint64_t* keys = (uint64_t*)memory;
  const float* row = x + (int64_t)(blockIdx.x / chunks) * n;
  const int first = blockIdx.x % chunks * size;
  for (int i = threadIdx.x; i < size; i += blockDim.x) keys[i] = first + i < n ? keyOf(row[first + i], first + i) : nothing;
  __syncthreads();
  for (int run = 2; run <= size; run *= 2) {
    for (int step = run / 2; step > 0; step /= 2) {
      for (int pair = threadIdx.x; pair < size / 2; pair += blockDim.x) {
        const int a = pair / step * 2 * step + pair % step;
        const int b = a + step;
        const uint64_t left = keys[a], right = keys[b];
        // Every other run is sorted in descending order.
        if ((left > right) == ((a & run) == 0)) {
          keys[a] = right;
          keys[b] = left;
        }
      }
      __syncthreads();
    }
  }
  for (int i = threadIdx.x; i < keep; i += blockDim.x) put(values, indices, runs, (int64_t)blockIdx.x * keep + i, keys[i], row);
}

/// The number of elements of a sorted run before `key`, including equal ones if `equal`.
MOE_DEVICE int64_t countBefore(const uint64_t* run, int64_t length, uint64_t key, bool equal) {
  int64_t low = 0, high = length;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (run[middle] < key || (equal && run[middle] == key)) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

/// Merges the `count` runs of `length` keys of each row in pairs, and stores the first `keep` of each pair.
MOE_KERNEL((256), moe_topk_merge,
           (float* values, int* indices, uint64_t* merged, const uint64_t* runs, const float* x, int64_t rows, int n, int count,
            int length, int keep)) {
  const int pairs = divUp(count, 2);
  for (int64_t i = gridThread(); i < rows * count * length; i += gridThreads()) {
    const int64_t row = i / length / count;
    const int run = i / length % count;
    const int place = i % length;
    const uint64_t* other = runs + (row * count + (run ^ 1)) * length;
    const bool alone = (run ^ 1) >= count;
    const int64_t at = place + (alone ? 0 : countBefore(other, length, runs[i], run % 2 == 1));
    const int64_t begin = (row * pairs + run / 2) * keep;
    if (at < keep) put(values, indices, merged, begin + at, runs[i], x + row * n);
    if (alone && length + place < keep) merged[begin + length + place] = nothing;
  }
}
