// TMA copies and wgmma, correct and faulty, for src/emulator-hopper.test.ts.
#include "hopper.cuh"
#include "tensor-core.cuh"

enum Mode {
  right,
  noWait,            // products before the copies have completed
  oneWarpWaits,      // and the other three warps do not
  waitsForTheOther,  // the other parity: returns at once
  tooFewBytes,       // expects too few bytes
  noSyncthreads,     // after initBarrier
  noFenceBarrierInit,
  arrivesTwice,      // the copying warp
  arrivesForOthers,  // the multiplying warps arrive in place of the copying one
  misalignedStage,
  refillsTooEarly,   // without waiting for the readers, who miss a phase
  refillsInFlight,   // readers arrive before they have waited for their products
  leavesABox,        // no thread waits for the last copy
  oneThreadLess,     // only 127 threads issue a product
  noWgmmaFence,
  writesSums,        // while products are in flight
  readsSums,         // likewise
  oneWarpLess,       // waits for products
  noWaitProducts,
  threadsWrite,      // threads write an operand, instead of the copy engine
  oneLaneFirst,      // one lane of warp 1 waits, before products
  oneLaneBetween,    // likewise, between products and the wait for them
  lanesMeet,         // correct: likewise, and its warp converges
};

/// d [64, 128] = a b^T over `steps` steps of 64 k, with one stage: warps 0 to 3 multiply, warp 4 copies.
MOE_KERNEL((160), moe_test_hopper, (float* d, const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b, int steps, int x, int mode)) {
  MOE_DYNAMIC_SHARED(dynamic);
  MOE_SHARED(Barrier, barriers, [2]);
  Barrier *const full = &barriers[0], *const empty = &barriers[1];
  unsigned char* const stage = dynamic + (-sharedAddress(dynamic) & 1023) + (mode == misalignedStage ? 128 : 0);
  constexpr int bytesA = 64 * 128, bytes = bytesA + 128 * 128;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    initBarrier(full, 1);
    initBarrier(empty, 4);
    if (mode != noFenceBarrierInit) fenceBarrierInit();
  }
  if (mode != noSyncthreads) __syncthreads();
  if (warp == 4) {
    for (int t = 0; t < steps && lane == 0; t++) {
      if (mode != refillsTooEarly) wait(empty, (t & 1) ^ 1);
      arriveAndExpectTx(full, mode == tooFewBytes ? bytes - 16 : bytes);
      if (mode == arrivesTwice) arrive(full);
      tmaLoad(stage, a, full, x + t * 64, 0, 0);
      tmaLoad(stage + bytesA, b, full, x + t * 64, 0, 0);
      if (mode == refillsTooEarly) wait(full, t & 1);
    }
    return;
  }
  float sums[64] = {};
  for (int t = 0; t < (mode == leavesABox ? steps - 1 : steps); t++) {
    if (mode != noWait && !(mode == oneWarpWaits && warp != 0)) wait(full, mode == waitsForTheOther ? 1 : t & 1);
    if (mode == threadsWrite && t == 0) stage[0] = 0;
    if (mode == oneLaneFirst && threadIdx.x == 32) wait(full, t & 1);
    if (mode != noWgmmaFence) wgmmaFence(sums);
    for (int k = 0; k < 64; k += 16)
      if (!(mode == oneThreadLess && threadIdx.x == 5)) wgmma<128>(sums, kMajorDescriptor(stage, k), kMajorDescriptor(stage + bytesA, k));
    if (mode == writesSums) sums[3] = 1.f;
    if (mode == readsSums) d[threadIdx.x] = sums[3];
    wgmmaCommit();
    if (mode == refillsInFlight && lane == 0) arrive(empty);
    if ((mode == oneLaneBetween || mode == lanesMeet) && threadIdx.x == 32) wait(full, t & 1);
    if (mode == lanesMeet) __syncwarp();
    if (mode == noWaitProducts || (mode == oneWarpLess && warp == 3)) return;
    wgmmaWait<0>(sums);
    if (mode != refillsInFlight && lane == 0) arrive(empty);
    if (mode == arrivesForOthers && lane == 0) arrive(full);
  }
  if (mode == readsSums) return;
  for (int i = 0; i < 64; i++) {
    d[(warp * 16 + lane / 4 + i / 2 % 2 * 8) * 128 + i / 4 * 8 + lane % 4 * 2 + i % 2] = sums[i];
  }
}

