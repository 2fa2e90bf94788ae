// Reductions over a warp and over a block, in a fixed order, so that every run gives the same bits.
#pragma once

constexpr unsigned wholeWarp = 0xffffffffu;

#ifndef MOE_EMULATOR
/// Every lane gets the result of all `lanes` neighbouring lanes (a power of two), with the same bits.
template <class Op, class T>
MOE_DEVICE T joinLanes(T x, int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2) x = Op::join(x, __shfl_xor_sync(wholeWarp, x, step));
  return x;
}
/// The same for each of N values.
template <class Op, class T, int N>
MOE_DEVICE void joinLanes(T (&x)[N], int lanes) {
#pragma unroll
  for (int i = 0; i < N; i++) x[i] = joinLanes<Op>(x[i], lanes);
}
#endif

// Operations for reductions. `start` is the result for no values.
struct Sum {
  static __device__ float start(float) { return 0.f; }
  static __device__ int start(int) { return 0; }
  static __device__ float join(float a, float b) { return a + b; }
  static __device__ int join(int a, int b) { return (int)((unsigned)a + (unsigned)b); }
};
/// NaN if any value is NaN.
struct MaxOrNan {
  static __device__ float start(float) { return -infinity(); }
  static __device__ int start(int) { return -2147483647 - 1; }
  static __device__ float join(float a, float b) { return maxOrNan(a, b); }
  static __device__ int join(int a, int b) { return a > b ? a : b; }
};
/// NaN only if all values are NaN.
struct Max : MaxOrNan {
  using MaxOrNan::join;
  static __device__ float join(float a, float b) { return fmaxf(a, b); }
};

/// Every lane gets the sum of all lanes.
MOE_DEVICE float warpSum(float x) { return joinLanes<Sum>(x, 32); }
/// The same for each of N values.
template <int N>
MOE_DEVICE void warpSums(float (&x)[N]) {
  joinLanes<Sum>(x, 32);
}
/// Every lane gets the maximum of all lanes (NaN if any value is NaN).
MOE_DEVICE float warpMax(float x) { return joinLanes<MaxOrNan>(x, 32); }

/// Every thread of a block of `Threads` threads gets the sum. All threads must call it. No barrier is needed between
/// calls.
template <int Threads>
MOE_DEVICE float blockSum(float x) {
  static_assert(Threads % 32 == 0 && Threads <= 1024, "whole warps");
  MOE_SHARED(float, parts, [32]);
  x = warpSum(x);
  if (Threads == 32) return x;
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
  __syncthreads();
  float total = 0.f;
  for (int i = 0; i < Threads / 32; i++) total += parts[i];
  __syncthreads();
  return total;
}
template <int Threads>
MOE_DEVICE float blockMax(float x) {
  static_assert(Threads % 32 == 0 && Threads <= 1024, "whole warps");
  MOE_SHARED(float, parts, [32]);
  x = warpMax(x);
  if (Threads == 32) return x;
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
  __syncthreads();
  float best = parts[0];
  for (int i = 1; i < Threads / 32; i++) best = maxOrNan(best, parts[i]);
  __syncthreads();
  return best;
}
