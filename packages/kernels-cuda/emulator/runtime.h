// What the parts of the runtime share: the launch in progress, the two memories, faults.
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

// Status codes of the driver API that more than one part uses.
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

/// Blocks and threads run last to first. What differs then depends on an order that a device does not promise.
extern bool reversed;

/// Runs every block of a launch on the calling thread. Anything but `ok` leaves a fault recorded.
Status runKernel(Kernel* kernel, Dim3 grid, Dim3 block, uint32_t dynamicShared, const char* arguments);

/// Most shared memory of a block, in bytes.
uint32_t maxShared();

/// What the checks of every access need, in one place and without a call.
struct Run {
  bool active;  // a kernel runs: accesses are those of a device thread
  int thread, warp, lane;
  uint32_t dynamicShared;
  // Time by which accesses to shared memory are ordered. It advances when a block starts and at every barrier, block's or warp's.
  uint32_t clock, launchClock, blockClock, barrierClock, warpClock[maxWarps];
  Kernel* kernel;
  const char* arguments;
  Dim3 grid, block;
};
extern Run run;
extern Dim3 currentBlock, currentThread;

/// Where in the code: a line of the file that `at` names, or with line 0 the address `at`. Small, so that it travels in registers.
struct Where {
  const void* at;
  long line;
};
#define EMU_HERE (emu::Where{__builtin_return_address(0), 0})

/// Ends the launch with a fault of the current thread.
[[noreturn]] void stop(Status status, Where where, const char* format, ...) __attribute__((format(printf, 3, 4)));
[[noreturn]] void abandonLaunch(Status status);

// --- stacks and contexts (fibers.cc) ---

void reserveStacks();
void switchContext(void** save, void* load);
/// A context that calls `entry` on stack `index` when it is switched to.
void* freshContext(int index, void (*entry)());
extern uintptr_t stacksStart, stacksBytes;
/// Runs `body` on the calling thread with faults of the processor (null pointers with checks off, a stack that overflows) turned
/// into faults of the kernel.
void withSignals(void (*body)());

// --- faults (faults.cc) ---

void recordFault(Where where, const char* prefix, const char* format, va_list arguments);
void recordRefusal(const char* format, ...) __attribute__((format(printf, 1, 2)));
void clearFaults();
/// The recorded faults with their places in the source.
const char* faultReport();

// --- checks (hooks.cc) ---

extern bool checksOn;
void findImage();

// --- counts (traffic.cc) ---

extern bool counting;
/// An access of the current thread, by the instruction at `code`.
void countAccess(const void* code, uintptr_t address, int bytes, bool shared, bool write);
/// The block has ended.
void closeAccesses();

// --- device memory (memory.cc). One shadow byte for 4 bytes: the low half says which of them lie in an allocation, the high half which
// of those were written. ---

extern uintptr_t globalStart, globalBytes;  // 0 bytes while checks are off, so that hooks pass over it
extern uint8_t* globalShadow;
constexpr size_t arenaBytes = size_t(16) << 30;

bool inArena(uintptr_t address);
void readGlobalSlow(uintptr_t address, size_t bytes, Where where);
void writeGlobalSlow(uintptr_t address, size_t bytes, Where where);


void reserveMemory();
size_t memoryTotal();
size_t memoryUsed();
/// 0 when there is no room. The range becomes accessible with `openAllocation`.
uintptr_t reserveAllocation(size_t bytes);
void openAllocation(uintptr_t address);
/// Whether there was such an allocation.
bool knowsAllocation(uintptr_t address);
void closeAllocation(uintptr_t address);
/// For allocators that hand out parts: of `capacity` bytes the first `bytes` are accessible and hold nothing yet.
void markMemory(uintptr_t address, size_t bytes, size_t capacity);
void freeEverything();
/// Access from the host. False (with a fault recorded) when it is not allowed.
bool hostRead(uintptr_t address, size_t bytes, const char* call);
bool hostWrite(uintptr_t address, size_t bytes, const char* call);

// --- races on device memory (races.cc) ---

extern uint64_t* globalWrites;
extern uint32_t* globalReads;
void reserveRaces();
void forgetRaces(uintptr_t address, size_t bytes);
void raceRead(uintptr_t address, size_t bytes, bool atomic, Where where);
void raceWrite(uintptr_t address, size_t bytes, bool atomic, Where where);
/// Whether this launch has written there, as far as is known.
bool writtenInLaunch(uintptr_t address, size_t bytes);

