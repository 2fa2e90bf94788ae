// moe-isa: baseline
#include "memory.h"

#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
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

// Never destroyed: kernels of other threads may still run while the process ends.
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

void* allocate(size_t bytes) noexcept {
  if (bytes == 0) bytes = 64;
  if (bytes > (size_t{1} << 47)) return nullptr;
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

void release(void* pointer, size_t) noexcept {
#if defined(_WIN32)
  _aligned_free(pointer);
#else
  std::free(pointer);
#endif
}

#if defined(__SANITIZE_ADDRESS__)
// Exact blocks that start as huge numbers, so that a read outside or before a write shows.
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
