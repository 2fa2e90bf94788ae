// How JavaScript calls a kernel: one C function per op, one pointer to an array of doubles ("slots").
//
// Slot 0 is the number of threads that the call may use; the kernel reads the others in order with Args. Addresses and sizes are also
// doubles: both are below 2^53, and storing doubles is the cheapest way for JavaScript to pass arguments.
#pragma once

#include <cstdint>
#include <cstdio>
#include <exception>
#include <new>

#if defined(_WIN32)
#define MOE_EXPORT __declspec(dllexport)
#else
#define MOE_EXPORT __attribute__((visibility("default")))
#endif

namespace moe {

enum Status : int { status_ok = 0, status_failed = 1, status_out_of_memory = 2 };

// Thrown by kernels (on the calling thread or inside a parallel body); becomes a MoeError with this text.
struct Error : std::exception {
  char text[256];
  template <class... T>
  explicit Error(const char* format, T... values) {
    std::snprintf(text, sizeof text, format, values...);
  }
  const char* what() const noexcept override { return text; }
};

// Reads the arguments of a call in the order in which the launcher passed them.
class Args {
 public:
  explicit Args(const double* slots) : next_(slots + 1) {}
  template <class T>
  T* ptr() {
    return reinterpret_cast<T*>(static_cast<uintptr_t>(*next_++));
  }
  int64_t size() { return static_cast<int64_t>(*next_++); }
  int i32() { return static_cast<int>(*next_++); }
  bool flag() { return *next_++ != 0; }
  float f32() { return static_cast<float>(*next_++); }
  double f64() { return *next_++; }

 private:
  const double* next_;
};

// Runs a kernel body: sets the thread limit of the call and turns exceptions into a status and a message.
int guarded(const double* slots, void (*body)(Args&)) noexcept;

}  // namespace moe

// MOE_KERNEL(moe_swiglu_fwd_f32) { float* y = args.ptr<float>(); ... }
#define MOE_KERNEL(name)                                                                                   \
  static void name##_body(moe::Args& args);                                                                \
  extern "C" MOE_EXPORT int name(const double* slots) noexcept { return moe::guarded(slots, name##_body); } \
  static void name##_body([[maybe_unused]] moe::Args& args)
