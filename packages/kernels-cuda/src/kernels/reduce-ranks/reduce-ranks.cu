// Reduces the elements of several ranks: in double, in the order of ranks, and rounded once, exactly as ranks on the
// host do it.
#include "moe.cuh"

enum { sum = 0, mean = 1, largest = 2 };

MOE_DEVICE double toDouble(float x) { return x; }
MOE_DEVICE double toDouble(bf16 x) { return toFloat(x); }
MOE_DEVICE double toDouble(int x) { return x; }

MOE_DEVICE void set(float& y, double x) { y = (float)x; }
// Rounds to f32 first, as all conversions to bf16 do.
MOE_DEVICE void set(bf16& y, double x) { y = toBf16((float)x); }
// Sums beyond 32 bits wrap around, as integer sums do.
MOE_DEVICE void set(int& y, double x) { y = (int)(int64_t)x; }

/// NaN if either is NaN; of -0 and 0, the latter.
MOE_DEVICE double largerOf(double a, double b) {
  if (a != a || b != b) return a + b;
  if (a == b) return a == 0 ? a + b : a;
  return a > b ? a : b;
}

template <bool isLargest, class T>
MOE_DEVICE double reduced(const Args<const T*, 256>& parts, int ranks, int64_t i) {
  double total = toDouble(parts[0][i]);
#pragma unroll 4
  for (int r = 1; r < ranks; r++) {
    const double x = toDouble(parts[r][i]);
    total = isLargest ? largerOf(total, x) : total + x;
  }
  return total;
}

template <class T>
MOE_DEVICE void reduceRanks(T* y, const Args<const T*, 256>& parts, int ranks, int reduction, int64_t n) {
  for (int64_t i = gridThread(); i < n; i += gridThreads()) {
    const double total = reduction == largest ? reduced<true>(parts, ranks, i) : reduced<false>(parts, ranks, i);
    set(y[i], reduction == mean ? total / ranks : total);
  }
}

#define REDUCE(name, T)                                                                                                     \
  MOE_KERNEL((256), moe_reduce_ranks_##name, (T * y, Args<const T*, 256> parts, int ranks, int reduction, int64_t n)) { \
    reduceRanks(y, parts, ranks, reduction, n);                                                                             \
  }

REDUCE(f32, float)
REDUCE(bf16, bf16)
REDUCE(i32, int)
