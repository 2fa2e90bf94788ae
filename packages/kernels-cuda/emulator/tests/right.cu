// Correct kernels, for src/emulator.test.ts: checks their results, and that no fault is reported.
#include "tensor-core.cuh"

MOE_KERNEL((256, 2), moe_test_softmax, (float* y, const float* x, int width)) {
  const float* row = x + (int64_t)blockIdx.x * width;
  float best = -infinity();
  for (int i = threadIdx.x; i < width; i += 256) best = maxOrNan(best, row[i]);
  best = blockMax<256>(best);
  float sum = 0.f;
  for (int i = threadIdx.x; i < width; i += 256) sum += __expf(row[i] - best);
  sum = blockSum<256>(sum);
  for (int i = threadIdx.x; i < width; i += 256) y[(int64_t)blockIdx.x * width + i] = __expf(row[i] - best) / sum;
}

MOE_KERNEL((1024), moe_test_indices, (int* y)) {
  const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  y[block * (int)(blockDim.x * blockDim.y * blockDim.z) + thread] = block * 10000 + thread;
}

MOE_KERNEL((64), moe_test_shuffles, (int* y)) {
  const int i = threadIdx.x;
  y[i] = __shfl_sync(wholeWarp, i, 3);
  y[64 + i] = __shfl_xor_sync(wholeWarp, i, 5);
  y[128 + i] = __shfl_up_sync(wholeWarp, i, 2);
  y[192 + i] = __shfl_down_sync(wholeWarp, i, 2);
  y[256 + i] = __shfl_xor_sync(wholeWarp, i, 1, 2);
  y[320 + i] = (int)__ballot_sync(wholeWarp, i % 3 == 0);
  y[384 + i] = __any_sync(wholeWarp, i == 40) + 2 * __all_sync(wholeWarp, i < 32);
  y[448 + i] = __syncthreads_count(i % 2) + 100 * __syncthreads_or(i == 63) + 1000 * __syncthreads_and(i < 63);
}

/// y [2, 2, 3, 64]: sums and maxima of 32, 16 and 4 lanes, first by joinLanes and then by its shuffles, which the emulator
/// does in one step.
MOE_KERNEL((64), moe_test_joins, (float* y, const float* x)) {
  const int i = threadIdx.x;
  float* shuffled = y + 6 * 64;
  for (int k = 0; k < 3; k++) {
    const int lanes = k == 0 ? 32 : k == 1 ? 16 : 4;
    y[k * 64 + i] = joinLanes<Sum>(x[i], lanes);
    y[(3 + k) * 64 + i] = joinLanes<Max>(x[i], lanes);
    float sum = x[i], best = x[i];
    for (int step = lanes / 2; step > 0; step /= 2) {
      sum += __shfl_xor_sync(wholeWarp, sum, step);
      best = fmaxf(best, __shfl_xor_sync(wholeWarp, best, step));
    }
    shuffled[k * 64 + i] = sum;
    shuffled[(3 + k) * 64 + i] = best;
  }
}

/// A histogram in shared memory, then in global memory; the last block adds them up.
MOE_KERNEL((128), moe_test_atomics, (int* y, int* done, const int* x, int n)) {
  MOE_SHARED(int, bins, [16]);
  MOE_SHARED(int, last, [1]);
  if (threadIdx.x < 16) bins[threadIdx.x] = 0;
  __syncthreads();
  for (int i = (int)gridThread(); i < n; i += (int)gridThreads()) atomicAdd(&bins[x[i] & 15], 1);
  __syncthreads();
  if (threadIdx.x < 16) atomicAdd(&y[threadIdx.x], bins[threadIdx.x]);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last[0] = atomicAdd(done, 1) == (int)gridDim.x - 1;
  __syncthreads();
  if (last[0] && threadIdx.x == 0) {
    int sum = 0;
    for (int i = 0; i < 16; i++) sum += y[i];
    y[16] = sum;
  }
}

MOE_KERNEL((32), moe_test_arguments, (float* y, int a, int64_t b, float c, Args<int, 3> d, Args<float*, 2> e)) {
  if (threadIdx.x == 0) {
    y[0] = (float)a;
    y[1] = (float)b;
    y[2] = c;
    y[3] = (float)(d[0] + 10 * d[1] + 100 * d[2]);
    y[4] = e[1][0];
  }
}

/// One 16x8 product of 16x16 and 16x8, with operands loaded from shared memory by ldmatrix. a and b [16][8] are
/// row-major.
MOE_KERNEL((32), moe_test_bf16_product, (float* d, const float* a, const float* b)) {
  MOE_SHARED(__align__(16) bf16, left, [16][24]);
  MOE_SHARED(__align__(16) bf16, right, [16][16]);
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) left[i / 16][i % 16] = toBf16(a[i]);
  for (int i = lane; i < 256; i += 32) right[i / 16][i % 16] = toBf16(i % 16 < 8 ? b[i / 16 * 8 + i % 16] : 0.f);
  __syncthreads();
  uint32_t fragment[4], columns[4];
  ldmatrix4(fragment, &left[lane % 16][lane / 16 * 8]);
  ldmatrix4Transposed(columns, &right[lane % 16][lane / 16 * 8]);
  float sum[4] = {1.f, 1.f, 1.f, 1.f};
  mmaBf16(sum, fragment, columns[0], columns[1]);
  const int g = lane / 4, t = lane % 4 * 2;
  d[g * 8 + t] = sum[0];
  d[g * 8 + t + 1] = sum[1];
  d[(g + 8) * 8 + t] = sum[2];
  d[(g + 8) * 8 + t + 1] = sum[3];
}

MOE_KERNEL((32), moe_test_tf32_product, (float* d, const float* a, const float* b)) {
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  const uint32_t fragment[4] = {toTf32(a[g * 8 + t]), toTf32(a[(g + 8) * 8 + t]), toTf32(a[g * 8 + t + 4]), toTf32(a[(g + 8) * 8 + t + 4])};
  float sum[4] = {};
  mmaTf32(sum, fragment, toTf32(b[t * 8 + g]), toTf32(b[(t + 4) * 8 + g]));
  d[g * 8 + 2 * t] = sum[0];
  d[g * 8 + 2 * t + 1] = sum[1];
  d[(g + 8) * 8 + 2 * t] = sum[2];
  d[(g + 8) * 8 + 2 * t + 1] = sum[3];
}

// Cost of emulation: `mode` 0: shuffles, 1: barriers, 2: reads of global memory, 3: shared memory, 4: products.
MOE_KERNEL((256), moe_test_cost, (float* y, const float* x, int rounds, int mode)) {
  MOE_SHARED(float, tile, [256]);
  const int i = threadIdx.x;
  float sum = (float)i;
  tile[i] = sum;
  __syncthreads();
  if (mode == 0)
    for (int r = 0; r < rounds; r++) sum += __shfl_xor_sync(wholeWarp, sum, 1);
  if (mode == 1)
    for (int r = 0; r < rounds; r++) __syncthreads();
  if (mode == 2)
    for (int r = 0; r < rounds; r++) sum += x[(i + r) & 255];
  if (mode == 3)
    for (int r = 0; r < rounds; r++) sum += tile[(i + r) & 255];
  float d[4] = {};
  const uint32_t a[4] = {};
  if (mode == 4)
    for (int r = 0; r < rounds; r++) mmaBf16(d, a, 0, 0);
  y[i] = sum + d[0];
}
