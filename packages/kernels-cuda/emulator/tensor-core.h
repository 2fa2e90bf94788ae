// Warp-level matrix products and asynchronous copies, as device/tensor-core.cuh describes them; the work is done in emulator/warp.cc.
#pragma once

MOE_DEVICE void copyAsync16(void* shared, const void* global, bool valid = true) { emu::copyAsync(shared, global, 16, valid); }
MOE_DEVICE void copyAsync4(void* shared, const void* global, bool valid = true) { emu::copyAsync(shared, global, 4, valid); }
MOE_DEVICE void commitCopies() { emu::commitCopies(); }
template <int Pending>
MOE_DEVICE void waitCopies() {
  emu::waitCopies(Pending);
}

MOE_DEVICE void loadMatrices4(uint32_t (&r)[4], const void* row, EMU_PLACE) {
  const emu::Words4 words = emu::loadMatrices(row, false, file, line);
  for (int i = 0; i < 4; i++) r[i] = words.v[i];
}
MOE_DEVICE void loadMatrices4Transposed(uint32_t (&r)[4], const void* row, EMU_PLACE) {
  const emu::Words4 words = emu::loadMatrices(row, true, file, line);
  for (int i = 0; i < 4; i++) r[i] = words.v[i];
}

// Operands go by value, so that fragments need not live in memory.
MOE_DEVICE void multiplyBf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, EMU_PLACE) {
  const emu::Floats4 sum = emu::multiplyBf16({{d[0], d[1], d[2], d[3]}}, {{a[0], a[1], a[2], a[3]}}, b0, b1, file, line);
  for (int i = 0; i < 4; i++) d[i] = sum.v[i];
}

MOE_DEVICE uint32_t toTf32(float x) {
  const uint32_t bits = __float_as_uint(x);
  if ((bits & 0x7f800000u) == 0x7f800000u) return bits;
  return (bits + 0x1000u) & 0xffffe000u;
}
MOE_DEVICE void multiplyTf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, EMU_PLACE) {
  const emu::Floats4 sum = emu::multiplyTf32({{d[0], d[1], d[2], d[3]}}, {{a[0], a[1], a[2], a[3]}}, b0, b1, file, line);
  for (int i = 0; i < 4; i++) d[i] = sum.v[i];
}
