// What the parts of the runtime share: the current launch, both memories, faults.
#pragma once
#include <stdarg.h>
#include <string.h>

#include <string>

#include "abi.h"

namespace emu {

struct Dim3 {
  uint32_t x, y, z;
};

constexpr int maxThreads = 1024;
constexpr int maxWarps = maxThreads / 32;

// Status codes of the driver API that several parts use.
enum Status : int {
  ok = 0,
  invalidValue = 1,
  outOfMemory = 2,
  notInitialized = 3,
  invalidDevice = 101,
  invalidContext = 201,
  invalidImage = 200,
  noBinary = 209,
  invalidHandle = 400,
  notFound = 500,
  notReady = 600,
  illegalAddress = 700,
  outOfResources = 701,
  misalignedAddress = 716,
  launchFailed = 719,
  captureUnsupported = 900,
  captureInvalidated = 901,
  captureIsolation = 905,
};

// --- the launch in progress (block.cc) ---

/// Whether blocks and threads run in reverse order. Results that change then depend on an order that a device does not
/// guarantee.
extern bool reversed;

/// Runs every block of a launch on the calling thread. Any status but `ok` leaves a fault recorded.
Status runKernel(Kernel* kernel, Dim3 grid, Dim3 block, uint32_t dynamicShared, const char* arguments);

/// Maximum shared memory of a block, in bytes.
uint32_t maxShared();

/// State that every access check needs, in one place and without a call.
struct Run {
  bool active;  // a kernel is running, so accesses are those of a device thread
  int thread, warp, lane;
  uint32_t dynamicShared;
  // Logical time, which orders accesses to shared memory. Advances when a block starts and at every barrier of a block
  // or warp.
  uint32_t clock, launchClock, blockClock, barrierClock, warpClock[maxWarps];
  Kernel* kernel;
  const char* arguments;
  Dim3 grid, block;
};
extern Run run;
extern Dim3 currentBlock, currentThread;

/// A position in the code: a line of the file `at` or, with line 0, the code address `at`. Small enough to be passed in
/// registers.
struct Where {
  const void* at;
  long line;
};
#define EMU_HERE (emu::Where{__builtin_return_address(0), 0})

/// Ends the launch with a fault of the current thread.
[[noreturn]] void stop(Status status, Where where, const char* format, ...) __attribute__((format(printf, 3, 4)));
[[noreturn]] void abandonLaunch(Status status);

// --- tensor cores (product.cc) ---

/// Whether products in bf16 and TF32 are summed as on Hopper, rather than one after the other.
extern int deviceSums;
/// Adds a sum and products as tensor cores do: all terms are aligned to the largest one and truncated after `bits` bits,
/// and the result after `resultBits`. The defaults are Hopper's for bf16 and TF32, of which it adds 16 and 8 products at
/// a time (arXiv:2511.10909); fp8 retains 14 bits (DeepSeek-V3 report, 3.3.2).
float addAligned(float sum, const double* products, int count, int bits = 26, int resultBits = 24);

// --- stacks and contexts (fibers.cc) ---

void reserveStacks();
void switchContext(void** save, void* load);
/// Creates a context that calls `entry` on stack `index` when it is switched to.
void* freshContext(int index, void (*entry)());
extern uintptr_t stacksStart, stacksBytes;
/// Runs `body` on the calling thread. Signals of the processor (null pointers with checks off, stack overflow) become
/// faults of the kernel.
void withSignals(void (*body)());

// --- faults (faults.cc) ---

void recordFault(Where where, const char* prefix, const char* format, va_list arguments);
void recordRefusal(const char* format, ...) __attribute__((format(printf, 1, 2)));
void clearFaults();
/// The recorded faults with their source positions.
const char* faultReport();

// --- checks (hooks.cc) ---

extern bool checksOn;
void findImage();

// --- memory traffic (traffic.cc) ---

extern bool counting;
/// Counts an access of the current thread, by the instruction at `code`.
void countAccess(const void* code, uintptr_t address, int bytes, bool shared, bool write);
/// Called at the end of a block.
void closeAccesses();

// --- device memory (memory.cc). One shadow byte per 4 bytes: the low half says which of them are allocated, the high
// half which have been written. ---

extern uintptr_t globalStart, globalBytes;  // globalBytes is 0 while checks are off, so that hooks ignore the range
extern uint8_t* globalShadow;
constexpr size_t arenaBytes = size_t(16) << 30;

bool inArena(uintptr_t address);
void readGlobalSlow(uintptr_t address, size_t bytes, Where where);
void writeGlobalSlow(uintptr_t address, size_t bytes, Where where);


void reserveMemory();
size_t memoryTotal();
size_t memoryUsed();
/// Reserves an address range; 0 if there is no room. openAllocation makes it accessible.
uintptr_t reserveAllocation(size_t bytes);
void openAllocation(uintptr_t address);
/// True if there was such an allocation.
bool knowsAllocation(uintptr_t address);
void closeAllocation(uintptr_t address);
/// For suballocators: the first `bytes` of `capacity` bytes are accessible and uninitialized.
void markMemory(uintptr_t address, size_t bytes, size_t capacity);
void freeEverything();
/// An access from the host. Returns false, with a fault recorded, if it is not allowed.
bool hostRead(uintptr_t address, size_t bytes, const char* call);
bool hostWrite(uintptr_t address, size_t bytes, const char* call);

// --- races on device memory (races.cc) ---

extern uint64_t* globalWrites;
extern uint32_t* globalReads;
void reserveRaces();
void forgetRaces(uintptr_t address, size_t bytes);
void raceRead(uintptr_t address, size_t bytes, bool atomic, Where where);
void raceWrite(uintptr_t address, size_t bytes, bool atomic, Where where);
/// True if this launch is known to have written there.
bool writtenInLaunch(uintptr_t address, size_t bytes);

/// True for whole words that were read, and not written, in this launch: they need no further checks.
inline bool readBefore(uintptr_t address, size_t bytes) {
  const size_t word = (address - globalStart) >> 2;
  bool good = true;
  for (size_t i = word; i < word + (bytes + 3) / 4; i++) good &= (uint32_t)(globalWrites[i] >> 32) < run.launchClock && globalReads[i] >= run.launchClock;
  return good;
}

inline void readGlobal(uintptr_t address, size_t bytes, Where where, bool atomic = false) {
  readGlobalSlow(address, bytes, where);
  raceRead(address, bytes, atomic, where);
}
inline void writeGlobal(uintptr_t address, size_t bytes, Where where, bool atomic = false) {
  writeGlobalSlow(address, bytes, where);
  raceWrite(address, bytes, atomic, where);
}

// --- mbarriers and TMA copies (mbarrier.cc) ---

constexpr int maxBarriers = 64;
/// What each thread has heard of: for each warp, up to which time it knows of the warp's accesses; from ofProducts on,
/// the same for its products' reads; from ofBoxes on, for each barrier, the time of the latest completed copy.
constexpr int ofProducts = maxWarps, ofBoxes = 2 * maxWarps, thingsKnown = ofBoxes + maxBarriers;
extern uint32_t heard[maxThreads][thingsKnown];
/// For each warp, the lanes that have accessed shared memory since it converged.
extern uint32_t touched[maxWarps];
extern bool othersHeard;  // whether threads of this block may know of other warps' accesses other than by __syncthreads
/// Merges what the lanes of a warp have heard.
void shareHeard(int warp);
/// Called when a block starts or is abandoned.
void resetBarriers();
/// Called at the end of a block.
void checkBarriers();
/// Describes what each barrier is waiting for.
std::string barrierStates();

// --- shared memory (shared.cc) ---

/// True if what the given thread of the block did at that time is ordered before the current access, by barriers of any
/// kind.
bool orderedBefore(uint32_t clock, int thread);


extern uintptr_t sharedStart, sharedBytes;  // sharedBytes is 0 while checks are off
void reserveShared();
bool inShared(uintptr_t address);
void forgetShared();
void readShared(uintptr_t address, size_t bytes, Where where);
/// For each word: sealOf(warp) if further reads by that warp, or by any, change nothing until its next barrier. A write
/// before that barrier is a race with the reads, so it need not break the seal.
extern uint64_t* seals;
constexpr int anyWarp = 63;
inline uint64_t sealOf(int warp) {
  const uint32_t since = warp == anyWarp || run.warpClock[warp] < run.barrierClock ? run.barrierClock : run.warpClock[warp];
  return (uint64_t)since << 6 | warp;
}
/// True for whole words with the same seal, which need no further checks.
template <size_t Bytes>
inline bool sealed(uintptr_t address) {
  if (Bytes < 4 || othersHeard) return false;
  const uint64_t* seal = seals + ((address - sharedStart) >> 2);
  if (*seal != sealOf(anyWarp) && *seal != sealOf(run.warp)) return false;
  uint64_t others = 0;
#pragma GCC unroll 4
  for (size_t i = 1; i < Bytes / 4; i++) others |= seal[i] ^ *seal;
  return others == 0;
}
void writeShared(uintptr_t address, size_t bytes, Where where);
void atomicShared(uintptr_t address, bool reads, Where where);
/// An asynchronous copy to shared memory has started, and has completed.
void beginCopyShared(uintptr_t address, size_t bytes, Where where);
void checkReaders(uintptr_t address, size_t bytes, Where where);
void landCopyShared(uintptr_t address, size_t bytes);
/// The copy engine's writes have completed, which threads that wait for the barrier will know.
void landBoxShared(uintptr_t address, size_t bytes, int barrier);
/// Checks that a wgmma may read this memory: it is initialized, ordered before this thread, and was written by the copy
/// engine or made visible to the async proxy.
void checkOperand(uintptr_t address, size_t bytes, Where where);
/// "byte 12 of shared array tile".
std::string sharedPlace(uintptr_t address);

// --- warps (warp.cc) ---

/// Completes the copies of a thread that returned without waiting for them.
void landAllCopies(int thread);
void dropCopies();
void resetWarp(int warp);
extern uint32_t pendingCopies;  // of all threads

// --- convergence of warps (convergence.cc) ---

/// Records that the current lane does something that its warp need not do with it.
void walk(const char* what, const char* file, int line);
/// Called when all lanes of the warp have converged.
void meetPaths(int warp);
void resetPaths();

// --- wgmma (product.cc) ---

/// The number of bits of accumulators that fp8 products retain; 0 for all of f32.
extern int fp8Bits;

/// Checks that no product in flight reads memory that is about to be written.
void checkOverwrite(const char* what, uintptr_t address, size_t bytes, Where where);
/// When this thread first made its writes of that time visible to the async proxy; 0 if it has not.
uint32_t fenceAfter(int thread, uint32_t clock);
/// Called when the current thread returns.
void checkProducts();
void dropProducts();

// --- tensor maps (tensor-map.cc) ---

struct BoxMap {
  uint32_t magic, rank;
  uintptr_t address;
  uint64_t sizes[5], strides[4];  // in elements; strides in bytes between rows (matrices, ...)
  uint16_t box[5];
  uint8_t elementBytes, swizzle;
};
constexpr uint32_t boxMapMagic = 0x544d4150;
constexpr uint8_t swizzle128 = 3;

// --- waiting, for warp.cc and similar ---

/// Suspends the current thread and runs others. Returns when `wakeWarp` (or the block's barrier) has made it runnable.
void waitInWarp(const char* what, const char* file, int line);
/// Makes all lanes of the current warp runnable.
void wakeWarp();
void wakeThread(int thread);
/// The number of threads of the block.
int threadsOfBlock();
/// The lanes that exist in the current warp.
uint32_t lanesOfWarp();

extern Kernel* kernels;

}  // namespace emu
