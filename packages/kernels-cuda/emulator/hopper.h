// TMA copies, mbarriers and wgmma for the emulator; device/hopper.cuh documents them. Implemented in
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
MOE_DEVICE T* warpUniform(T* shared, EMU_PLACE) {
  __shfl_sync(wholeWarp, 0, 0, 32, file, line);
  return shared;
}
MOE_DEVICE uint64_t warpUniform(uint64_t operand, EMU_PLACE) { return operand >> 32 << 32 | __shfl_sync(wholeWarp, (uint32_t)operand, 0, 32, file, line); }
MOE_DEVICE uint64_t advanceDescriptor(uint64_t operand, uint32_t distance = 0) { return operand + distance; }
MOE_DEVICE void initBarrier(Barrier* barrier, int arrivals, EMU_PLACE) { emu::initBarrier(barrier, arrivals, file, line); }
MOE_DEVICE void fenceBarrierInit() { emu::fenceBarrierInit(); }
MOE_DEVICE void arrive(Barrier* barrier, EMU_PLACE) { emu::arriveAtBarrier(barrier, 0, file, line); }
MOE_DEVICE void arriveAndExpectTx(Barrier* barrier, int bytes, EMU_PLACE) { emu::arriveAtBarrier(barrier, bytes, file, line); }
MOE_DEVICE void wait(Barrier* barrier, int parity, EMU_PLACE) { emu::waitForBarrier(barrier, parity, file, line); }
MOE_DEVICE void tmaLoad(void* shared, const TensorMap& map, Barrier* barrier, int x, int y, int z, EMU_PLACE) {
  emu::tmaLoad(shared, &map, barrier, x, y, z, file, line);
}
MOE_DEVICE void bulkLoad(void* shared, const void* global, int bytes, Barrier* barrier, EMU_PLACE) { emu::bulkLoad(shared, global, bytes, barrier, file, line); }
MOE_DEVICE void prefetchMap(const TensorMap&) {}

MOE_DEVICE void fenceProxyAsync() { emu::fenceProxyAsync(); }
MOE_DEVICE void syncWarpgroup(EMU_PLACE) { emu::syncWarpgroup(file, line); }
template <int N>
MOE_DEVICE void fenceAccumulator(float (&)[N]) {}
template <int N>
MOE_DEVICE void computeFirst(const float (&)[N]) {}
template <int N>
MOE_DEVICE void wgmmaFence(float (&)[N], EMU_PLACE) {
  emu::wgmmaFence(file, line);
}
template <int N, bool MnMajorB = false, bool MnMajorA = false, bool Fresh = false>
MOE_DEVICE void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, EMU_PLACE) {
  emu::wgmma(d, N, a, b, MnMajorA, MnMajorB, Fresh, file, line);
}
template <int N, bool MnMajor = false>
MOE_DEVICE void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, EMU_PLACE) {
  emu::wgmma(d, N, a, b, MnMajor, file, line);
}
template <bool Fresh>
MOE_DEVICE void wgmmaFp8(float (&d)[64], uint64_t a, uint64_t b, EMU_PLACE) {
  emu::wgmmaFp8(d, a, b, Fresh, file, line);
}
MOE_DEVICE void wgmmaCommit(EMU_PLACE) { emu::wgmmaCommit(file, line); }
template <int Pending, int N>
MOE_DEVICE void wgmmaWait(float (&)[N], EMU_PLACE) {
  emu::waitForProducts(Pending, file, line);
}
