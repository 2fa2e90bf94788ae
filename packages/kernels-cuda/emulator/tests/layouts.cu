// Layouts of elements in registers and in shared memory, for src/emulator-layouts.test.ts.
#include "flash-hopper.cuh"

/// The bytes that a box of 64 columns writes to shared memory.
MOE_KERNEL((32), moe_test_box_image, (int* image, const __grid_constant__ TensorMap map, int bytes)) {
  MOE_DYNAMIC_SHARED(dynamic);
  MOE_SHARED(Barrier, full, [1]);
  unsigned char* const box = dynamic + (-sharedAddress(dynamic) & 1023);
  if (threadIdx.x == 0) {
    initBarrier(full, 1);
    fenceBarrierInit();
    arriveAndExpectTx(full, bytes);
    tmaLoad(box, map, full, 0, 0, 0);
  }
  __syncthreads();
  wait(full, 0);
  for (int i = threadIdx.x; i < bytes / 4; i += 32) image[i] = *(const int*)(box + i * 4);
}

/// Descriptors in a tile of `rows` rows, without the tile's address: K-major from (row, k) on, and MN-major from row k,
/// column `row` on.
MOE_KERNEL((1), moe_test_descriptors, (int64_t* along, int64_t* across, int rows, int row, int k)) {
  MOE_DYNAMIC_SHARED(dynamic);
  const unsigned char* const tile = dynamic + (-sharedAddress(dynamic) & 1023);
  along[0] = kMajorAt(kMajorDescriptor(tile, 0), rows, row, k) - (sharedAddress(tile) >> 4);
  across[0] = mnMajorAt(mnMajorTileDescriptor(tile, rows), rows, k, row) - (sharedAddress(tile) >> 4);
}

/// The accumulators of every thread after one 64 x 128 x 16 wgmma, with operands in shared memory from `left` (8 KiB)
/// and `right` (16 KiB), or with A in registers from `left`. Descriptors are given without addresses, as two halves.
template <bool AcrossA, bool AcrossB>
MOE_DEVICE void operandImages(float* d, const int* left, const int* right, int leftLow, int leftHigh, int rightLow, int rightHigh, bool registers) {
  MOE_DYNAMIC_SHARED(dynamic);
  unsigned char* const a = dynamic + (-sharedAddress(dynamic) & 1023);
  unsigned char* const b = a + 8192;
  for (int i = threadIdx.x; i < 8192 / 4 && !registers; i += 128) *(int*)(a + i * 4) = left[i];
  for (int i = threadIdx.x; i < 16384 / 4; i += 128) *(int*)(b + i * 4) = right[i];
  fenceProxyAsync();
  __syncthreads();
  const uint64_t descriptorA = ((uint64_t)leftHigh << 32 | (uint32_t)leftLow) + (sharedAddress(a) >> 4);
  const uint64_t descriptorB = ((uint64_t)rightHigh << 32 | (uint32_t)rightLow) + (sharedAddress(b) >> 4);
  float sums[64] = {};
  uint32_t own[4];
  for (int i = 0; i < 4; i++) own[i] = registers ? left[threadIdx.x * 4 + i] : 0;
  wgmmaFence(sums);
  if (registers) wgmma<128, AcrossB>(sums, own, descriptorB);
  else wgmma<128, AcrossB, AcrossA>(sums, descriptorA, descriptorB);
  wgmmaCommit();
  wgmmaWait<0>(sums);
  for (int i = 0; i < 64; i++) d[threadIdx.x * 64 + i] = sums[i];
}
#define OPERAND_IMAGES(name, AcrossA, AcrossB)                                                                                                                                                  \
  MOE_KERNEL((128), moe_test_operand_images_##name, (float* d, const int* left, const int* right, int leftLow, int leftHigh, int rightLow, int rightHigh, int registers)) { \
    operandImages<AcrossA, AcrossB>(d, left, right, leftLow, leftHigh, rightLow, rightHigh, registers != 0);                                                              \
  }
OPERAND_IMAGES(along, false, false)
OPERAND_IMAGES(across, true, true)

/// The accumulators of every lane after one mma; operands are every lane's registers.
MOE_KERNEL((32), moe_test_fragments, (float* d, const int* a, const int* b, int tf32)) {
  float sums[4] = {};
  uint32_t left[4];
  for (int i = 0; i < 4; i++) left[i] = a[threadIdx.x * 4 + i];
  const uint32_t b0 = b[threadIdx.x * 2], b1 = b[threadIdx.x * 2 + 1];
  if (tf32) mmaTf32(sums, left, b0, b1);
  else mmaBf16(sums, left, b0, b1);
  for (int i = 0; i < 4; i++) d[threadIdx.x * 4 + i] = sums[i];
}

/// The registers of every lane after an ldmatrix in which it passed row `lane` of 32 rows of 16 bytes.
MOE_KERNEL((32), moe_test_matrices, (int* y, const int* x, int transposed)) {
  MOE_SHARED(__align__(16) int, rows, [32][4]);
  for (int i = 0; i < 4; i++) rows[threadIdx.x][i] = x[threadIdx.x * 4 + i];
  __syncwarp();
  uint32_t r[4];
  if (transposed) ldmatrix4Transposed(r, rows[threadIdx.x]);
  else ldmatrix4(r, rows[threadIdx.x]);
  for (int i = 0; i < 4; i++) y[threadIdx.x * 4 + i] = (int)r[i];
}