/// y [2, 32] = two boxes of 32 floats, copied by warp 1 to the same address one after the other, and read by the threads of warp 0. `mode`
/// 0: correct
/// 1: correct, lane 0 waits for its warp
/// 2: likewise, without __syncwarp
/// 3: the warp arrives before it reads
/// 4: the copying warp does not wait for an arrival
/// 5: correct, bytes of x instead of boxes
/// 6: from an address that is not a multiple of 16
/// 7: no fence between reading and arriving
/// 8: the last lane arrives, and the warp has not converged
/// 9: correct, all lanes arrive
/// 10: all lanes but one arrive
/// 11: correct, one lane reads and arrives
/// 12: a thread writes x first
MOE_KERNEL((64), moe_test_boxes, (float* y, const float* x, const __grid_constant__ TensorMap map, int mode)) {
  MOE_SHARED(__align__(128) float, box, [32]);
  MOE_SHARED(Barrier, barriers, [2]);
  Barrier *const full = &barriers[0], *const empty = &barriers[1];
  const int lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    initBarrier(full, 1);
    initBarrier(empty, mode == 9 ? 32 : mode == 10 ? 31 : 1);
    if (mode == 12) ((float*)x)[40] = 1.f;
    fenceBarrierInit();
  }
  __syncthreads();
  for (int t = 0; t < 2; t++) {
    if (threadIdx.x == 32) {
      if (mode != 4) wait(empty, (t & 1) ^ 1);
      arriveAndExpectTx(full, 128);
      if (mode == 5 || mode == 6) bulkLoad(box, x + t * 32 + mode - 5, 128, full);
      else tmaLoad(box, map, full, 0, t, 0);
      if (mode == 4) wait(full, t & 1);
    } else if (threadIdx.x < 32) {
      if (lane == 0 || (mode != 1 && mode != 2)) wait(full, t & 1);
      if (mode == 1) __syncwarp();
      if (mode == 3 && lane == 0) arrive(empty);
      if (mode == 3) __syncwarp();
      if (mode == 11 && lane > 0) continue;
      for (int i = lane; i < (mode == 11 ? 32 : lane + 1); i++) y[t * 32 + i] = box[i];
      if (mode != 7) fenceProxyAsync();
      if (mode < 8) __syncwarp();
      if (mode == 8 ? lane == 31 : mode == 9 || (mode == 10 ? lane != 7 : mode != 3 && lane == 0)) arrive(empty);
    }
  }
}

/// One lane waits for a phase, and the warp then multiplies (with `loads`, loads matrices), having converged in between
/// or not.
MOE_KERNEL((32), moe_test_aligned, (float* d, int loads, int meets)) {
  MOE_SHARED(__align__(16) uint32_t, rows, [32 * 4]);
  MOE_SHARED(Barrier, barrier, [1]);
  for (int i = 0; i < 4; i++) rows[threadIdx.x * 4 + i] = 0;
  if (threadIdx.x == 0) {
    initBarrier(barrier, 1);
    fenceBarrierInit();
  }
  __syncthreads();
  if (threadIdx.x == 3) wait(barrier, 1);
  if (meets) __syncwarp();
  uint32_t a[4] = {};
  float sums[4] = {};
  if (loads) ldmatrix4(a, rows + threadIdx.x * 4);
  else mmaBf16(sums, a, 0, 0);
  d[threadIdx.x] = sums[0] + a[0];
}

enum OperandMode {
  operandsRight,
  noFenceProxyAsync,
  fencesTooLate,     // after it has signalled that it wrote
  noSyncWarpgroup,   // between writing and products
  oneWarpElsewhere,  // at another barrier than syncWarpgroup
  writesInFlight,    // to memory that products in flight read
  writesTooEarly,    // when this warp has waited for its products, but others may not have
  misalignedAcross,
  leftAcross,        // correct, with an MN-major a
  leftRegisters,     // correct, with a in registers
  registersInFlight, // overwrites those in flight
};

/// d [64, 128] = a b with a [64, 64] and b [64, 128] in bf16, which the threads of a warpgroup write to shared memory.
/// b is MN-major, and so is a in some modes.
MOE_KERNEL((128), moe_test_operands, (float* d, const uint32_t* a, const uint32_t* b, int mode)) {
  MOE_DYNAMIC_SHARED(dynamic);
  unsigned char* const left = dynamic + (-sharedAddress(dynamic) & 1023);
  unsigned char* const right = left + 64 * 128 + (mode == misalignedAcross ? 128 : 0);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int i = threadIdx.x; i < 64 * 32; i += 128) {
    const int row = i / 32, pair = i % 32;
    *(uint32_t*)(left + row * 128 + (pair / 4 ^ row % 8) * 16 + pair % 4 * 4) = a[i];
    for (int box = 0; box < 2; box++) *(uint32_t*)(right + box * 64 * 128 + row * 128 + (pair / 4 ^ row % 8) * 16 + pair % 4 * 4) = b[row * 64 + box * 32 + pair];
  }
  if (mode != noFenceProxyAsync && mode != fencesTooLate) fenceProxyAsync();
  if (mode == oneWarpElsewhere && warp == 2) syncWarpgroup();
  else if (mode != noSyncWarpgroup) syncWarpgroup();
  if (mode == fencesTooLate) fenceProxyAsync();
  uint32_t own[4][4];
  for (int i = 0; i < 16; i++) own[i / 4][i % 4] = a[(warp * 16 + lane / 4 + i % 2 * 8) * 32 + i / 4 * 8 + i % 4 / 2 * 4 + lane % 4];
  float sums[64] = {};
  wgmmaFence(sums);
#pragma unroll
  for (int k = 0; k < 64; k += 16) {
    const uint64_t b = mnMajorDescriptor(right + k * 128, 64 * 128);
    if (mode == leftRegisters || mode == registersInFlight) wgmma<128, true>(sums, own[k / 16], b);
    else if (mode == leftAcross) wgmma<128, true, true>(sums, mnMajorDescriptor(left + k * 128, 0), b);
    else wgmma<128, true>(sums, kMajorDescriptor(left, k), b);
  }
  wgmmaCommit();
  if (mode == writesInFlight && threadIdx.x == 5) *(uint32_t*)left = 0;
  if (mode == registersInFlight) own[2][1] = 0;
  wgmmaWait<0>(sums);
  if (mode == writesTooEarly && warp == 0) *(uint32_t*)(left + lane * 4) = 0;
  for (int i = 0; i < 64; i++) {
    d[(warp * 16 + lane / 4 + i / 2 % 2 * 8) * 128 + i / 4 * 8 + lane % 4 * 2 + i % 2] = sums[i];
  }
}
