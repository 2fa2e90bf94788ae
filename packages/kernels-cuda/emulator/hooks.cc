// The functions that the compiler calls before every memory access (-fsanitize=thread), and for misaligned addresses,
// out-of-bounds indices and undefined divisions (-fsanitize=alignment,bounds,integer-divide-by-zero). They replace the
// sanitizers' own libraries.
#include <link.h>

#include "runtime.h"

namespace emu {

bool checksOn = true;

static uintptr_t imageStart, imageBytes;

/// Finds the address range of this library, whose constants kernels may read.
void findImage() {
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void*) {
        const uintptr_t self = (uintptr_t)&findImage;
        uintptr_t low = ~(uintptr_t)0, high = 0;
        for (int i = 0; i < info->dlpi_phnum; i++) {
          if (info->dlpi_phdr[i].p_type != PT_LOAD) continue;
          const uintptr_t start = info->dlpi_addr + info->dlpi_phdr[i].p_vaddr, end = start + info->dlpi_phdr[i].p_memsz;
          low = start < low ? start : low;
          high = end > high ? end : high;
        }
        if (self < low || self >= high) return 0;
        imageStart = low;
        imageBytes = high - low;
        return 1;
      },
      nullptr);
}

/// Handles an access to neither global nor shared memory: a stack, a constant, or an error.
static void elsewhere(uintptr_t address, size_t bytes, const char* what, Where where) {
  if (address - stacksStart < stacksBytes || !checksOn || !run.active) return;
  if (address - imageStart < imageBytes) return;
  if (address < 4096) stop(illegalAddress, where, "null pointer: %s of %zu bytes at 0x%zx", what, bytes, (size_t)address);
  stop(illegalAddress, where, "out of bounds: %s of %zu bytes at 0x%zx, which is not device memory", what, bytes, (size_t)address);
}

[[noreturn]] static void misaligned(uintptr_t address, size_t bytes, const char* what, Where where) {
  stop(misalignedAddress, where, "misaligned: %s of %zu bytes at 0x%zx", what, bytes, (size_t)address);
}

[[gnu::noinline]] static void count(uintptr_t address, int bytes, bool write, Where where) {
  const bool shared = inShared(address);
  if (run.active && (shared || inArena(address))) countAccess(where.at, address, bytes, shared, write);
}

template <size_t Bytes>
static inline __attribute__((always_inline)) void read(void* pointer) {
  const uintptr_t address = (uintptr_t)pointer, offset = address - globalStart;
  if (__builtin_expect(counting, 0)) count(address, Bytes, false, EMU_HERE);
  if (__builtin_expect(offset < globalBytes, 1)) {
    if (__builtin_expect((address & (Bytes - 1)) != 0, 0)) misaligned(address, Bytes, "read", EMU_HERE);
    const uint8_t* shadow = globalShadow + (offset >> 2);
    bool good;
    if constexpr (Bytes == 16) {
      uint32_t four;
      memcpy(&four, shadow, 4);
      good = four == 0xffffffffu;
    } else if constexpr (Bytes == 8) {
      uint16_t two;
      memcpy(&two, shadow, 2);
      good = two == 0xffffu;
    } else {
      good = *shadow == 0xff;
    }
    if (__builtin_expect(!good, 0)) readGlobalSlow(address, Bytes, EMU_HERE);
    if (__builtin_expect(!readBefore(address, Bytes), 0)) raceRead(address, Bytes, false, EMU_HERE);
    return;
  }
  if (globalBytes == 0) return;  // checks are off
  if (address - sharedStart < sharedBytes) {
    if (__builtin_expect((address & (Bytes - 1)) != 0, 0)) misaligned(address, Bytes, "read", EMU_HERE);
    touched[run.warp] |= 1u << run.lane;
    if (!sealed<Bytes>(address)) readShared(address, Bytes, EMU_HERE);
    return;
  }
  elsewhere(address, Bytes, "read", EMU_HERE);
}

