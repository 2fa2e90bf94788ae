// Kernels with one error each, for src/emulator.test.ts.
#include "tensor-core.cuh"

MOE_KERNEL((256), moe_test_past_the_end, (float* y, const float* x, int n)) {
  const int i = (int)gridThread();
  if (i <= n) y[i] = x[i];  // one too many
}

MOE_KERNEL((256), moe_test_before_the_start, (float* y, const float* x)) { y[threadIdx.x] = x[(int)threadIdx.x - 1]; }

MOE_KERNEL((256), moe_test_null, (float* y)) { y[threadIdx.x] = 1.f; }

MOE_KERNEL((256), moe_test_copy, (float* y, const float* x, int64_t n)) {
  for (int64_t i = gridThread(); i < n; i += gridThreads()) y[i] = x[i];
}

MOE_KERNEL((256), moe_test_copy4, (float4 * y, const float4* x, int n)) {
  for (int i = threadIdx.x; i < n; i += 256) {
    float4 v = x[i];
    v.x += 1.f;
    y[i] = v;
  }
}

MOE_KERNEL((256), moe_test_shared_unwritten, (float* y)) {
  MOE_SHARED(float, tile, [256]);
  if (threadIdx.x != 7) tile[threadIdx.x] = 1.f;
  __syncthreads();
  y[threadIdx.x] = tile[threadIdx.x ^ 1];
}

MOE_KERNEL((256), moe_test_shared_race, (float* y, int synced)) {
  MOE_SHARED(float, tile, [256]);
  tile[threadIdx.x] = (float)threadIdx.x;
  if (synced) __syncthreads();
  y[threadIdx.x] = tile[255 - threadIdx.x];
}

MOE_KERNEL((32), moe_test_shared_both, (float* y)) {
  MOE_SHARED(float, tile, [32]);
  tile[threadIdx.x] = 1.f;
  y[threadIdx.x] = tile[threadIdx.x];
}

/// Overwrites memory that other threads may still read.
MOE_KERNEL((256), moe_test_shared_overwrite, (float* y, int synced)) {
  MOE_SHARED(float, tile, [256]);
  float sum = 0.f;
  for (int round = 0; round < 2; round++) {
    tile[threadIdx.x] = (float)(threadIdx.x + round);
    __syncthreads();
    sum += tile[255 - threadIdx.x];
    if (synced) __syncthreads();
  }
  y[threadIdx.x] = sum;
}

/// Lanes of one warp: __syncwarp is sufficient, but not for other warps.
MOE_KERNEL((256), moe_test_shared_warp, (float* y, int distance, int synced)) {
  MOE_SHARED(float, tile, [256]);
  tile[threadIdx.x] = (float)threadIdx.x;
  if (synced) __syncwarp();
  y[threadIdx.x] = tile[threadIdx.x ^ (unsigned)distance];
}

/// All threads read a word, then thread 3 once more, then `writer` writes it, each after a barrier of the `readBarrier`
/// and `writeBarrier` kind: 0 none, 1 of the warp, 2 of the block.
MOE_KERNEL((64), moe_test_shared_again, (float* y, int readBarrier, int writer, int writeBarrier)) {
  MOE_SHARED(float, tile, [64]);
  const int thread = threadIdx.x;
  tile[thread] = (float)thread;
  __syncthreads();
  float sum = tile[9] + tile[9];
  if (readBarrier == 1) __syncwarp();
  if (readBarrier == 2) __syncthreads();
  if (thread == 3) sum += tile[9];
  if (writeBarrier == 1) __syncwarp();
  if (writeBarrier == 2) __syncthreads();
  if (thread == writer) tile[9] = 1.f;
  y[thread] = sum;
}

/// Accesses of blocks (or of threads of a block) to the same words of device memory. `mode`
/// 0: correct, each accesses its own words
/// 1: a block reads what the previous one wrote
/// 2: a block writes what the previous one wrote
/// 3: a block reads what the next one writes
/// 4: a thread reads its neighbour's word without a barrier
/// 5: correct, with a barrier
/// 6: correct, halves of a word
/// 7: correct, the last block reads what all blocks have written
MOE_KERNEL((64), moe_test_global_race, (int* y, int* done, int mode)) {
  const int i = (int)gridThread(), before = max(i - 64, 0);
  int x = i;
  if (mode == 1 && blockIdx.x > 0) x += y[before];
  if (mode == 3) x += y[i + 64];
  if (mode == 6) ((uint16_t*)y)[blockIdx.x + threadIdx.x * 2] = 1;
  else y[mode == 2 && blockIdx.x > 0 ? before : i] = x;
  if (mode == 5) __syncthreads();
  if (mode == 4 || mode == 5) y[128 + i] = y[i ^ 1];
  if (mode != 7) return;
  __threadfence();
  __syncthreads();
  MOE_SHARED(int, last, [1]);
  if (threadIdx.x == 0) last[0] = atomicAdd(done, 1) == (int)gridDim.x - 1;
  __syncthreads();
  if (last[0]) y[128 + threadIdx.x] = y[threadIdx.x];
}

