// Mbarriers, and the TMA copies that complete on them. A copy takes effect when a thread waits for its phase and no
// sooner, so that a thread that reads too early is detected.
//
// Happens-before is tracked per warp ("heard": up to which time each thread knows of the accesses of each warp), and a
// wait receives what was published in the phases that have completed. The arrival of one lane publishes what it has
// heard, what its warp had done when it last converged (__syncwarp), and what it has done itself if no other lane has
// done anything since. When all lanes of the warp have arrived, everything is published. wgmmas belong to the whole
// warp: once they have been waited for, the arrival of one lane publishes that.
#include <stdio.h>

#include <algorithm>
#include <vector>

#include "runtime.h"

namespace emu {

uint32_t heard[maxThreads][thingsKnown];
uint32_t touched[maxWarps];
bool othersHeard;

namespace {

constexpr int mostBytes = (1 << 20) - 1;  // limit of the transaction count

struct Box {
  BoxMap map;
  uintptr_t to;
  int at[3];
  size_t bytes;
};
struct Mbarrier {
  uintptr_t address;
  uint32_t initialized;  // time of initialization
  int by;                // initializing thread
  bool fenced;
  int arrivals, missing;  // per phase, and still pending in this one
  int64_t bytes;          // expected transaction bytes of this phase
  size_t copied;          // of the copies in flight
  uint32_t phase;         // number of completed phases
  uint32_t landed;        // time at which the latest copies completed
  uint32_t telling[thingsKnown], told[thingsKnown];
  uint32_t lanes[maxWarps];  // lanes that have arrived in this phase
  std::vector<Box> boxes;
  std::vector<int> waiting;
};
Mbarrier barriers[maxBarriers];
int barriersInUse;  // in the current block

/// A warpgroup at a syncWarpgroup.
struct Group {
  int arrived;
  const char* file;
  int line;
};
Group groups[maxThreads / 128];

Mbarrier& barrierAt(void* at, const char* what, Where where) {
  for (int i = 0; i < barriersInUse; i++) {
    Mbarrier& barrier = barriers[i];
    if (barrier.address != (uintptr_t)at) continue;
    if (barrier.by != run.thread && barrier.initialized >= run.barrierClock)
      stop(launchFailed, where, "race: %s at a barrier that thread %d initialized, without __syncthreads since", what, barrier.by);
    return barrier;
  }
  stop(launchFailed, where, "%s at %s, which is not an initialized barrier", what, sharedPlace((uintptr_t)at).c_str());
}

/// Copies a box, one row of its inner dimension at a time. Elements outside of the matrix are zeros.
void land(const Box& box) {
  const BoxMap& map = box.map;
  const int width = map.box[0] * map.elementBytes;
  uintptr_t to = box.to;
  for (int z = 0; z < map.box[2]; z++) {
    for (int y = 0; y < map.box[1]; y++, to += width) {
      alignas(16) char row[1024] = {};
      const int64_t line = (int64_t)box.at[1] + y, matrix = (int64_t)box.at[2] + z;
      if (line >= 0 && line < (int64_t)map.sizes[1] && matrix >= 0 && matrix < (int64_t)map.sizes[2]) {
        const int64_t first = std::max<int64_t>(box.at[0], 0), last = std::min<int64_t>((int64_t)box.at[0] + map.box[0], (int64_t)map.sizes[0]);
        const uintptr_t from = map.address + matrix * map.strides[1] + line * map.strides[0];
        if (first < last)
          memcpy(row + (first - box.at[0]) * map.elementBytes, (const char*)from + first * map.elementBytes, (last - first) * map.elementBytes);
      }
      if (map.swizzle == 0) {
        memcpy((void*)to, row, width);
        continue;
      }
      // The swizzle: 16-byte chunks are permuted by address bits above those of the row.
      for (int at = 0; at < width; at += 16) {
        const uintptr_t plain = sharedAddress((void*)(to + at)), mask = (1u << map.swizzle) - 1;
        memcpy((char*)to + at + ((plain ^ (plain >> 7 & mask) << 4) - plain), row + at, 16);
      }
    }
  }
}

/// Completes the phase if all arrivals and bytes are accounted for, and copies what was in flight.
void tryToEnd(Mbarrier& barrier) {
  if (barrier.missing > 0 || barrier.bytes != (int64_t)barrier.copied) return;
  if (!barrier.boxes.empty()) {
    barrier.landed = ++run.clock;
    for (const Box& box : barrier.boxes) {
      land(box);
      if (checksOn) landBoxShared(box.to, box.bytes, (int)(&barrier - barriers));
    }
    barrier.boxes.clear();
  }
  barrier.bytes = 0;
  barrier.copied = 0;
  barrier.missing = barrier.arrivals;
  barrier.phase++;
  memset(barrier.lanes, 0, sizeof barrier.lanes);
  memcpy(barrier.told, barrier.telling, sizeof barrier.told);
  for (const int thread : barrier.waiting) wakeThread(thread);
  barrier.waiting.clear();
}

void merge(uint32_t* into, const uint32_t* from) {
  for (int i = 0; i < thingsKnown; i++) into[i] = std::max(into[i], from[i]);
}

/// Checks that everything the copy reads is allocated and has been written.
void checkSource(const Box& box, Where where) {
  const BoxMap& map = box.map;
  for (int z = 0; z < map.box[2]; z++)
    for (int y = 0; y < map.box[1]; y++) {
      const int64_t line = (int64_t)box.at[1] + y, matrix = (int64_t)box.at[2] + z;
      if (line < 0 || line >= (int64_t)map.sizes[1] || matrix < 0 || matrix >= (int64_t)map.sizes[2]) continue;
      const int64_t first = std::max<int64_t>(box.at[0], 0), last = std::min<int64_t>((int64_t)box.at[0] + map.box[0], (int64_t)map.sizes[0]);
      if (first >= last) continue;
      const uintptr_t from = map.address + matrix * map.strides[1] + line * map.strides[0] + first * map.elementBytes;
      if (!inArena(from)) stop(illegalAddress, where, "a copy of a box from 0x%zx, which is not device memory", (size_t)from);
      const size_t bytes = (last - first) * map.elementBytes;
      readGlobal(from, bytes, where);
      if (writtenInLaunch(from, bytes)) stop(launchFailed, where, "a copy of a box from 0x%zx, which this launch has written: the copy engine may not see the new values", (size_t)from);
    }
}

}  // namespace

void shareHeard(int warp) {
  uint32_t all[thingsKnown] = {};
  for (int lane = 0; lane < 32; lane++) merge(all, heard[warp * 32 + lane]);
  for (int lane = 0; lane < 32; lane++) memcpy(heard[warp * 32 + lane], all, sizeof all);
}

void resetBarriers() {
  for (int i = 0; i < barriersInUse; i++) {
    barriers[i].boxes.clear();
    barriers[i].waiting.clear();
  }
  barriersInUse = 0;
  othersHeard = false;
  for (Group& group : groups) group.arrived = 0;
}

void checkBarriers() {
  for (int i = 0; i < barriersInUse; i++)
    if (!barriers[i].boxes.empty())
      stop(launchFailed, {nullptr, 0}, "the block ends while a copy of a box to %s is in flight", sharedPlace(barriers[i].boxes[0].to).c_str());
}

std::string barrierStates() {
  std::string text;
  for (int i = 0; i < barriersInUse; i++) {
    const Mbarrier& barrier = barriers[i];
    if (barrier.waiting.empty()) continue;
    char line[200];
    snprintf(line, sizeof line, "; %s, phase %u, is missing %d of %d arrivals and %lld bytes", sharedPlace(barrier.address).c_str(), barrier.phase,
             barrier.missing, barrier.arrivals, (long long)barrier.bytes - (long long)barrier.copied);
    text += line;
  }
  return text;
}

void initBarrier(void* at, int arrivals, const char* file, int line) {
  const uintptr_t address = (uintptr_t)at;
  if (address % 8 != 0) stop(misalignedAddress, {file, line}, "misaligned: a barrier at 0x%zx", (size_t)address);
  if (!inShared(address)) stop(illegalAddress, {file, line}, "a barrier at 0x%zx, which is not shared memory", (size_t)address);
  if (arrivals < 1 || arrivals > mostBytes) stop(launchFailed, {file, line}, "a barrier of %d arrivals", arrivals);
  for (int i = 0; i < barriersInUse; i++)
    if (barriers[i].address == address) stop(launchFailed, {file, line}, "a barrier is initialized twice");
  if (barriersInUse == maxBarriers) stop(outOfResources, {file, line}, "the emulator has room for %d barriers", maxBarriers);
  Mbarrier& barrier = barriers[barriersInUse++];
  othersHeard = true;
  barrier.address = address;
  barrier.initialized = run.clock;
  barrier.by = run.thread;
  barrier.fenced = false;
  barrier.arrivals = barrier.missing = arrivals;
  barrier.bytes = 0;
  barrier.copied = 0;
  barrier.phase = barrier.landed = 0;
  memset(barrier.telling, 0, sizeof barrier.telling);
  memset(barrier.told, 0, sizeof barrier.told);
  memset(barrier.lanes, 0, sizeof barrier.lanes);
}

void fenceBarrierInit() {
  for (int i = 0; i < barriersInUse; i++)
    if (barriers[i].by == run.thread) barriers[i].fenced = true;
}

void arriveAtBarrier(void* at, int expectedBytes, const char* file, int line) {
  Mbarrier& barrier = barrierAt(at, "an arrival", {file, line});
  if (barrier.missing == 0)
    stop(launchFailed, {file, line}, "an arrival at %s, whose phase has all its %d and waits for copies", sharedPlace(barrier.address).c_str(),
         barrier.arrivals);
  barrier.bytes += expectedBytes;
  if (expectedBytes > 0) walk("arriveAndExpectTx", file, line);
  if (expectedBytes < 0 || barrier.bytes > mostBytes) stop(launchFailed, {file, line}, "a barrier expects %lld bytes", (long long)barrier.bytes);
  barrier.missing--;
  uint32_t* const mine = heard[run.thread];
  merge(barrier.telling, mine);
  const uint32_t lane = 1u << run.lane;
  barrier.lanes[run.warp] |= lane;
  const bool alone = touched[run.warp] & ~lane && barrier.lanes[run.warp] != lanesOfWarp();
  barrier.telling[ofProducts + run.warp] = ++run.clock;
  barrier.telling[run.warp] = std::max(barrier.telling[run.warp], alone ? std::max(run.warpClock[run.warp], run.barrierClock) : run.clock);
  // Copies in flight only take effect when a thread waits for them.
  if (barrier.boxes.empty() || !barrier.waiting.empty()) tryToEnd(barrier);
}

void waitForBarrier(void* at, int parity, const char* file, int line) {
  Mbarrier& barrier = barrierAt(at, "a wait", {file, line});
  walk("wait", file, line);
  if (parity != 0 && parity != 1) stop(launchFailed, {file, line}, "a wait for parity %d", parity);
  if ((int)(barrier.phase & 1) == parity) {
    tryToEnd(barrier);
    if ((int)(barrier.phase & 1) == parity) {
      barrier.waiting.push_back(run.thread);
      waitInWarp("a barrier in shared memory", file, line);
    }
  }
  merge(heard[run.thread], barrier.told);
  heard[run.thread][ofBoxes + (&barrier - barriers)] = barrier.landed;
}

void syncWarpgroup(const char* file, int line) {
  const int number = run.thread / 128, first = number * 128;
  Group& group = groups[number];
  if (first + 128 > threadsOfBlock()) stop(launchFailed, {file, line}, "syncWarpgroup with only %d threads", threadsOfBlock() % 128);
  if (group.arrived == 0) {
    group.file = file, group.line = line;
  } else if (group.line != line || group.file != file) {
    stop(launchFailed, {file, line}, "syncWarpgroup without all threads: others of the warpgroup wait at line %d", group.line);
  }
  if (++group.arrived < 128) return waitInWarp("syncWarpgroup", file, line);
  group.arrived = 0;
  othersHeard = true;
  uint32_t all[thingsKnown] = {};
  for (int t = first; t < first + 128; t++) merge(all, heard[t]);
  run.clock++;
  for (int w = first / 32; w < first / 32 + 4; w++) {
    meetPaths(w);
    all[w] = all[ofProducts + w] = run.warpClock[w] = run.clock;
    touched[w] = 0;
  }
  for (int t = first; t < first + 128; t++) {
    memcpy(heard[t], all, sizeof all);
    wakeThread(t);
  }
}

/// Starts a copy.
static void copy(Box box, Mbarrier& barrier, Where where) {
  box.bytes = (size_t)box.map.box[0] * box.map.box[1] * box.map.box[2] * box.map.elementBytes;
  if (!barrier.fenced) stop(launchFailed, where, "a copy uses a barrier without fenceBarrierInit() after initBarrier()");
  if (!inShared(box.to)) stop(illegalAddress, where, "a copy of a box to 0x%zx, which is not shared memory", (size_t)box.to);
  if (checksOn) {
    checkSource(box, where);
    checkOverwrite("a box goes", box.to, box.bytes, where);
    checkReaders(box.to, box.bytes, where);
    beginCopyShared(box.to, box.bytes, where);
  }
  barrier.copied += box.bytes;
  barrier.boxes.push_back(box);
  if (!barrier.waiting.empty()) tryToEnd(barrier);
}

void tmaLoad(void* shared, const void* map, void* at, int x, int y, int z, const char* file, int line) {
  const Where where{file, line};
  walk("tmaLoad", file, line);
  if ((uintptr_t)map % 64 != 0) stop(misalignedAddress, where, "misaligned: a tensor map at 0x%zx", (size_t)map);
  Box box{};
  memcpy(&box.map, map, sizeof box.map);
  if (box.map.magic != boxMapMagic || box.map.rank != 3) stop(launchFailed, where, "the parameter is not a tensor map of rank 3");
  box.to = (uintptr_t)shared;
  box.at[0] = x, box.at[1] = y, box.at[2] = z;
  const uint32_t alignment = box.map.swizzle == swizzle128 ? 1024 : 128;
  if (inShared(box.to) && sharedAddress(shared) % alignment != 0)
    stop(misalignedAddress, where, "misaligned: a box is copied to %s, which is not a multiple of %u", sharedPlace(box.to).c_str(), alignment);
  copy(box, barrierAt(at, "a copy", where), where);
}

/// A box of one row.
void bulkLoad(void* shared, const void* global, int bytes, void* at, const char* file, int line) {
  const Where where{file, line};
  walk("bulkLoad", file, line);
  if (((uintptr_t)shared | (uintptr_t)global | (uintptr_t)bytes) % 16 != 0)
    stop(misalignedAddress, where, "misaligned: a copy of %d bytes from 0x%zx to 0x%zx, which must be multiples of 16", bytes, (size_t)global, (size_t)(uintptr_t)shared);
  if (bytes < 16 || bytes > 1024) stop(launchFailed, where, "a copy of %d bytes; 16 to 1024 are emulated", bytes);
  Box box{};
  box.map.rank = 3;
  box.map.address = (uintptr_t)global;
  box.map.elementBytes = 4;
  box.map.box[0] = (uint16_t)(bytes / 4);
  box.map.box[1] = box.map.box[2] = 1;
  box.map.sizes[0] = (uint64_t)bytes / 4;
  box.map.sizes[1] = box.map.sizes[2] = 1;
  box.to = (uintptr_t)shared;
  copy(box, barrierAt(at, "a copy", where), where);
}

}  // namespace emu
