// Runs the blocks of a launch one after another. A thread gets a fiber of its own only when it has to wait. A thread
// that never waits costs no switch: its stack runs the next thread, and then the next block.
#include <stdio.h>

#include "runtime.h"

namespace emu {

Run run;
bool reversed;
// Defined here; constants to kernels (emulated.h).
Dim3 currentThread __asm__("threadIdx") __attribute__((visibility("hidden")));
Dim3 currentBlock __asm__("blockIdx") __attribute__((visibility("hidden")));
Dim3 currentBlockDim __asm__("blockDim") __attribute__((visibility("hidden")));
Dim3 currentGridDim __asm__("gridDim") __attribute__((visibility("hidden")));

namespace {

struct Waiting {
  const char* what;
  const char* file;
  int line;
};
struct Thread {
  void* context;
  int stack;
  bool started;
  Waiting waiting;
};

Thread threads[maxThreads];
Dim3 indices[maxThreads];
Dim3 indicesOf;  // the block shape that `indices` is for

int threadCount, warpCount;
uint32_t runnable[maxWarps];  // runnable lanes
uint32_t runnableWarps;       // warps with a runnable lane
uint32_t lanes[maxWarps];
uint32_t returned[maxWarps];
int returnedCount;

int atBarrier;
Waiting barrierPlace;
int barrierSums[2], barrierParity;  // results of __syncthreads_or and similar

int freeStacks[maxThreads], freeStackCount;
void* scheduler;
Status outcome;

void startBlock() {
  run.blockClock = run.barrierClock = ++run.clock;
  returnedCount = atBarrier = 0;
  resetBarriers();
  resetPaths();
  barrierSums[0] = barrierSums[1] = 0;
  for (int w = 0; w < warpCount; w++) {
    runnable[w] = lanes[w];
    returned[w] = 0;
    run.warpClock[w] = run.clock;
    touched[w] = 0;
    resetWarp(w);
  }
  runnableWarps = warpCount == 32 ? 0xffffffffu : (1u << warpCount) - 1;
  for (int t = 0; t < threadCount; t++) threads[t].started = false;
}

/// Selects the next block, in order or in reverse order.
bool nextBlock() {
  if (reversed) {
    if (currentBlock.x-- == 0) {
      currentBlock.x = run.grid.x - 1;
      if (currentBlock.y-- == 0) {
        currentBlock.y = run.grid.y - 1;
        if (currentBlock.z-- == 0) return false;
      }
    }
    startBlock();
    return true;
  }
  if (++currentBlock.x == run.grid.x) {
    currentBlock.x = 0;
    if (++currentBlock.y == run.grid.y) {
      currentBlock.y = 0;
      if (++currentBlock.z == run.grid.z) return false;
    }
  }
  startBlock();
  return true;
}

inline void enter(int t) {
  run.thread = t;
  run.warp = t >> 5;
  run.lane = t & 31;
  currentThread = indices[t];
}

int lastOf(uint32_t bits) { return 31 - __builtin_clz(bits); }

int pickPrevious() {
  if (const uint32_t own = runnable[run.warp]) {
    const uint32_t earlier = own & ((1u << run.lane) - 1);
    return run.warp << 5 | lastOf(earlier ? earlier : own);
  }
  if (!runnableWarps) return -1;
  const uint32_t earlier = runnableWarps & ((1u << run.warp) - 1);
  const int w = lastOf(earlier ? earlier : runnableWarps);
  return w << 5 | lastOf(runnable[w]);
}

/// The next runnable thread, of the same warp if possible, so that lanes that synchronize run in order.
inline int pickNext() {
  if (__builtin_expect(reversed, 0)) return pickPrevious();
  if (const uint32_t own = runnable[run.warp]) {
    const uint32_t later = own & ~1u << run.lane;
    return run.warp << 5 | __builtin_ctz(later ? later : own);
  }
  if (!runnableWarps) return -1;
  const uint32_t later = runnableWarps & ~1u << run.warp;
  const int w = __builtin_ctz(later ? later : runnableWarps);
  return w << 5 | __builtin_ctz(runnable[w]);
}

inline void cannotRun(int t) {
  if (!(runnable[t >> 5] &= ~(1u << (t & 31)))) runnableWarps &= ~(1u << (t >> 5));
}

const char* baseName(const char* path) {
  const char* slash = path ? strrchr(path, '/') : nullptr;
  return slash ? slash + 1 : path ? path : "?";
}

/// Reports a deadlock: no thread is runnable, but not all have returned. Says which threads wait where.
[[noreturn]] void stuck() {
  std::string text;
  bool told[maxThreads] = {};
  int shown = -1;
  for (int t = 0; t < threadCount; t++) {
    if (told[t] || (returned[t >> 5] >> (t & 31) & 1)) continue;
    if (shown < 0) shown = t;
    int count = 0;
    for (int u = t; u < threadCount; u++) {
      const Waiting &a = threads[t].waiting, &b = threads[u].waiting;
      if ((returned[u >> 5] >> (u & 31) & 1) || a.what != b.what || a.line != b.line || a.file != b.file) continue;
      told[u] = true;
      count++;
    }
    char line[300];
    const Waiting& w = threads[t].waiting;
    snprintf(line, sizeof line, "%s%d of %d threads (the first is %d) wait at %s (%s:%d)", text.empty() ? "" : ", ", count, threadCount, t,
             w.what, baseName(w.file), w.line);
    if (text.size() < 1000) text += line;
  }
  if (returnedCount > 0) {
    int first = 0;
    while (!(returned[first >> 5] >> (first & 31) & 1)) first++;
    char line[100];
    snprintf(line, sizeof line, ", %d returned (the first is %d)", returnedCount, first);
    text += line;
  }
  text += barrierStates();
  enter(shown);
  const Waiting w = threads[shown].waiting;
  stop(launchFailed, {w.file, w.line}, "threads wait for each other at different places: %s", text.c_str());
}

void fiberMain();

int takeStack() {
  return freeStacks[--freeStackCount];
}

/// Runs other threads until this one is runnable.
inline void leave(const char* what, const char* file, int line) {
  const int me = run.thread;
  Waiting& waiting = threads[me].waiting;
  waiting.what = what;
  waiting.file = file;
  waiting.line = line;
  cannotRun(me);
  const int next = pickNext();
  if (next < 0) stuck();
  enter(next);
  Thread& thread = threads[next];
  if (!thread.started) {
    thread.started = true;
    thread.stack = takeStack();
    thread.context = freshContext(thread.stack, fiberMain);
  }
  switchContext(&threads[me].context, thread.context);
}

int firstThread() { return reversed ? threadCount - 1 : 0; }

/// Called when the current thread has returned. Returns when this stack has another thread to start.
void finish() {
  const int me = run.thread;
  if (pendingCopies) landAllCopies(me);
  checkProducts();
  returned[run.warp] |= 1u << run.lane;
  returnedCount++;
  cannotRun(me);
  void* discarded;
  int next = pickNext();
  if (next < 0) {
    if (returnedCount < threadCount) stuck();
    checkBarriers();
    if (counting) closeAccesses();
    const int stack = threads[me].stack;
    if (!nextBlock()) switchContext(&discarded, scheduler);
    next = firstThread();
    threads[me].stack = stack;
  }
  enter(next);
  Thread& thread = threads[next];
  if (!thread.started) {
    thread.started = true;
    thread.stack = threads[me].stack;
    return;
  }
  freeStacks[freeStackCount++] = threads[me].stack;
  switchContext(&discarded, thread.context);
}

void fiberMain() {
  for (;;) {
    run.kernel->invoke(run.kernel->entry, run.arguments);
    finish();
  }
}

void runBlocks() {
  const int first = firstThread();
  enter(first);
  threads[first].started = true;
  threads[first].stack = takeStack();
  run.active = true;
  switchContext(&scheduler, freshContext(threads[first].stack, fiberMain));
  run.active = false;
}

}  // namespace

Status runKernel(Kernel* kernel, Dim3 grid, Dim3 block, uint32_t dynamicShared, const char* arguments) {
  reserveStacks();
  run.kernel = kernel;
  run.arguments = arguments;
  run.grid = grid;
  run.block = block;
  run.dynamicShared = dynamicShared;
  currentGridDim = grid;
  currentBlockDim = block;
  currentBlock = reversed ? Dim3{grid.x - 1, grid.y - 1, grid.z - 1} : Dim3{0, 0, 0};
  if (run.clock > 0xc0000000u) {
    forgetShared();
    forgetRaces(globalStart, arenaBytes);
    run.clock = 0;
  }
  run.launchClock = ++run.clock;
  threadCount = (int)(block.x * block.y * block.z);
  warpCount = (threadCount + 31) / 32;
  for (int w = 0; w < warpCount; w++) {
    const int count = threadCount - 32 * w;
    lanes[w] = count >= 32 ? 0xffffffffu : (1u << count) - 1;
  }
  if (memcmp(&indicesOf, &block, sizeof block) != 0) {
    indicesOf = block;
    for (uint32_t t = 0; t < (uint32_t)threadCount; t++)
      indices[t] = {t % block.x, t / block.x % block.y, t / block.x / block.y};
  }
  freeStackCount = maxThreads;
  for (int i = 0; i < maxThreads; i++) freeStacks[i] = maxThreads - 1 - i;
  outcome = ok;
  startBlock();
  withSignals(runBlocks);
  return outcome;
}

void abandonLaunch(Status status) {
  outcome = status;
  dropCopies();
  dropProducts();
  resetBarriers();
  forgetShared();
  void* discarded;
  switchContext(&discarded, scheduler);
  __builtin_unreachable();
}

void stop(Status status, Where where, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  char prefix[300];
  snprintf(prefix, sizeof prefix, "%s, block (%u, %u, %u), thread (%u, %u, %u)", run.kernel->name, currentBlock.x, currentBlock.y,
           currentBlock.z, currentThread.x, currentThread.y, currentThread.z);
  recordFault(where, prefix, format, arguments);
  va_end(arguments);
  abandonLaunch(status);
}

void waitInWarp(const char* what, const char* file, int line) { leave(what, file, line); }
void wakeWarp() {
  runnable[run.warp] = lanes[run.warp];
  runnableWarps |= 1u << run.warp;
}
void wakeThread(int thread) {
  runnable[thread >> 5] |= 1u << (thread & 31);
  runnableWarps |= 1u << (thread >> 5);
}
int threadsOfBlock() { return threadCount; }
uint32_t lanesOfWarp() { return lanes[run.warp]; }

/// Returns true for the thread that completes the barrier, which continues directly.
static bool arrive(const char* what, const char* file, int line) {
  if (atBarrier == 0) {
    barrierPlace = {what, file, line};
  } else if (barrierPlace.line != line || barrierPlace.file != file) {
    stop(launchFailed, {file, line}, "divergent barrier: this thread reaches %s at %s:%d while others wait at %s at %s:%d", what,
         baseName(file), line, barrierPlace.what, baseName(barrierPlace.file), barrierPlace.line);
  }
  if (++atBarrier < threadCount) {
    leave(what, file, line);
    return false;
  }
  atBarrier = 0;
  for (int w = 0; w < warpCount; w++) {
    meetPaths(w);
    touched[w] = 0;
  }
  run.barrierClock = ++run.clock;
  for (int w = 0; w < warpCount; w++) runnable[w] = lanes[w];
  runnableWarps = warpCount == 32 ? 0xffffffffu : (1u << warpCount) - 1;
  return true;
}

void barrier(const char* file, int line) { arrive("__syncthreads", file, line); }

int barrierReduce(BarrierKind kind, int value, const char* file, int line) {
  // Two sums in alternation: no thread can reach the barrier after the next one before all have read the result of this
  // one.
  const int mine = barrierParity;
  barrierSums[mine] += value != 0;
  if (arrive("__syncthreads_or/and/count", file, line)) {
    barrierParity ^= 1;
    barrierSums[barrierParity] = 0;
  }
  const int sum = barrierSums[mine];
  return kind == barrierCount ? sum : kind == barrierOr ? sum > 0 : sum == threadCount;
}

void trap(const char* file, int line) { stop(launchFailed, {file, line}, "__trap() was reached"); }

}  // namespace emu
