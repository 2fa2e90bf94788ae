// The copy engine, its barriers and the products of a warpgroup, as device/hopper.cuh describes them; the work is done in
// emulator/mbarrier.cc and emulator/product.cc.
#pragma once

namespace emu {
template <>
struct ParameterOf<TensorMap> {
  static constexpr Parameter value{'t', 0, sizeof(TensorMap), alignof(TensorMap)};
};
}  // namespace emu

MOE_DEVICE uint32_t sharedAddress(const void* shared) { return emu::sharedAddress(shared); }
template <class T>
MOE_DEVICE T* kept(T* shared, EMU_PLACE) {
  __shfl_sync(wholeWarp, 0, 0, 32, file, line);
  return shared;
}
MOE_DEVICE uint64_t kept(uint64_t operand, EMU_PLACE) { return operand >> 32 << 32 | __shfl_sync(wholeWarp, (uint32_t)operand, 0, 32, file, line); }
MOE_DEVICE uint64_t further(uint64_t operand, uint32_t distance = 0) { return operand + distance; }
MOE_DEVICE void initBarrier(Barrier* barrier, int arrivals, EMU_PLACE) { emu::initBarrier(barrier, arrivals, file, line); }
MOE_DEVICE void fenceBarriers() { emu::fenceBarriers(); }
MOE_DEVICE void arrive(Barrier* barrier, EMU_PLACE) { emu::arriveAtBarrier(barrier, 0, file, line); }
MOE_DEVICE void arriveAndExpect(Barrier* barrier, int bytes, EMU_PLACE) { emu::arriveAtBarrier(barrier, bytes, file, line); }
MOE_DEVICE void wait(Barrier* barrier, int parity, EMU_PLACE) { emu::waitForBarrier(barrier, parity, file, line); }
MOE_DEVICE void copyBox(void* shared, const TensorMap& map, Barrier* barrier, int x, int y, int z, EMU_PLACE) {
  emu::copyBox(shared, &map, barrier, x, y, z, file, line);
}
MOE_DEVICE void copyBytes(void* shared, const void* global, int bytes, Barrier* barrier, EMU_PLACE) { emu::copyBytes(shared, global, bytes, barrier, file, line); }
MOE_DEVICE void prefetchMap(const TensorMap&) {}

MOE_DEVICE void fenceOperands() { emu::fenceOperands(); }
MOE_DEVICE void syncWarpgroup(EMU_PLACE) { emu::syncWarpgroup(file, line); }
template <int N>
MOE_DEVICE void holdSums(float (&)[N]) {}
template <int N>
MOE_DEVICE void computeFirst(const float (&)[N]) {}
template <int N>
MOE_DEVICE void fenceProducts(float (&)[N], EMU_PLACE) {
  emu::fenceProducts(file, line);
}
template <int N, bool AcrossB = false, bool AcrossA = false, bool Fresh = false>
MOE_DEVICE void multiplyGroup(float (&d)[N / 2], uint64_t a, uint64_t b, EMU_PLACE) {
  emu::multiplyGroup(d, N, a, b, AcrossA, AcrossB, Fresh, file, line);
}
template <int N, bool Across = false>
MOE_DEVICE void multiplyGroup(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, EMU_PLACE) {
  emu::multiplyGroup(d, N, a, b, Across, file, line);
}
template <bool Fresh>
MOE_DEVICE void multiplyGroupFp8(float (&d)[64], uint64_t a, uint64_t b, EMU_PLACE) {
  emu::multiplyGroupFp8(d, a, b, Fresh, file, line);
}
MOE_DEVICE void commitProducts(EMU_PLACE) { emu::commitProducts(file, line); }
template <int Pending, int N>
MOE_DEVICE void waitProducts(float (&)[N], EMU_PLACE) {
  emu::waitForProducts(Pending, file, line);
}
