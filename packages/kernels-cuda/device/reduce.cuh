// Reductions over a warp and over a block, in a fixed order, so that every run gives the same bits.
#pragma once

constexpr unsigned wholeWarp = 0xffffffffu;

/// Every lane gets the sum of all lanes.
MOE_DEVICE float warpSum(float x) {
  for (int step = 16; step > 0; step >>= 1) x += __shfl_xor_sync(wholeWarp, x, step);
  return x;
}
/// Every lane gets the maximum of all lanes (NaN if any value is NaN).
MOE_DEVICE float warpMax(float x) {
  for (int step = 16; step > 0; step >>= 1) x = maxOrNan(x, __shfl_xor_sync(wholeWarp, x, step));
  return x;
}

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
