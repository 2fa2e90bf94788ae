// The interface between compiled kernels and the runtime. Kept small, because every kernel includes it.
#pragma once
#include <stddef.h>
#include <stdint.h>

#define EMU_EXPORT extern "C" __attribute__((visibility("default")))

namespace emu {

/// One parameter of a kernel. `letter` 0 ends the list; `count` is 0 unless the parameter is an array.
struct Parameter {
  char letter;
  int count, size, align;
};

struct Kernel {
  const char* module;
  const char* name;
  const char* file;
  int maxThreads;
  const Parameter* parameters;
  /// Unpacks the arguments and calls `entry` once, for the current thread.
  void (*invoke)(void (*entry)(), const char* packed);
  void (*entry)();
  Kernel* next;
  /// The size of static shared memory, as far as runs have revealed it.
  size_t staticShared;
};
void registerKernel(Kernel* kernel);

/// The position of a static shared array: one per declaration (and template instantiation), assigned at its first use.
struct SharedSlot {
  void* at;
  const Kernel* kernel;
};
void* sharedArray(SharedSlot* slot, size_t bytes, size_t align, const char* name);
void* dynamicShared();

/// Whether approximate instructions have the largest error that the PTX ISA allows, in translated kernels.
extern int approximate;

// Synchronization. Each call takes its source position, by which the runtime detects threads that meet at different
// ones.
void barrier(const char* file, int line);
enum BarrierKind : int { barrierOr, barrierAnd, barrierCount };
int barrierReduce(BarrierKind kind, int value, const char* file, int line);
void warpBarrier(uint32_t mask, const char* file, int line);
enum ShuffleKind : int { shuffleIndex, shuffleXor, shuffleUp, shuffleDown };
uint64_t shuffle(ShuffleKind kind, uint32_t mask, uint64_t bits, int operand, int width, const char* file, int line);
uint32_t ballot(uint32_t mask, bool value, const char* file, int line);
/// Each lane of a warp brings a value; `combine` turns the 32 values into the results of all lanes.
uint64_t combineLanes(uint64_t bits, void (*combine)(uint64_t* values, int lanes), int lanes, const char* file, int line);

enum AtomicKind : int { atomicAddKind, atomicMaxKind, atomicMinKind, atomicMaxSigned, atomicMinSigned, atomicExchange, atomicCompare, atomicAndKind, atomicOrKind };
uint32_t atomic(AtomicKind kind, void* address, uint32_t value, uint32_t compare);

// Tensor cores and asynchronous copies.
struct Words4 {
  uint32_t v[4];
};
struct Floats4 {
  float v[4];
};
void copyAsync(void* shared, const void* global, int bytes, bool valid);
void cpAsyncCommit();
void cpAsyncWait(int pending);
Words4 loadMatrices(const void* row, bool transposed, const char* file, int line);
Floats4 mmaBf16(Floats4 d, Words4 a, uint32_t b0, uint32_t b1, const char* file, int line);
Floats4 mmaTf32(Floats4 d, Words4 a, uint32_t b0, uint32_t b1, const char* file, int line);

// Hopper: mbarriers, TMA copies and wgmma.
uint32_t sharedAddress(const void* shared);
void initBarrier(void* barrier, int arrivals, const char* file, int line);
void fenceBarrierInit();
void arriveAtBarrier(void* barrier, int expectedBytes, const char* file, int line);
void waitForBarrier(void* barrier, int parity, const char* file, int line);
void tmaLoad(void* shared, const void* map, void* barrier, int x, int y, int z, const char* file, int line);
void bulkLoad(void* shared, const void* global, int bytes, void* barrier, const char* file, int line);
void fenceProxyAsync();
void syncWarpgroup(const char* file, int line);
void wgmmaFence(const char* file, int line);
void wgmma(float* d, int n, uint64_t a, uint64_t b, bool acrossA, bool acrossB, bool fresh, const char* file, int line);
void wgmma(float* d, int n, const uint32_t* a, uint64_t b, bool across, const char* file, int line);
void wgmmaFp8(float* d, uint64_t a, uint64_t b, bool fresh, const char* file, int line);
void wgmmaCommit(const char* file, int line);
void waitForProducts(int pending, const char* file, int line);

/// A load through the read-only path, whose memory the launch must not write.
void checkConstant(const void* address, size_t bytes, const char* file, int line);

/// A warp-wide (.aligned) instruction.
void atAligned(const char* what, const char* file, int line);

[[noreturn]] void trap(const char* file, int line);

}  // namespace emu
