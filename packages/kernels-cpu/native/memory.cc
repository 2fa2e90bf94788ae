// moe-isa: baseline
#include "memory.h"

#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(_WIN32)
#include <malloc.h>
#endif

namespace moe {
namespace {

constexpr size_t huge_page = size_t{2} << 20;
constexpr int smallest_class = 12;  // 4 KiB

struct Cache {
  std::mutex mutex;
  std::vector<void*> free[48];
};

// Never destroyed, because kernels of other threads may still run while the process exits.
Cache& cache() {
  static Cache* only = new Cache;
  return *only;
}

[[maybe_unused]] int class_of(size_t bytes) {
  if (bytes > (size_t{1} << 46)) throw std::bad_alloc();
  int size_class = smallest_class;
  while ((size_t{1} << size_class) < bytes) size_class++;
  return size_class;
}

}  // namespace

namespace {

// A block mapped separately.
void* allocate_alone(size_t bytes) noexcept {
  const size_t alignment = bytes >= huge_page ? huge_page : 64;
#if defined(_WIN32)
  return _aligned_malloc(bytes, alignment);
#else
  void* pointer = nullptr;
  if (posix_memalign(&pointer, alignment, bytes) != 0) return nullptr;
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (bytes >= huge_page) madvise(pointer, bytes, MADV_HUGEPAGE);
#endif
  return pointer;
#endif
}

void release_alone(void* pointer) noexcept {
#if defined(_WIN32)
  _aligned_free(pointer);
#else
  std::free(pointer);
#endif
}

#if defined(__linux__) && defined(MADV_HUGEPAGE) && !defined(__SANITIZE_ADDRESS__)
#define MOE_REGIONS 1

// Blocks of medium size share regions on huge pages: weights of a few hundred kilobytes are read a third faster there than on pages of 4
// KiB. A region hands out its memory from front to back, and reuses a freed block for the next of the same size, of which there are few
// (the allocator above requests size classes). It is returned to the system when none of its blocks is in use.
constexpr size_t region_bytes = 4 * huge_page;
constexpr size_t least_in_region = size_t{16} << 10;

struct Region {
  size_t used, live;
  std::vector<std::pair<size_t, char*>> free;  // size and block
};

struct Regions {
  std::mutex mutex;
  std::vector<std::pair<char*, Region>> all;
};

Regions& regions() {
  static Regions* only = new Regions;
  return *only;
}

bool in_region(size_t bytes) { return bytes >= least_in_region && bytes < huge_page; }

void* allocate_in_region(size_t bytes) noexcept {
  bytes = round_up(bytes, 64);
  Regions& own = regions();
  std::lock_guard<std::mutex> lock(own.mutex);
  for (auto& [start, region] : own.all) {
    for (auto& block : region.free) {
      if (block.first != bytes) continue;
      char* const pointer = block.second;
      block = region.free.back();
      region.free.pop_back();
      ++region.live;
      return pointer;
    }
  }
  for (auto& [start, region] : own.all) {
    if (region.used + bytes > region_bytes) continue;
    char* const pointer = start + region.used;
    region.used += bytes;
    ++region.live;
    return pointer;
  }
  char* const start = static_cast<char*>(allocate_alone(region_bytes));
  if (!start) return nullptr;
  try {
    own.all.push_back({start, {bytes, 1, {}}});
  } catch (...) {
    release_alone(start);
    return nullptr;
  }
  return start;
}

void release_in_region(char* pointer, size_t bytes) noexcept {
  bytes = round_up(bytes, 64);
  Regions& own = regions();
  std::lock_guard<std::mutex> lock(own.mutex);
  for (auto& entry : own.all) {
    auto& [start, region] = entry;
    if (pointer < start || pointer >= start + region_bytes) continue;
    if (--region.live == 0) {
      release_alone(start);
      entry = std::move(own.all.back());
      own.all.pop_back();
      return;
    }
    try {
      region.free.push_back({bytes, pointer});
    } catch (...) {
      // If the list cannot grow, the block stays unused until its region is released.
    }
    return;
  }
}
#endif

}  // namespace

void* allocate(size_t bytes) noexcept {
  if (bytes == 0) bytes = 64;
  if (bytes > (size_t{1} << 47)) return nullptr;
#if defined(MOE_REGIONS)
  if (in_region(bytes)) return allocate_in_region(bytes);
#endif
  return allocate_alone(bytes);
}

void release(void* pointer, [[maybe_unused]] size_t bytes) noexcept {
#if defined(MOE_REGIONS)
  if (pointer && in_region(bytes)) return release_in_region(static_cast<char*>(pointer), bytes);
#endif
  release_alone(pointer);
}

void discard([[maybe_unused]] void* pointer, [[maybe_unused]] size_t bytes) noexcept {
#if defined(__linux__)
  const uintptr_t from = round_up(reinterpret_cast<uintptr_t>(pointer), huge_page);
  const uintptr_t to = (reinterpret_cast<uintptr_t>(pointer) + bytes) / huge_page * huge_page;
  if (from < to) madvise(reinterpret_cast<void*>(from), to - from, MADV_DONTNEED);
#endif
}

#if defined(__SANITIZE_ADDRESS__)
// In this build, blocks have the exact size and are filled with huge numbers, to reveal reads out of bounds or of memory that was not written.
Scratch::Scratch(size_t bytes) : pointer_(allocate(bytes)), size_class_(0) {
  if (!pointer_) throw std::bad_alloc();
  std::memset(pointer_, 0xfe, bytes);
}
Scratch::~Scratch() { release(pointer_, 0); }
#else
Scratch::Scratch(size_t bytes) : size_class_(class_of(bytes)) {
  Cache& own = cache();
  {
    std::lock_guard<std::mutex> lock(own.mutex);
    auto& blocks = own.free[size_class_];
    if (!blocks.empty()) {
      pointer_ = blocks.back();
      blocks.pop_back();
      return;
    }
    blocks.reserve(blocks.size() + 64);  // so that the destructor never needs memory in practice
  }
  pointer_ = allocate(size_t{1} << size_class_);
  if (!pointer_) throw std::bad_alloc();
}

Scratch::~Scratch() {
  Cache& own = cache();
  std::lock_guard<std::mutex> lock(own.mutex);
  auto& blocks = own.free[size_class_];
  if (blocks.size() < blocks.capacity()) {
    blocks.push_back(pointer_);
  } else {
    release(pointer_, size_t{1} << size_class_);
  }
}

#endif

void trim_scratch() noexcept {
  Cache& own = cache();
  std::lock_guard<std::mutex> lock(own.mutex);
  for (int i = 0; i < 48; i++) {
    for (void* block : own.free[i]) release(block, size_t{1} << i);
    own.free[i].clear();
  }
}

}  // namespace moe
