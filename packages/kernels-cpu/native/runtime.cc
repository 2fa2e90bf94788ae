// moe-isa: baseline
// The C functions, other than kernels, that JavaScript calls: version and CPU, memory, errors.
#include "runtime.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <thread>

#include "abi.h"
#include "memory.h"
#include "parallel.h"

#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif
#if defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace moe {
namespace {

thread_local char last_error[512];

#if defined(__x86_64__) && !defined(MOE_EMULATED_ISA)
// Uses CPUID directly, because not every compiler's runtime library has __builtin_cpu_supports or knows AVX512_BF16.
const char* isa_of_cpu() {
  struct {
    unsigned a, b, c, d;
  } basic = {}, extended = {}, newer = {};
  const auto all = [](unsigned word, std::initializer_list<int> bits) {
    return std::all_of(bits.begin(), bits.end(), [&](int bit) { return word >> bit & 1; });
  };
  // OSXSAVE, AVX, FMA, MOVBE, POPCNT, F16C
  if (!__get_cpuid(1, &basic.a, &basic.b, &basic.c, &basic.d) || !all(basic.c, {27, 28, 12, 22, 23, 29})) return "baseline";
  // BMI1, AVX2, BMI2
  if (!__get_cpuid_count(7, 0, &extended.a, &extended.b, &extended.c, &extended.d) || !all(extended.b, {3, 5, 8})) return "baseline";
  // The registers that the system saves per thread: xmm and ymm; masks and both halves of zmm.
  unsigned kept, unused;
  asm("xgetbv" : "=a"(kept), "=d"(unused) : "c"(0));
  if (!all(kept, {1, 2})) return "baseline";
  // AVX-512 F, DQ, CD, BW, VL
  if (!all(kept, {5, 6, 7}) || !all(extended.b, {16, 17, 28, 30, 31})) return "avx2";
  // AVX512_VNNI, AVX512_BF16
  if (!all(extended.c, {11})) return "avx512";
  const bool has_newer = extended.a >= 1 && __get_cpuid_count(7, 1, &newer.a, &newer.b, &newer.c, &newer.d);
  return has_newer && all(newer.a, {5}) ? "avx512bf16" : "avx512vnni";
}

bool is_intel() {
  unsigned highest, name[3];
  return __get_cpuid(0, &highest, &name[0], &name[2], &name[1]) && std::memcmp(name, "GenuineIntel", sizeof name) == 0;
}
#endif

#if defined(__APPLE__)
// A system number (sysctl) by name; 0 if it is unknown.
int system_number(const char* name) {
  int value = 0;
  size_t size = sizeof value;
  return sysctlbyname(name, &value, &size, nullptr, 0) == 0 ? value : 0;
}
#endif

#if defined(__aarch64__)
const char* isa_of_cpu() {
#if defined(__linux__)
  // By bit number, because headers may be older: ASIMDDP; I8MM and BF16.
  const unsigned long first = getauxval(AT_HWCAP), second = getauxval(AT_HWCAP2);
  const bool dotprod = first >> 20 & 1, bf16 = (second >> 13 & 3) == 3;
#elif defined(__APPLE__)
  const bool dotprod = system_number("hw.optional.arm.FEAT_DotProd");
  const bool bf16 = system_number("hw.optional.arm.FEAT_BF16") && system_number("hw.optional.arm.FEAT_I8MM");
#else
  const bool dotprod = false, bf16 = false;
#endif
  return !dotprod ? "baseline" : !bf16 ? "dotprod" : "bf16";
}
#endif

// Number of CPUs granted by the control group; 0 if unlimited or unknown.
int group_limit() {
#if defined(__linux__)
  if (FILE* file = std::fopen("/sys/fs/cgroup/cpu.max", "r")) {
    long long quota = 0, period = 0;
    const int got = std::fscanf(file, "%lld %lld", &quota, &period);
    std::fclose(file);
    if (got == 2 && quota > 0 && period > 0) return static_cast<int>((quota + period - 1) / period);
  }
#endif
  return 0;
}

}  // namespace

int guarded(const double* slots, void (*body)(Args&)) noexcept {
  set_call_threads(static_cast<int>(slots[0]));
  try {
    Args args(slots);
    body(args);
    return status_ok;
  } catch (const std::bad_alloc&) {
    std::snprintf(last_error, sizeof last_error, "no memory for working space");
    return status_out_of_memory;
  } catch (const std::exception& error) {
    std::snprintf(last_error, sizeof last_error, "%s", error.what());
  } catch (...) {
    std::snprintf(last_error, sizeof last_error, "unknown failure");
  }
  return status_failed;
}

}  // namespace moe

