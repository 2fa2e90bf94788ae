// Warp-level matrix products (mma, ldmatrix) and asynchronous copies (cp.async), for sm_80 and later. The emulator
// implements them as collective functions of the warp (emulator/tensor-core.h).
#pragma once
#include "moe.cuh"

#ifdef MOE_EMULATOR
#include "tensor-core.h"
#else

/// Copies 16 bytes from global to shared memory; writes zeros if `valid` is false (the source is then not read). Both
/// addresses are aligned to 16 bytes.
MOE_DEVICE void cpAsync16(void* shared, const void* global, bool valid = true) {
  const uint32_t to = (uint32_t)__cvta_generic_to_shared(shared);
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
}
/// The same for 4 bytes.
MOE_DEVICE void cpAsync4(void* shared, const void* global, bool valid = true) {
  const uint32_t to = (uint32_t)__cvta_generic_to_shared(shared);
  const int bytes = valid ? 4 : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
}
/// Commits this thread's copies so far as a group.
MOE_DEVICE void cpAsyncCommit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/// Waits until at most `Pending` of this thread's most recent groups are in flight. Other threads see the data after a
/// barrier.
template <int Pending>
MOE_DEVICE void cpAsyncWait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

/// Loads four 8x8 matrices of 16-bit elements. Lane l passes the address (aligned to 16 bytes) of row l%8 of matrix
/// l/8. Register i of lane l then holds elements (l%4)*2 and +1 of row l/4 of matrix i.
MOE_DEVICE void ldmatrix4(uint32_t (&r)[4], const void* row) {
  const uint32_t from = (uint32_t)__cvta_generic_to_shared(row);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(from)
               : "memory");
}
/// The same with each matrix transposed: register i of lane l holds elements (l%4)*2 and +1 of column l/4.
MOE_DEVICE void ldmatrix4Transposed(uint32_t (&r)[4], const void* row) {
  const uint32_t from = (uint32_t)__cvta_generic_to_shared(row);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(from)
               : "memory");
}

/// d += a b with a 16x16 (row-major) and b 16x8 (column-major) in bf16, d 16x8 in f32. With g = lane/4, t = lane%4:
/// a[0] = A[g][2t, +1], a[1] = A[g+8][2t, +1], a[2] = A[g][2t+8, +9], a[3] = A[g+8][2t+8, +9];
/// b[0] = B[2t, +1][g], b[1] = B[2t+8, +9][g]; d[0], d[1] = D[g][2t, +1], d[2], d[3] = D[g+8][2t, +1].
MOE_DEVICE void mmaBf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/// Rounds a float to tf32 (10 bits of mantissa) and returns its bits.
MOE_DEVICE uint32_t toTf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}
/// d += a b with a 16x8 (row-major) and b 8x8 (column-major) in tf32, d 16x8 in f32. With g = lane/4, t = lane%4:
/// a[0] = A[g][t], a[1] = A[g+8][t], a[2] = A[g][t+4], a[3] = A[g+8][t+4]; b0 = B[t][g], b1 = B[t+4][g]; d as in mmaBf16.
MOE_DEVICE void mmaTf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#endif
