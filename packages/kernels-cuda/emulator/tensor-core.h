// Warp-level matrix products and asynchronous copies for the emulator; device/tensor-core.cuh documents them.
// Implemented in emulator/warp.cc.
#pragma once

MOE_DEVICE void cpAsync16(void* shared, const void* global, bool valid = true) { emu::copyAsync(shared, global, 16, valid); }
MOE_DEVICE void cpAsync4(void* shared, const void* global, bool valid = true) { emu::copyAsync(shared, global, 4, valid); }
MOE_DEVICE void cpAsyncCommit() { emu::cpAsyncCommit(); }
template <int Pending>
MOE_DEVICE void cpAsyncWait() {
  emu::cpAsyncWait(Pending);
}

MOE_DEVICE void ldmatrix4(uint32_t (&r)[4], const void* row, EMU_PLACE) {
  const emu::Words4 words = emu::loadMatrices(row, false, file, line);
  for (int i = 0; i < 4; i++) r[i] = words.v[i];
}
MOE_DEVICE void ldmatrix4Transposed(uint32_t (&r)[4], const void* row, EMU_PLACE) {
  const emu::Words4 words = emu::loadMatrices(row, true, file, line);
  for (int i = 0; i < 4; i++) r[i] = words.v[i];
}

// Operands are passed by value, so that fragments need not be in memory.
MOE_DEVICE void mmaBf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, EMU_PLACE) {
  const emu::Floats4 sum = emu::mmaBf16({{d[0], d[1], d[2], d[3]}}, {{a[0], a[1], a[2], a[3]}}, b0, b1, file, line);
  for (int i = 0; i < 4; i++) d[i] = sum.v[i];
}

MOE_DEVICE uint32_t toTf32(float x) {
  const uint32_t bits = __float_as_uint(x);
  if ((bits & 0x7f800000u) == 0x7f800000u) return bits;
  return (bits + 0x1000u) & 0xffffe000u;
}
MOE_DEVICE void mmaTf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, EMU_PLACE) {
  const emu::Floats4 sum = emu::mmaTf32({{d[0], d[1], d[2], d[3]}}, {{a[0], a[1], a[2], a[3]}}, b0, b1, file, line);
  for (int i = 0; i < 4; i++) d[i] = sum.v[i];
}
