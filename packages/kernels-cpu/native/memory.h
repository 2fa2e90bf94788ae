// Memory of kernels: 64-byte aligned, large blocks on huge pages, scratch blocks kept for the next call.
#pragma once

#include <cstddef>
#include <cstdint>

namespace moe {

// Returns nullptr if out of memory.
void* allocate(size_t bytes) noexcept;
// `bytes` as passed to allocate().
void release(void* pointer, size_t bytes) noexcept;
// Returns pages of a part of a block to the system until they are written again: whole huge pages, on Linux only.
void discard(void* pointer, size_t bytes) noexcept;

// Working memory for the duration of a call, with undefined contents. Throws std::bad_alloc. For memory per worker, allocate max_threads()
// times as much once, before the parallel part.
class Scratch {
 public:
  explicit Scratch(size_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  template <class T>
  T* as(size_t byte_offset = 0) const {
    return reinterpret_cast<T*>(static_cast<char*>(pointer_) + byte_offset);
  }

 private:
  void* pointer_;
  int size_class_;
};

// Returns cached scratch memory to the system.
void trim_scratch() noexcept;

constexpr size_t round_up(size_t value, size_t multiple) { return (value + multiple - 1) / multiple * multiple; }

}  // namespace moe
