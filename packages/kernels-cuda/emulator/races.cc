// Detects races on global memory: nothing orders blocks, and only barriers order the threads of a block. For each
// 4-byte word, records who wrote it last and when it was first read in this launch. Kernels that run one after another
// are ordered, and so are blocks that have met in an atomic (so the last one to count up may read what the others have
// written).
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <algorithm>

#include "runtime.h"

namespace emu {

uint64_t* globalWrites;
uint32_t* globalReads;

namespace {

// The latest write of a word: time (32 bits), then flags, bytes of the word (4 bits) and the thread of the block.
constexpr uint64_t atomically = 1 << 16, bySeveral = 1 << 17;
constexpr int bytesShift = 10;
uint32_t met;  // blocks that have met others in an atomic, by start time

uint32_t timeOf(uint64_t write) { return (uint32_t)(write >> 32); }
int threadOf(uint64_t write) { return (int)(write & 0x3ff); }
uint32_t bytesOf(uint64_t write) { return (uint32_t)(write >> bytesShift & 0xf); }

[[noreturn]] void race(const char* now, const char* before, uint64_t write, uintptr_t address, Where where) {
  char who[60];
  if (timeOf(write) < run.blockClock) snprintf(who, sizeof who, "another block of this launch");
  else if (write & bySeveral) snprintf(who, sizeof who, "several threads of this block");
  else snprintf(who, sizeof who, "thread %d of this block", threadOf(write));
  stop(launchFailed, where, "race: %s of device memory at 0x%zx, which %s has %s%s", now, (size_t)address, who, before,
       timeOf(write) < run.blockClock ? "" : " without a barrier since");
}

/// Calls `visit(word, address, mask of its bytes)` for each word.
template <class Visit>
inline void visitWords(uintptr_t address, size_t bytes, Visit visit) {
  const uintptr_t end = address + bytes;
  for (uintptr_t word = address & ~(uintptr_t)3; word < end; word += 4) {
    const int from = word < address ? (int)(address - word) : 0, to = word + 4 > end ? (int)(end - word) : 4;
    visit((word - globalStart) >> 2, word, ((1u << to) - 1) & ~((1u << from) - 1));
  }
}

/// True if the latest write of these bytes was in this launch and is not ordered before the current access.
inline bool conflicts(uint64_t write, uint32_t bytes, bool atomic) {
  if (timeOf(write) < run.launchClock || !(bytesOf(write) & bytes) || (atomic && write & atomically)) return false;
  if (timeOf(write) < run.blockClock) return met != run.blockClock;
  return !(write & bySeveral) && !orderedBefore(timeOf(write), threadOf(write));
}

}  // namespace

void reserveRaces() {
  if (globalWrites) return;
  const auto reserve = [](size_t bytes) {
    void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) abort();
    return at;
  };
  globalWrites = (uint64_t*)reserve(arenaBytes / 4 * sizeof *globalWrites);
  globalReads = (uint32_t*)reserve(arenaBytes / 4 * sizeof *globalReads);
}

void forgetRaces(uintptr_t address, size_t bytes) {
  const size_t first = (address - globalStart) >> 2, words = bytes >> 2;
  const auto forget = [](uintptr_t from, size_t size) {
    const uintptr_t start = (from + 4095) & ~(uintptr_t)4095, end = (from + size) & ~(uintptr_t)4095;
    if (end > start) madvise((void*)start, end - start, MADV_DONTNEED);
  };
  forget((uintptr_t)(globalWrites + first), words * sizeof *globalWrites);
  forget((uintptr_t)(globalReads + first), words * sizeof *globalReads);
}

void raceRead(uintptr_t address, size_t bytes, bool atomic, Where where) {
  visitWords(address, bytes, [&](size_t word, uintptr_t at, uint32_t which) {
    if (conflicts(globalWrites[word], which, atomic)) race(atomic ? "atomic" : "read", "written", globalWrites[word], at, where);
    if (!atomic && globalReads[word] < run.launchClock) globalReads[word] = run.clock;
  });
}

bool writtenInLaunch(uintptr_t address, size_t bytes) {
  bool written = false;
  visitWords(address, bytes, [&](size_t word, uintptr_t, uint32_t which) { written |= timeOf(globalWrites[word]) >= run.launchClock && bytesOf(globalWrites[word]) & which; });
  return written;
}

void checkConstant(const void* pointer, size_t bytes, const char* file, int line) {
  const uintptr_t address = (uintptr_t)pointer;
  if (address - globalStart < globalBytes && writtenInLaunch(address, bytes))
    stop(launchFailed, {file, line}, "a read-only load (ld.global.nc) from 0x%zx, which this launch has written: __restrict__ is wrong", (size_t)address);
}

void raceWrite(uintptr_t address, size_t bytes, bool atomic, Where where) {
  visitWords(address, bytes, [&](size_t word, uintptr_t at, uint32_t which) {
    uint64_t& write = globalWrites[word];
    if (atomic && write & atomically && timeOf(write) >= run.launchClock && timeOf(write) < run.blockClock) met = run.blockClock;
    if (conflicts(write, which, atomic)) race(atomic ? "atomic" : "write", "written", write, at, where);
    const uint32_t read = globalReads[word];
    // Readers of parts of a word are not recorded.
    if (which == 0xf && read >= run.launchClock && read < run.blockClock && met != run.blockClock) race(atomic ? "atomic" : "write", "read", (uint64_t)read << 32, at, where);
    uint64_t flags = atomic ? atomically : 0;
    if (timeOf(write) >= run.blockClock) {
      which |= bytesOf(write);
      if (threadOf(write) != run.thread) flags |= bySeveral;
      flags |= write & bySeveral;
    }
    write = (uint64_t)run.clock << 32 | flags | which << bytesShift | (uint32_t)run.thread;
  });
}

}  // namespace emu
