// Included by every kernel: one language for nvcc and for the emulator (a host C++ compiler with MOE_EMULATOR defined).
// See device/README.md.
#pragma once

#ifdef MOE_EMULATOR
#include "emulated.h"
#else
#include <stdint.h>
#define MOE_DEVICE static __device__ __forceinline__
/// Defines a kernel: launch bounds in parentheses, name, parameters in parentheses, then the body.
#define MOE_KERNEL(bounds, name, parameters) extern "C" __global__ void __launch_bounds__ bounds name parameters
/// Static shared memory: MOE_SHARED(float, tile, [32][33]).
#define MOE_SHARED(type, name, dims) __shared__ type name dims
/// The dynamic shared memory of the launch, aligned to 128 bytes.
#define MOE_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#endif

#include "math.cuh"
#include "numbers.cuh"
#include "reduce.cuh"

/// An array passed by value as one kernel parameter (signature `i[24]`, `l[8]`, `p[64]`).
template <class T, int N>
struct Args {
  T v[N];
  __host__ __device__ T operator[](int i) const { return v[i]; }
};

template <class T>
MOE_DEVICE T divUp(T a, T b) {
  return (a + b - 1) / b;
}

/// The index of this thread in a one-dimensional grid, and the number of threads in the grid.
MOE_DEVICE int64_t gridThread() { return (int64_t)blockIdx.x * blockDim.x + threadIdx.x; }
MOE_DEVICE int64_t gridThreads() { return (int64_t)gridDim.x * blockDim.x; }