template <size_t Bytes>
static inline __attribute__((always_inline)) void write(void* pointer) {
  const uintptr_t address = (uintptr_t)pointer, offset = address - globalStart;
  if (__builtin_expect(counting, 0)) count(address, Bytes, true, EMU_HERE);
  if (__builtin_expect(offset < globalBytes, 1)) {
    if (__builtin_expect((address & (Bytes - 1)) != 0, 0)) misaligned(address, Bytes, "write", EMU_HERE);
    uint8_t* shadow = globalShadow + (offset >> 2);
    if constexpr (Bytes == 16) {
      uint32_t four;
      memcpy(&four, shadow, 4);
      if (__builtin_expect((four & 0x0f0f0f0fu) == 0x0f0f0f0fu, 1)) return memset(shadow, 0xff, 4), raceWrite(address, Bytes, false, EMU_HERE);
    } else if constexpr (Bytes == 8) {
      uint16_t two;
      memcpy(&two, shadow, 2);
      if (__builtin_expect((two & 0x0f0fu) == 0x0f0fu, 1)) return memset(shadow, 0xff, 2), raceWrite(address, Bytes, false, EMU_HERE);
    } else if constexpr (Bytes == 4) {
      if (__builtin_expect((*shadow & 0xf) == 0xf, 1)) return *shadow = 0xff, raceWrite(address, Bytes, false, EMU_HERE);
    } else {
      const int mask = ((1 << Bytes) - 1) << (offset & 3);
      if (__builtin_expect((*shadow & mask) == mask, 1)) return *shadow |= (uint8_t)(mask << 4), raceWrite(address, Bytes, false, EMU_HERE);
    }
    return writeGlobal(address, Bytes, EMU_HERE);
  }
  if (globalBytes == 0) return;
  if (address - sharedStart < sharedBytes) {
    if (__builtin_expect((address & (Bytes - 1)) != 0, 0)) misaligned(address, Bytes, "write", EMU_HERE);
    return writeShared(address, Bytes, EMU_HERE);
  }
  elsewhere(address, Bytes, "write", EMU_HERE);
}

static inline void readRange(uintptr_t address, size_t bytes, Where where) {
  if (bytes == 0) return;
  if (address - globalStart < globalBytes) return readGlobal(address, bytes, where);
  if (address - sharedStart < sharedBytes) return readShared(address, bytes, where);
  elsewhere(address, bytes, "read", where);
}
static inline void writeRange(uintptr_t address, size_t bytes, Where where) {
  if (bytes == 0) return;
  if (address - globalStart < globalBytes) return writeGlobal(address, bytes, where);
  if (address - sharedStart < sharedBytes) return writeShared(address, bytes, where);
  elsewhere(address, bytes, "write", where);
}

uint32_t atomic(AtomicKind kind, void* pointer, uint32_t value, uint32_t compare) {
  const uintptr_t address = (uintptr_t)pointer;
  if (address & 3) misaligned(address, 4, "atomic", EMU_HERE);
  if (address - globalStart < globalBytes) {
    if (kind != atomicExchange) readGlobal(address, 4, EMU_HERE, true);
    writeGlobal(address, 4, EMU_HERE, true);
  } else if (address - sharedStart < sharedBytes) {
    atomicShared(address, kind != atomicExchange, EMU_HERE);
  } else {
    elsewhere(address, 4, "atomic", EMU_HERE);
  }
  uint32_t& at = *(uint32_t*)pointer;
  const uint32_t old = at;
  switch (kind) {
    case atomicAddKind: at = old + value; break;
    case atomicMaxKind: at = old > value ? old : value; break;
    case atomicMinKind: at = old < value ? old : value; break;
    case atomicMaxSigned: at = (int32_t)old > (int32_t)value ? old : value; break;
    case atomicMinSigned: at = (int32_t)old < (int32_t)value ? old : value; break;
    case atomicExchange: at = value; break;
    case atomicCompare: at = old == compare ? value : old; break;
    case atomicAndKind: at = old & value; break;
    case atomicOrKind: at = old | value; break;
  }
  return old;
}

}  // namespace emu

#define HOOK extern "C" __attribute__((visibility("hidden"))) void

