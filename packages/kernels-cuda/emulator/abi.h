// What compiled kernels and the runtime say to each other. Light: every kernel includes it.
#pragma once
#include <stddef.h>
#include <stdint.h>

#define EMU_EXPORT extern "C" __attribute__((visibility("default")))

namespace emu {

/// One parameter of a kernel; `letter` 0 ends the list. `count` is 0 unless it is an array.
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
  /// Static shared memory as far as runs have shown it.
  size_t staticShared;
};
void registerKernel(Kernel* kernel);

/// A place of static shared memory: one per declaration (and instantiation), found at its first use.
struct SharedSlot {
  void* at;
  const Kernel* kernel;
};
void* sharedArray(SharedSlot* slot, size_t bytes, size_t align, const char* name);
void* dynamicShared();

/// Whether instructions that approximate are as far off as they may be (PTX ISA): those of translated kernels.
extern int approximate;

// Where threads meet. Each takes the place in the source, by which the runtime knows whether they meet at the same one.
void barrier(const char* file, int line);
enum BarrierKind : int { barrierOr, barrierAnd, barrierCount };
int barrierReduce(BarrierKind kind, int value, const char* file, int line);
void warpBarrier(uint32_t mask, const char* file, int line);
enum ShuffleKind : int { shuffleIndex, shuffleXor, shuffleUp, shuffleDown };
uint64_t shuffle(ShuffleKind kind, uint32_t mask, uint64_t bits, int operand, int width, const char* file, int line);
uint32_t ballot(uint32_t mask, bool value, const char* file, int line);

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
void commitCopies();
void waitCopies(int pending);
Words4 loadMatrices(const void* row, bool transposed, const char* file, int line);
Floats4 multiplyBf16(Floats4 d, Words4 a, uint32_t b0, uint32_t b1, const char* file, int line);
Floats4 multiplyTf32(Floats4 d, Words4 a, uint32_t b0, uint32_t b1, const char* file, int line);

// Hopper: barriers in shared memory with the copy engine, and products of warpgroups.
uint32_t sharedAddress(const void* shared);
void initBarrier(void* barrier, int arrivals, const char* file, int line);
void fenceBarriers();
void arriveAtBarrier(void* barrier, int expectedBytes, const char* file, int line);
void waitForBarrier(void* barrier, int parity, const char* file, int line);
void copyBox(void* shared, const void* map, void* barrier, int x, int y, int z, const char* file, int line);
void copyBytes(void* shared, const void* global, int bytes, void* barrier, const char* file, int line);
void fenceOperands();
void syncWarpgroup(const char* file, int line);
void fenceProducts(const char* file, int line);
void multiplyGroup(float* d, int n, uint64_t a, uint64_t b, bool acrossA, bool acrossB, bool fresh, const char* file, int line);
void multiplyGroup(float* d, int n, const uint32_t* a, uint64_t b, bool across, const char* file, int line);
void multiplyGroupFp8(float* d, uint64_t a, uint64_t b, bool fresh, const char* file, int line);
void commitProducts(const char* file, int line);
void waitForProducts(int pending, const char* file, int line);

/// A load from memory that the launch does not write.
void checkConstant(const void* address, size_t bytes, const char* file, int line);

/// An instruction that is the whole warp's.
void atAligned(const char* what, const char* file, int line);

[[noreturn]] void trap(const char* file, int line);

}  // namespace emu