extern "C" {

// Incremented when the meaning of slots or of these functions changes.
MOE_EXPORT int moe_abi_version() { return 5; }

// Runs recorded kernels one after another. `calls` contains pairs of the addresses of a kernel and of its slots. Returns 0, or
// 4 * (1 + index of the failed call) + its status.
MOE_EXPORT int64_t moe_replay(int64_t calls, int64_t count) {
  const double* pairs = reinterpret_cast<const double*>(static_cast<uintptr_t>(calls));
  for (int64_t i = 0; i < count; ++i) {
    const auto kernel = reinterpret_cast<int (*)(const double*)>(static_cast<uintptr_t>(pairs[2 * i]));
    const int status = kernel(reinterpret_cast<const double*>(static_cast<uintptr_t>(pairs[2 * i + 1])));
    if (status != moe::status_ok) return 4 * (1 + i) + status;
  }
  return 0;
}

MOE_EXPORT const char* moe_last_error() { return moe::last_error; }

// The highest instruction set that this CPU and operating system support.
MOE_EXPORT const char* moe_cpu_isa() {
#if defined(MOE_EMULATED_ISA)
  return MOE_EMULATED_ISA;
#elif defined(__x86_64__) || defined(__aarch64__)
  return moe::isa_of_cpu();
#else
  return "baseline";
#endif
}

// The fastest one. Intel's cores multiply bf16 vectors at half the speed of f32 (VDPBF16PS takes two cycles and FMA half of one, for twice the
// products); their fast bf16 products are those of AMX.
MOE_EXPORT const char* moe_fastest_isa() {
#if defined(__x86_64__) && !defined(MOE_EMULATED_ISA)
  if (std::strcmp(moe_cpu_isa(), "avx512bf16") == 0 && moe::is_intel()) return "avx512vnni";
#endif
  return moe_cpu_isa();
}

MOE_EXPORT int moe_default_threads() {
  int count = static_cast<int>(std::thread::hardware_concurrency());
#if defined(__APPLE__)
  // Only the performance cores if there are others, which would delay the end of every op.
  if (const int fast = moe::system_number("hw.perflevel0.logicalcpu")) count = std::min(count, fast);
#endif
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) count = CPU_COUNT(&set);
#endif
  const int limit = moe::group_limit();
  if (limit > 0) count = std::min(count, limit);
  return std::max(1, count);
}

// Addresses and sizes are passed as 64-bit integers. 0: out of memory.
MOE_EXPORT int64_t moe_allocate(int64_t bytes) {
  return static_cast<int64_t>(reinterpret_cast<uintptr_t>(moe::allocate(static_cast<size_t>(bytes))));
}

MOE_EXPORT void moe_release(int64_t pointer, int64_t bytes) {
  moe::release(reinterpret_cast<void*>(static_cast<uintptr_t>(pointer)), static_cast<size_t>(bytes));
}

MOE_EXPORT void moe_discard(int64_t pointer, int64_t bytes) {
  moe::discard(reinterpret_cast<void*>(static_cast<uintptr_t>(pointer)), static_cast<size_t>(bytes));
}

MOE_EXPORT void moe_trim() { moe::trim_scratch(); }

MOE_EXPORT void moe_upload(int64_t to, const void* from, int64_t bytes) {
  if (bytes > 0) std::memcpy(reinterpret_cast<void*>(static_cast<uintptr_t>(to)), from, static_cast<size_t>(bytes));
}

MOE_EXPORT void moe_download(void* to, int64_t from, int64_t bytes) {
  if (bytes > 0) std::memcpy(to, reinterpret_cast<const void*>(static_cast<uintptr_t>(from)), static_cast<size_t>(bytes));
}
}

// (to, from, bytes)
MOE_KERNEL(moe_copy) {
  char* to = args.ptr<char>();
  const char* from = args.ptr<const char>();
  const int64_t bytes = args.size();
  moe::parallel_for(
      bytes, int64_t{1} << 18,
      [&](int64_t begin, int64_t end, int) { std::memcpy(to + begin, from + begin, static_cast<size_t>(end - begin)); }, 64);
}
