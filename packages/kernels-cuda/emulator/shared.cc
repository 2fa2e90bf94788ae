// Shared memory and the order of accesses to it.
//
// Every access is stamped with the run's clock, which advances at barriers. An earlier access is ordered before the
// current one if it was made by the same thread, or is older than the block's last barrier, or was made by a lane of
// the same warp and is older than that warp's last __syncwarp, or is older than its warp's arrival at an mbarrier that
// this thread has heard of. A write must be ordered after all earlier accesses, a read after the latest write.
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <vector>

#include "runtime.h"

namespace emu {

uintptr_t sharedStart, sharedBytes;
uint64_t* seals;

namespace {

constexpr size_t regionBytes = size_t(64) << 20;
// The dynamic part starts at the first of these; static arrays follow after the second, each at its own position.
// Arrays have exactly their declared alignment.
constexpr size_t dynamicStart = 4096 + 128, dynamicEnd = 4096 + (256 << 10);
constexpr size_t redZone = 256;

// Who accessed a word: a thread, several lanes of a warp, or several warps.
typedef uint16_t Who;
constexpr Who lanesOf = 0x400, everyone = 0x800, atomically = 0x1000, engine = 0x2000;  // engine: with the number of a barrier
constexpr uint32_t onItsWay = 0xffffffff;  // the write clock of the target of an asynchronous copy until it completes

/// The state of a word, or of a byte of a word that was accessed in parts.
struct Cell {
  uint32_t writeClock, readClock;
  Who writer, reader;
  bool inside;  // within a static array
  bool split;   // the bytes have their own state, since writeClock
};
Cell* cells;
Cell* byteCells;
/// For each 128 bytes and warp: when threads last read there, while that matters for mbarriers.
uint32_t (*readBy)[maxWarps];
uintptr_t region;
size_t staticEnd = dynamicEnd;

struct Array {
  const char* name;
  size_t start, bytes;
};
std::vector<Array> arrays;

int warpOf(Who who) { return who & (everyone | engine) ? 63 : who & lanesOf ? who & 31 : who >> 5 & 31; }

/// Ordered by mbarriers.
[[gnu::noinline]] bool heardOf(uint32_t clock, Who who) {
  const uint32_t* known = heard[run.thread];
  if (who & engine) return known[ofBoxes + (who & (maxBarriers - 1))] >= clock;
  if (!(who & everyone)) return known[warpOf(who)] > clock;
  for (int w = 0; w < (threadsOfBlock() + 31) / 32; w++)
    if (w != run.warp && known[w] <= clock) return false;
  return true;
}

inline bool ordered(uint32_t clock, Who who) {
  if (clock < run.barrierClock || who == run.thread) return true;
  if (warpOf(who) == run.warp && clock < run.warpClock[run.warp]) return true;
  return othersHeard && heardOf(clock, who);
}

std::string nameOf(Who who) {
  char text[60];
  if (who & engine) snprintf(text, sizeof text, "the copy engine");
  else if (who & everyone) snprintf(text, sizeof text, "threads of several warps");
  else if (who & lanesOf) snprintf(text, sizeof text, "several lanes of warp %d", who & 31);
  else snprintf(text, sizeof text, "thread %d", who & 0x3ff);
  return text;
}

std::string placeOf(uintptr_t address) {
  const size_t at = address - region;
  char text[200];
  snprintf(text, sizeof text, "byte %lld of dynamic shared memory", (long long)at - (long long)dynamicStart);
  for (const Array& array : arrays)
    if (at >= array.start - redZone / 2 && at < array.start + array.bytes + redZone / 2)
      snprintf(text, sizeof text, "byte %lld of shared array %s", (long long)at - (long long)array.start, array.name);
  return text;
}

[[noreturn]] void race(const char* now, const char* before, Who who, uintptr_t address, Where where) {
  stop(launchFailed, where, "race: %s of %s, %s by %s without a barrier between them (in numbers of threads of the block, this is thread %d)",
       now, placeOf(address).c_str(), before, nameOf(who).c_str(), run.thread);
}
[[noreturn]] void early(uintptr_t address, Where where) {
  stop(launchFailed, where, "race: access to %s while an asynchronous copy to it is in flight", placeOf(address).c_str());
}
[[noreturn]] void unwritten(uintptr_t address, Where where) {
  stop(illegalAddress, where, "uninitialized: read of %s, which no thread of the block has written (or not yet: is a barrier missing?)", placeOf(address).c_str());
}

[[noreturn]] void outside(uintptr_t address, size_t bytes, Where where) {
  const size_t at = address - region;
  if (at < dynamicEnd)
    stop(illegalAddress, where, "out of bounds: access of %zu bytes at %s; the launch has %u bytes", bytes, placeOf(address).c_str(),
         run.dynamicShared);
  stop(illegalAddress, where, "out of bounds: access of %zu bytes outside every shared array, at %s", bytes, placeOf(address).c_str());
}

inline Who merge(Who before) { return warpOf(before) == run.warp ? (Who)(lanesOf | run.warp) : everyone; }

[[gnu::noinline]] void checkRead(Cell& cell, uintptr_t address, Where where) {
  if (cell.writeClock < run.blockClock) unwritten(address, where);
  if (cell.writeClock == onItsWay) early(address, where);
  if (!ordered(cell.writeClock, cell.writer & ~atomically)) race("read", "written", cell.writer, address, where);
}

inline void readCell(Cell& cell, uintptr_t address, Where where) {
  // Fast path: usually written in this block, before its last barrier.
  if (__builtin_expect(cell.writeClock - run.blockClock >= run.barrierClock - run.blockClock, 0)) checkRead(cell, address, where);
  const Who me = (Who)run.thread;
  if (cell.readClock < run.barrierClock) cell.reader = me;
  else if (cell.reader != me && !(cell.reader & everyone)) cell.reader = ordered(cell.readClock, cell.reader) ? me : merge(cell.reader);
  cell.readClock = run.clock;
  if (othersHeard) readBy[(address - region) >> 7][run.warp] = run.clock;
}

/// True if the reads of a cell are ordered before the current access.
inline bool readsOrdered(const Cell& cell, uintptr_t address) {
  if (cell.readClock < run.barrierClock || !(cell.reader & everyone) || !othersHeard) return ordered(cell.readClock, cell.reader);
  for (int w = 0; w < (threadsOfBlock() + 31) / 32; w++) {
    const uint32_t when = readBy[(address - region) >> 7][w];
    if (w != run.warp && when >= run.barrierClock && heard[run.thread][w] <= when) return false;
  }
  return true;
}

/// Seals a word after a read. The parts of a word that was accessed in parts are not sealed.
inline void seal(const Cell& cell, uintptr_t address) {
  const size_t word = (address - region) >> 2;
  if (&cell != cells + word || cell.writeClock >= run.barrierClock || othersHeard) return;
  if (cell.reader & everyone) seals[word] = sealOf(anyWarp);
  else if (cell.reader & lanesOf) seals[word] = sealOf(run.warp);
}

inline void checkWrite(Cell& cell, uintptr_t address, Where where) {
  if (cell.writeClock >= run.barrierClock) {
    if (cell.writeClock == onItsWay) early(address, where);
    if (!ordered(cell.writeClock, cell.writer & ~atomically)) race("write", "written", cell.writer, address, where);
  }
  if (!readsOrdered(cell, address)) race("write", "read", cell.reader, address, where);
}

inline void writeCell(Cell& cell, uintptr_t address, Where where) {
  checkWrite(cell, address, where);
  cell.writeClock = run.clock;
  cell.writer = (Who)run.thread;
  cell.readClock = 0;
}

inline void atomicCell(Cell& cell, bool reads, uintptr_t address, Where where) {
  if (reads && cell.writeClock < run.blockClock) unwritten(address, where);
  if (cell.writeClock == onItsWay) early(address, where);
  Who who = (Who)run.thread;
  if (cell.writeClock >= run.barrierClock && !ordered(cell.writeClock, cell.writer & ~atomically)) {
    if (!(cell.writer & atomically)) race("atomic", "written", cell.writer, address, where);
    who = merge(cell.writer & ~atomically);
  }
  if (!readsOrdered(cell, address)) race("atomic", "read", cell.reader, address, where);
  cell.writer = who | atomically;
  cell.writeClock = run.clock;
  cell.readClock = 0;
}

void splitCell(size_t word) {
  Cell& cell = cells[word];
  for (int i = 0; i < 4; i++) {
    byteCells[4 * word + i] = cell;
    byteCells[4 * word + i].split = false;
  }
  cell.split = true;
  cell.writeClock = run.clock;
}

/// True for whole words, none of which has been accessed in parts.
inline bool whole(const Cell* cell, size_t start, size_t bytes) {
  if ((start | bytes) & 3 || !(cell->inside || (start >= dynamicStart && start + bytes <= dynamicStart + run.dynamicShared))) return false;
  bool good = true;
  for (size_t i = 0; i < bytes / 4; i++) good &= !cell[i].split & (cell[i].inside == cell->inside);
  return good;
}

template <class Visit>
[[gnu::noinline]] void visitParts(uintptr_t address, size_t bytes, Where where, Visit visit) {
  const size_t start = address - region, end = start + bytes;
  for (size_t at = start & ~(size_t)3; at < end; at += 4) {
    const size_t word = at >> 2;
    Cell& cell = cells[word];
    if (!(cell.inside || (at >= dynamicStart && end <= dynamicStart + run.dynamicShared))) outside(region + at, bytes, where);
    if (cell.split && cell.writeClock < run.blockClock) cell.split = false;
    const bool whole = at >= start && at + 4 <= end;
    if (whole && !cell.split) {
      visit(cell, region + at);
      continue;
    }
    if (!cell.split) splitCell(word);
    for (int i = 0; i < 4; i++)
      if (at + i >= start && at + i < end) visit(byteCells[4 * word + i], region + at + i);
  }
}

/// Calls `visit(cell, address)` for each cell of [address, address + bytes).
template <class Visit>
inline void visitCells(uintptr_t address, size_t bytes, Where where, Visit visit) {
  Cell* cell = cells + ((address - region) >> 2);
  if (!whole(cell, address - region, bytes)) return visitParts(address, bytes, where, visit);
  for (size_t i = 0; i < bytes / 4; i++) visit(cell[i], address + 4 * i);
}

}  // namespace

void reserveShared() {
  if (!region) {
    const auto reserve = [](size_t bytes) {
      void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (at == MAP_FAILED) abort();
      return at;
    };
    region = (uintptr_t)reserve(regionBytes);
    cells = (Cell*)reserve(regionBytes / 4 * sizeof(Cell));
    byteCells = (Cell*)reserve(regionBytes * sizeof(Cell));
    seals = (uint64_t*)reserve(regionBytes / 4 * sizeof *seals);
    readBy = (uint32_t(*)[maxWarps])reserve(regionBytes / 128 * sizeof *readBy);
  }
  sharedStart = region;
  sharedBytes = checksOn ? regionBytes : 0;
}

bool inShared(uintptr_t address) { return address - region < regionBytes; }

void forgetShared() {
  madvise(readBy, regionBytes / 128 * sizeof *readBy, MADV_DONTNEED);
  for (size_t i = 0; i < staticEnd / 4; i++) {
    Cell& cell = cells[i];
    cell.writeClock = cell.readClock = 0;
    cell.split = false;
    seals[i] = 0;
  }
}

void* dynamicShared() { return (void*)(region + dynamicStart); }

void* sharedArray(SharedSlot* slot, size_t bytes, size_t align, const char* name) {
  if (!slot->at) {
    // Aligned exactly as its type requires, because a device guarantees no more.
    size_t start = (staticEnd + redZone + 127) / 128 * 128;
    if (align < 16) start += align < 4 ? 4 : align;
    staticEnd = (start + bytes + 3) / 4 * 4;
    if (staticEnd + redZone > regionBytes) stop(outOfResources, EMU_HERE, "the emulator has no room for shared array %s", name);
    for (size_t at = start; at < staticEnd; at += 4) cells[at >> 2].inside = true;
    arrays.push_back({name, start, bytes});
    slot->at = (void*)(region + start);
    slot->kernel = run.kernel;
    run.kernel->staticShared += bytes;
    if (run.kernel->staticShared > 48 << 10)
      stop(outOfResources, EMU_HERE, "%zu bytes of static shared memory with array %s; 48 KiB is the most", run.kernel->staticShared, name);
    if (run.kernel->staticShared + run.dynamicShared > maxShared())
      stop(outOfResources, EMU_HERE, "%zu bytes of static shared memory with array %s and %u of dynamic; the device has %u for a block", run.kernel->staticShared, name, run.dynamicShared,
           maxShared());
  }
  return slot->at;
}

void readShared(uintptr_t address, size_t bytes, Where where) {
  touched[run.warp] |= 1u << run.lane;
  visitCells(address, bytes, where, [&](Cell& cell, uintptr_t at) {
    readCell(cell, at, where);
    seal(cell, at);
  });
}
void writeShared(uintptr_t address, size_t bytes, Where where) {
  touched[run.warp] |= 1u << run.lane;
  checkOverwrite("a thread writes", address, bytes, where);
  visitCells(address, bytes, where, [&](Cell& cell, uintptr_t at) { writeCell(cell, at, where); });
}
void atomicShared(uintptr_t address, bool reads, Where where) {
  touched[run.warp] |= 1u << run.lane;
  visitCells(address, 4, where, [&](Cell& cell, uintptr_t at) { atomicCell(cell, reads, at, where); });
}
void beginCopyShared(uintptr_t address, size_t bytes, Where where) {
  visitCells(address, bytes, where, [&](Cell& cell, uintptr_t at) {
    checkWrite(cell, at, where);
    cell.writeClock = onItsWay;
    cell.writer = (Who)run.thread;
    cell.readClock = 0;
  });
}
/// Checks, for a target of the copy engine, that threads that have read there have issued a proxy fence since, and that
/// this thread knows of it. (Reads that may still happen are detected elsewhere.)
void checkReaders(uintptr_t address, size_t bytes, Where where) {
  uintptr_t checked = 0;
  visitCells(address, bytes, where, [&](Cell& cell, uintptr_t at) {
    const uintptr_t line = (at - region) >> 7;
    if (cell.readClock < run.blockClock || line == checked || !readsOrdered(cell, at)) return;
    checked = line;
    for (int w = 0; w < (threadsOfBlock() + 31) / 32; w++) {
      const uint32_t when = readBy[line][w];
      if (when < run.blockClock) continue;
      bool fenced = false;
      for (int lane = 0; lane < 32 && !fenced; lane++) {
        const uint32_t fence = fenceAfter(w * 32 + lane, when);
        fenced = fence != 0 && (w == run.warp || fence < run.barrierClock || heard[run.thread][w] > fence);
      }
      if (!fenced)
        stop(launchFailed, where, "race: a box is copied to %s, which warp %d has read without fenceProxyAsync() before it arrived", placeOf(at).c_str(), w);
    }
  });
}
void landCopyShared(uintptr_t address, size_t bytes) {
  visitCells(address, bytes, {nullptr, 0}, [&](Cell& cell, uintptr_t) { cell.writeClock = run.clock; });
}

void landBoxShared(uintptr_t address, size_t bytes, int barrier) {
  visitCells(address, bytes, {nullptr, 0}, [&](Cell& cell, uintptr_t) {
    cell.writeClock = run.clock;
    cell.writer = (Who)(engine | barrier);
  });
}
void checkOperand(uintptr_t address, size_t bytes, Where where) {
  visitCells(address, bytes, where, [&](Cell& cell, uintptr_t at) {
    checkRead(cell, at, where);
    if (cell.writer & engine) return;
    // Written by a thread, which has made it visible since: whoever knows of that may read it.
    const int thread = cell.writer & 0x3ff;
    const uint32_t fence = fenceAfter(thread, cell.writeClock);
    if (fence == 0 || !ordered(fence, (Who)thread))
      stop(launchFailed, where, "a wgmma reads %s, which thread %d has written without fenceProxyAsync() before it arrived", placeOf(at).c_str(), thread);
  });
}
bool orderedBefore(uint32_t clock, int thread) { return ordered(clock, (Who)thread); }

std::string sharedPlace(uintptr_t address) { return placeOf(address); }
uint32_t sharedAddress(const void* shared) { return (uint32_t)((uintptr_t)shared - region); }

}  // namespace emu
