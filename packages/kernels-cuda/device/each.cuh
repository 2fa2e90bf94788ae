// Elementwise kernels. Each thread processes packs of four elements in a grid-stride loop.
#pragma once
#include "moe.cuh"

/// N elements that are loaded or stored with one access.
template <class T, int N = 4>
struct alignas(N * sizeof(T)) Pack {
  T v[N];
};

// Returned by value: through a reference, the compiler would load one element at a time.
template <int N = 4, class T>
MOE_DEVICE Pack<T, N> loadPack(const T* x) {
  return *(const Pack<T, N>*)x;
}
template <int N, class T>
MOE_DEVICE void storePack(T* y, Pack<T, N> pack) {
  *(Pack<T, N>*)y = pack;
}

template <class Y, class F, class... X>
MOE_DEVICE Pack<Y> mapPack(F fn, const Pack<X>&... x) {
  Pack<Y> y;
  for (int j = 0; j < 4; j++) y.v[j] = fn(x.v[j]...);
  return y;
}

/// y[i] = fn(x[i]). Both pointers are aligned to 16 bytes.
template <class Y, class X, class F>
MOE_DEVICE void each(Y* y, const X* x, int64_t n, F fn) {
  for (int64_t i = 4 * gridThread(); i < n; i += 4 * gridThreads()) {
    if (i + 4 <= n) {
      storePack(y + i, mapPack<Y>(fn, loadPack(x + i)));
    } else {
      for (int64_t j = i; j < n; j++) y[j] = fn(x[j]);
    }
  }
}