/// Halves of a word written by different threads; bytes likewise.
MOE_KERNEL((256), moe_test_shared_halves, (float* y)) {
  MOE_SHARED(bf16, halves, [256]);
  MOE_SHARED(uint8_t, bytes, [256]);
  halves[threadIdx.x] = toBf16((float)threadIdx.x);
  bytes[threadIdx.x] = (uint8_t)threadIdx.x;
  __syncthreads();
  y[threadIdx.x] = toFloat(halves[255 - threadIdx.x]) + (float)bytes[threadIdx.x];
}

MOE_KERNEL((256), moe_test_dynamic, (float* y, int at)) {
  MOE_DYNAMIC_SHARED(memory);
  float* tile = (float*)memory;
  tile[threadIdx.x] = 1.f;
  __syncthreads();
  if (threadIdx.x == 0) tile[at] = 2.f;
  __syncthreads();
  y[threadIdx.x] = tile[threadIdx.x];
}

MOE_KERNEL((256), moe_test_index, (float* y, int column)) {
  MOE_SHARED(float, tile, [8][32]);
  tile[threadIdx.x / 32][threadIdx.x % 32] = 1.f;
  __syncthreads();
  y[threadIdx.x] = tile[0][column];
}

MOE_KERNEL((256), moe_test_returns_early, (float* y)) {
  if (threadIdx.x == 5) return;
  __syncthreads();
  y[threadIdx.x] = 1.f;
}

MOE_KERNEL((256), moe_test_divergent, (float* y)) {
  if (threadIdx.x < 128) {
    y[threadIdx.x] = 1.f;
    __syncthreads();
  } else {
    y[threadIdx.x] = 2.f;
    __syncthreads();
  }
}

MOE_KERNEL((256), moe_test_missing_lanes, (float* y)) {
  float x = (float)threadIdx.x;
  if (threadIdx.x % 32 < 16) x = __shfl_xor_sync(wholeWarp, x, 1);
  y[threadIdx.x] = x;
}

MOE_KERNEL((256), moe_test_partial_mask, (float* y)) { y[threadIdx.x] = __shfl_sync(0xffffu, 1.f, 0); }

MOE_KERNEL((256), moe_test_divide, (int* y, int by)) { y[threadIdx.x] = (int)threadIdx.x / by; }

MOE_KERNEL((32), moe_test_deep, (int* y, int n)) {
  struct Deep {
    static __attribute__((noinline)) int down(int n) {
      volatile int room[256];
      room[0] = n;
      return n == 0 ? 0 : down(n - 1) + room[0];
    }
  };
  y[threadIdx.x] = Deep::down(n);
}

/// The target of an asynchronous copy, read before and after the wait. `mode`
/// 0: correct; 1: no wait; 2: waits, but no barrier; 3: waits for too few groups.
MOE_KERNEL((32), moe_test_async, (float* y, const float* x, int mode)) {
  MOE_SHARED(float4, tile, [2][32]);
  tile[0][threadIdx.x] = make_float4(-1.f, -1.f, -1.f, -1.f);
  tile[1][threadIdx.x] = make_float4(-1.f, -1.f, -1.f, -1.f);
  __syncthreads();
  cpAsync16(&tile[0][threadIdx.x], x + 4 * threadIdx.x, threadIdx.x < 24);
  cpAsyncCommit();
  cpAsync16(&tile[1][threadIdx.x], x + 4 * threadIdx.x, true);
  cpAsyncCommit();
  if (mode == 3) cpAsyncWait<2>();
  else if (mode != 1) cpAsyncWait<1>();
  if (mode != 2) __syncthreads();
  y[threadIdx.x] = tile[0][31 - threadIdx.x].y;
  cpAsyncWait<0>();
  __syncthreads();
  y[32 + threadIdx.x] = tile[1][31 - threadIdx.x].z;
}