#define HOOKS(bytes)                                                                                                      \
  HOOK __tsan_read##bytes(void* p) { emu::read<bytes>(p); }                                                               \
  HOOK __tsan_write##bytes(void* p) { emu::write<bytes>(p); }                                                             \
  HOOK __tsan_volatile_read##bytes(void* p) { emu::read<bytes>(p); }                                                      \
  HOOK __tsan_volatile_write##bytes(void* p) { emu::write<bytes>(p); }                                                    \
  HOOK __tsan_read_write##bytes(void* p) { emu::read<bytes>(p), emu::write<bytes>(p); }                                   \
  HOOK __tsan_unaligned_read##bytes(void* p) { emu::readRange((uintptr_t)p, bytes, EMU_HERE); }                           \
  HOOK __tsan_unaligned_write##bytes(void* p) { emu::writeRange((uintptr_t)p, bytes, EMU_HERE); }                         \
  HOOK __tsan_unaligned_read_write##bytes(void* p) {                                                                      \
    emu::readRange((uintptr_t)p, bytes, EMU_HERE), emu::writeRange((uintptr_t)p, bytes, EMU_HERE);                        \
  }
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
#undef HOOKS

HOOK __tsan_read_range(void* p, size_t bytes) { emu::readRange((uintptr_t)p, bytes, EMU_HERE); }
HOOK __tsan_write_range(void* p, size_t bytes) { emu::writeRange((uintptr_t)p, bytes, EMU_HERE); }
HOOK __tsan_init() {}
HOOK __tsan_func_entry(void*) {}
HOOK __tsan_func_exit() {}
extern "C" __attribute__((visibility("hidden"))) void* __tsan_memcpy(void* to, const void* from, size_t bytes) {
  emu::readRange((uintptr_t)from, bytes, EMU_HERE), emu::writeRange((uintptr_t)to, bytes, EMU_HERE);
  return memcpy(to, from, bytes);
}
extern "C" __attribute__((visibility("hidden"))) void* __tsan_memmove(void* to, const void* from, size_t bytes) {
  emu::readRange((uintptr_t)from, bytes, EMU_HERE), emu::writeRange((uintptr_t)to, bytes, EMU_HERE);
  return memmove(to, from, bytes);
}
extern "C" __attribute__((visibility("hidden"))) void* __tsan_memset(void* to, int value, size_t bytes) {
  emu::writeRange((uintptr_t)to, bytes, EMU_HERE);
  return memset(to, value, bytes);
}

// The parts of the records of -fsanitize=undefined that are used.
namespace {
struct Place {
  const char* file;
  uint32_t line, column;
};
struct Type {
  uint16_t kind, info;
  char name[1];
};
struct Mismatch {
  Place place;
  const Type* type;
  uint8_t logAlignment, kind;
};
struct OutOfBounds {
  Place place;
  const Type* array;
  const Type* index;
};
}  // namespace

HOOK __ubsan_handle_type_mismatch_v1(Mismatch* data, uintptr_t address) {
  if (!emu::checksOn || !emu::run.active) return;
  const emu::Where where{data->place.file, data->place.line};
  if (address < 4096) emu::stop(emu::illegalAddress, where, "null pointer: 0x%zx as address of a %s", (size_t)address, data->type->name);
  emu::stop(emu::misalignedAddress, where, "misaligned: 0x%zx as address of a %s, which is aligned to %d%s", (size_t)address, data->type->name,
            1 << data->logAlignment,
            emu::inShared(address) ? "; a shared array is as aligned as its type, MOE_SHARED(__align__(16) float, ...) makes it more" : "");
}
HOOK __ubsan_handle_out_of_bounds(OutOfBounds* data, uintptr_t index) {
  if (!emu::checksOn || !emu::run.active) return;
  emu::stop(emu::illegalAddress, {data->place.file, data->place.line}, "out of bounds: index %lld of an array %s", (long long)(int64_t)index,
            data->array->name);
}
HOOK __ubsan_handle_divrem_overflow(Place* data, uintptr_t, uintptr_t) {
  emu::stop(emu::launchFailed, {data->file, data->line}, "integer division by zero or overflow");
}