/// Whole words that nobody has written in this launch and somebody has read need nothing more.
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

// --- shared memory (shared.cc) ---

/// Whether what that thread of the block did then is ordered before what the current one does, by barriers of any kind.
bool orderedBefore(uint32_t clock, int thread);


extern uintptr_t sharedStart, sharedBytes;  // 0 bytes while checks are off
void reserveShared();
bool inShared(uintptr_t address);
void forgetShared();
void readShared(uintptr_t address, size_t bytes, Where where);
void writeShared(uintptr_t address, size_t bytes, Where where);
void atomicShared(uintptr_t address, bool reads, Where where);
/// An asynchronous copy to it has begun; it has landed.
void beginCopyShared(uintptr_t address, size_t bytes, Where where);
void checkReaders(uintptr_t address, size_t bytes, Where where);
void landCopyShared(uintptr_t address, size_t bytes);
/// The copy engine's writes have landed, which whoever waits for the barrier will know.
void landBoxShared(uintptr_t address, size_t bytes, int barrier);
/// Whether a product may read what lies there: all of it there, known to this thread, and written by the copy engine or made visible to it.
void checkOperand(uintptr_t address, size_t bytes, Where where);
/// "byte 12 of shared array tile".
std::string sharedPlace(uintptr_t address);

// --- warps (warp.cc) ---

/// Copies of a thread that returned without waiting for them.
void landAllCopies(int thread);
void dropCopies();
void resetWarp(int warp);
extern uint32_t pendingCopies;  // of all threads

// --- ways of lanes (paths.cc) ---

/// The current lane does something that its warp need not do with it.
void walk(const char* what, const char* file, int line);
/// All lanes of the warp are there.
void meetPaths(int warp);
void resetPaths();

// --- barriers in shared memory and the copy engine (mbarrier.cc) ---

constexpr int maxBarriers = 64;
/// What each thread knows: by warp, up to when its accesses are told that this thread heard of; likewise its products' reads (from ofProducts on); then by barrier, the
/// time of the latest landing (from ofBoxes on).
constexpr int ofProducts = maxWarps, ofBoxes = 2 * maxWarps, thingsKnown = ofBoxes + maxBarriers;
extern uint32_t heard[maxThreads][thingsKnown];
/// By warp, the lanes that have accessed shared memory since it met.
extern uint32_t touched[maxWarps];
extern bool othersHeard;  // whether threads of this block can know of those of other warps but by its barrier
/// Lanes of a warp tell each other what they know.
void shareHeard(int warp);
/// A new block, or an abandoned one.
void resetBarriers();
/// The block has ended.
void checkBarriers();
/// What each barrier waits for, in words.
std::string barrierStates();

// --- products of warpgroups (product.cc) ---

/// Bits of a sum that products in fp8 keep: 0 for all of f32's.
extern int fp8Bits;

/// Somebody is about to write where products may still read.
void checkOverwrite(const char* what, uintptr_t address, size_t bytes, Where where);
/// When this thread first made visible to products what it wrote at that time; 0 if it has not.
uint32_t fenceAfter(int thread, uint32_t clock);
/// The current thread returns.
void checkProducts();
void dropProducts();

// --- matrices as the copy engine knows them (tensor-map.cc) ---

struct BoxMap {
  uint32_t magic, rank;
  uintptr_t address;
  uint64_t sizes[5], strides[4];  // elements; bytes from one row (matrix, ...) to the next
  uint16_t box[5];
  uint8_t elementBytes, swizzle;
};
constexpr uint32_t boxMapMagic = 0x544d4150;
constexpr uint8_t swizzle128 = 3;

// --- meeting points, for warp.cc and its like ---

/// The current thread waits; others go on. Returns when `wakeWarp` (or the block's barrier) has made it runnable.
void waitInWarp(const char* what, const char* file, int line);
/// All lanes of the current warp may go on.
void wakeWarp();
void wakeThread(int thread);
/// All threads of the block.
int threadsOfBlock();
/// Lanes that the current warp has.
uint32_t lanesOfWarp();

extern Kernel* kernels;

}  // namespace emu
