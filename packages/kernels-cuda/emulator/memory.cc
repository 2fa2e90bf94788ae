// Device memory: allocations in one large reserved range, and shadow memory that records what is accessible and what
// has been written.
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <algorithm>
#include <map>

#include "runtime.h"

namespace emu {

uintptr_t globalStart, globalBytes;
uint8_t* globalShadow;

namespace {

constexpr size_t alignment = 512, redZone = 512;

struct Allocation {
  size_t bytes;
  bool open;
};
std::map<uintptr_t, Allocation> allocations;
std::map<uintptr_t, size_t> freed;  // for messages; an entry is removed when its addresses are reused
uintptr_t arena, cursor;
size_t used;

size_t roundUp(size_t n, size_t to) { return (n + to - 1) / to * to; }

/// Sets the shadow of whole and partial words: `state` is 0 (inaccessible), 1 (accessible) or 3 (accessible and
/// written).
void setShadow(uintptr_t address, size_t bytes, int state) {
  const uintptr_t end = address + bytes;
  const auto part = [&](uintptr_t word, int from, int to) {
    const uint8_t mask = (uint8_t)(((1 << (to - from)) - 1) << from);
    uint8_t& shadow = globalShadow[(word - arena) >> 2];
    shadow &= (uint8_t) ~(mask | mask << 4);
    if (state & 1) shadow |= mask;
    if (state & 2) shadow |= (uint8_t)(mask << 4);
  };
  uintptr_t first = address & ~(uintptr_t)3;
  if (address != first) {
    part(first, (int)(address - first), (int)std::min<uintptr_t>(4, end - first));
    first += 4;
  }
  if (first >= end) return;
  const uintptr_t last = end & ~(uintptr_t)3;
  memset(globalShadow + ((first - arena) >> 2), state == 0 ? 0 : state == 1 ? 0x0f : 0xff, (last - first) >> 2);
  if (end != last) part(last, 0, (int)(end - last));
}

/// The first address whose bit is not set, or 0. `shift` is 0 for "accessible", 4 for "written".
uintptr_t firstWithout(uintptr_t address, size_t bytes, int shift) {
  const uintptr_t end = address + bytes;
  const uint8_t whole = (uint8_t)(0xf << shift);
  for (uintptr_t word = address & ~(uintptr_t)3; word < end; word += 4) {
    const uint8_t shadow = globalShadow[(word - arena) >> 2];
    if ((shadow & whole) == whole) continue;
    for (int i = 0; i < 4; i++)
      if (word + i >= address && word + i < end && !(shadow >> (shift + i) & 1)) return word + i;
  }
  return 0;
}

/// "256 bytes past the end of the 4096 bytes at 0x…".
std::string describe(uintptr_t address) {
  char text[200];
  const auto old = freed.upper_bound(address);
  if (old != freed.begin()) {
    const auto& [start, bytes] = *std::prev(old);
    if (address < start + bytes) {
      snprintf(text, sizeof text, "%zu bytes into the %zu bytes at 0x%zx, which were freed", (size_t)(address - start), bytes, (size_t)start);
      return text;
    }
  }
  const auto next = allocations.upper_bound(address);
  if (next != allocations.begin()) {
    const auto& [start, allocation] = *std::prev(next);
    if (address < start + allocation.bytes) {
      snprintf(text, sizeof text, "%zu bytes into the %zu bytes at 0x%zx, a part that is %s", (size_t)(address - start), allocation.bytes,
               (size_t)start, allocation.open ? "not handed out" : "not allocated yet in stream order");
      return text;
    }
    if (next == allocations.end() || address - (start + allocation.bytes) <= next->first - address) {
      snprintf(text, sizeof text, "%zu bytes past the end of the %zu bytes at 0x%zx", (size_t)(address - (start + allocation.bytes)),
               allocation.bytes, (size_t)start);
      return text;
    }
  }
  if (next == allocations.end()) return "with no allocation near";
  snprintf(text, sizeof text, "%zu bytes before the %zu bytes at 0x%zx", (size_t)(next->first - address), next->second.bytes, (size_t)next->first);
  return text;
}

}  // namespace

bool inArena(uintptr_t address) { return address - arena < arenaBytes; }

void reserveMemory() {
  if (!arena) {
    const auto reserve = [](size_t bytes) {
      void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (at == MAP_FAILED) {
        perror("emulator: cannot reserve memory");
        abort();
      }
      return (uintptr_t)at;
    };
    arena = roundUp(reserve(arenaBytes + (64 << 10)), 64 << 10);
    globalShadow = (uint8_t*)reserve(arenaBytes / 4);
    cursor = arena + redZone;
    reserveRaces();
  }
  globalStart = arena;
  globalBytes = checksOn ? arenaBytes : 0;
}

size_t memoryTotal() {
  static const size_t total = [] {
    const char* text = getenv("MOE_EMULATOR_MEMORY");
    const size_t bytes = text ? (size_t)strtod(text, nullptr) : 0;
    return std::min(bytes > 0 ? bytes : (size_t)4 << 30, arenaBytes / 2);
  }();
  return total;
}
size_t memoryUsed() { return used; }

uintptr_t reserveAllocation(size_t bytes) {
  if (bytes > memoryTotal() - used) return 0;
  // Allocates after the previous allocation, so that addresses are reused as late as possible.
  const size_t room = roundUp(bytes, alignment) + redZone;
  for (int turn = 0; turn < 2; turn++) {
    uintptr_t at = roundUp(cursor, alignment);
    auto next = allocations.lower_bound(at);
    if (next != allocations.begin()) {
      const auto& [start, allocation] = *std::prev(next);
      at = std::max(at, (uintptr_t)roundUp(start + allocation.bytes + redZone, alignment));
    }
    while (next != allocations.end() && next->first < at + room) {
      at = roundUp(next->first + next->second.bytes + redZone, alignment);
      ++next;
    }
    if (at + room <= arena + arenaBytes) {
      freed.erase(freed.lower_bound(at), freed.lower_bound(at + room));
      allocations[at] = {bytes, false};
      used += bytes;
      cursor = at + room;
      return at;
    }
    cursor = arena + redZone;
  }
  return 0;
}

void openAllocation(uintptr_t address) {
  const auto found = allocations.find(address);
  if (found == allocations.end()) return;
  found->second.open = true;
  setShadow(address, found->second.bytes, 1);
}

bool knowsAllocation(uintptr_t address) { return allocations.count(address) > 0; }

void closeAllocation(uintptr_t address) {
  const auto found = allocations.find(address);
  if (found == allocations.end()) return;
  const size_t bytes = found->second.bytes;
  // Large allocations return their pages, both data and shadow, which then read as zeros.
  const uintptr_t end = address + bytes, first = roundUp(address, 16384), last = end & ~(uintptr_t)16383;
  if (last > first && last - first >= 256 << 10) {
    madvise((void*)first, last - first, MADV_DONTNEED);
    madvise(globalShadow + ((first - arena) >> 2), (last - first) >> 2, MADV_DONTNEED);
    forgetRaces(first, last - first);
    setShadow(address, first - address, 0);
    setShadow(last, end - last, 0);
  } else {
    setShadow(address, bytes, 0);
  }
  used -= bytes;
  freed[address] = bytes;
  allocations.erase(found);
}

void markMemory(uintptr_t address, size_t bytes, size_t capacity) {
  if (!inArena(address) || !inArena(address + capacity)) return;
  setShadow(address, capacity, 0);
  setShadow(address, bytes, 1);
}

void freeEverything() {
  while (!allocations.empty()) closeAllocation(allocations.begin()->first);
}

void readGlobalSlow(uintptr_t address, size_t bytes, Where where) {
  if (const uintptr_t bad = firstWithout(address, bytes, 0))
    stop(illegalAddress, where, "out of bounds: read of %zu bytes at 0x%zx, %s", bytes, (size_t)address, describe(bad).c_str());
  if (const uintptr_t bad = firstWithout(address, bytes, 4)) {
    const auto& [start, allocation] = *std::prev(allocations.upper_bound(bad));
    stop(illegalAddress, where, "uninitialized: read of %zu bytes at 0x%zx; byte %zu of the %zu at 0x%zx", bytes,
         (size_t)address, (size_t)(bad - start), allocation.bytes, (size_t)start);
  }
}

void writeGlobalSlow(uintptr_t address, size_t bytes, Where where) {
  if (const uintptr_t bad = firstWithout(address, bytes, 0))
    stop(illegalAddress, where, "out of bounds: write of %zu bytes at 0x%zx, %s", bytes, (size_t)address, describe(bad).c_str());
  setShadow(address, bytes, 3);
}

static bool refuseHost(const char* call, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  recordFault({nullptr, 0}, call, format, arguments);
  va_end(arguments);
  return false;
}

bool hostRead(uintptr_t address, size_t bytes, const char* call) {
  if (bytes == 0) return true;
  if (!inArena(address) || !inArena(address + bytes - 1))
    return refuseHost(call, "out of bounds: reads %zu bytes at 0x%zx, which is not device memory", bytes, (size_t)address);
  if (!checksOn) return true;
  if (const uintptr_t bad = firstWithout(address, bytes, 0))
    return refuseHost(call, "out of bounds: reads %zu bytes at 0x%zx, %s", bytes, (size_t)address, describe(bad).c_str());
  if (const uintptr_t bad = firstWithout(address, bytes, 4))
    return refuseHost(call, "uninitialized: reads %zu bytes at 0x%zx, of which nothing wrote byte %zu", bytes, (size_t)address,
                      (size_t)(bad - address));
  return true;
}

bool hostWrite(uintptr_t address, size_t bytes, const char* call) {
  if (bytes == 0) return true;
  if (!inArena(address) || !inArena(address + bytes - 1))
    return refuseHost(call, "out of bounds: writes %zu bytes at 0x%zx, which is not device memory", bytes, (size_t)address);
  if (!checksOn) return true;
  if (const uintptr_t bad = firstWithout(address, bytes, 0))
    return refuseHost(call, "out of bounds: writes %zu bytes at 0x%zx, %s", bytes, (size_t)address, describe(bad).c_str());
  setShadow(address, bytes, 3);
  return true;
}

}  // namespace emu
