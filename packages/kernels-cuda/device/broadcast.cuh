// Elementwise kernels with several operands and NumPy-style broadcasting.
#pragma once
#include "each.cuh"
#include "nest.cuh"

/// The k-th operand of a nest. Its stride along the innermost axis is 1, or 0 if it is broadcast there.
template <class T, int k>
struct Operand {
  const T* data;
};

template <class T, int k, int K>
MOE_DEVICE T one(Operand<T, k> x, const int64_t (&at)[K]) {
  return x.data[at[k]];
}
template <class T, int k, int K>
MOE_DEVICE Pack<T> four(Operand<T, k> x, const int64_t (&at)[K], const Nest<K>& nest) {
  if (nest[1 + k] != 0) return loadPack(x.data + at[k]);
  const T same = one(x, at);
  return Pack<T>{{same, same, same, same}};
}

/// y[i] = fn(operands at element i of the nest).
template <class Y, class F, class... X, int... k>
MOE_DEVICE void broadcast(Y* y, int64_t n, int rank, const Nest<sizeof...(X)>& nest, F fn, Operand<X, k>... x) {
  int64_t at[sizeof...(X)];
  // An operand that is contiguous along the innermost axis has complete rows, so if one row is aligned, all are.
  const bool aligned = rank == 1 || nest[0] % 4 == 0;
  for (int64_t i = 4 * gridThread(); i < n; i += 4 * gridThreads()) {
    if (aligned && i + 4 <= n) {
      locate(at, i, rank, nest);
      storePack(y + i, mapPack<Y>(fn, four(x, at, nest)...));
    } else {
      for (int64_t j = i; j < n && j < i + 4; j++) {
        locate(at, j, rank, nest);
        y[j] = fn(one(x, at)...);
      }
    }
  }
}
