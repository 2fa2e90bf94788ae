// The language of kernels for a host C++ compiler. Included by device/moe.cuh if MOE_EMULATOR is defined, and by
// nothing else.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "abi.h"

#ifndef MOE_MODULE
#error "compile with -DMOE_MODULE=\"<folder of the kernel>\""
#endif

// Also inlined into functions that are compiled without the sanitizers.
#define __device__ __attribute__((always_inline))
#define __host__
#define __global__
#define __constant__
#define __restrict__ __restrict
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define __grid_constant__
#define MOE_DEVICE static inline __attribute__((always_inline, unused))

template <class T, int N>
struct Args;

namespace emu {

template <class T>
struct ParameterOf;
#define EMU_PARAMETER(type, letter) \
  template <>                       \
  struct ParameterOf<type> {        \
    static constexpr Parameter value{letter, 0, sizeof(type), alignof(type)}; \
  };
EMU_PARAMETER(int, 'i')
EMU_PARAMETER(unsigned, 'i')
EMU_PARAMETER(int64_t, 'l')
EMU_PARAMETER(uint64_t, 'l')
EMU_PARAMETER(float, 'f')
#undef EMU_PARAMETER
template <class T>
struct ParameterOf<T*> {
  static constexpr Parameter value{'p', 0, sizeof(T*), alignof(T*)};
};
template <class T, int N>
struct ParameterOf<Args<T, N>> {
  static constexpr Parameter value{ParameterOf<T>::value.letter, N, N * (int)sizeof(T), alignof(T)};
};
template <class T>
struct ParameterOf<const T> : ParameterOf<T> {};

template <class... P>
inline constexpr Parameter parametersOf[] = {ParameterOf<P>::value..., {0, 0, 0, 0}};

/// Reads packed arguments in order, each at its natural alignment.
struct PackedReader {
  const char* start;
  size_t at = 0;
  template <class T>
  __attribute__((always_inline)) decltype(auto) next() {
    const size_t from = (at + alignof(T) - 1) / alignof(T) * alignof(T);
    at = from + sizeof(T);
    if constexpr (alignof(T) <= 8) {
      return (*(const T*)(start + from));
    } else {
      // The argument block as a whole has less alignment.
      T value;
      __builtin_memcpy((void*)&value, start + from, sizeof(T));
      return value;
    }
  }
};
template <class... P>
struct Call {
  // Braces at the call site fix the order in which arguments are read.
  __attribute__((always_inline)) Call(void (*entry)(P...), const P&... values) { entry(values...); }
};
template <class... P>
__attribute__((no_sanitize("thread", "undefined"))) void invoke(void (*entry)(), const char* packed) {
  [[maybe_unused]] PackedReader reader{packed};
  Call<P...>{(void (*)(P...))entry, reader.next<P>()...};
}

constexpr int maxThreadsOf(int threads, int = 0, int = 0) { return threads; }

struct Registration : Kernel {
  template <class... P>
  Registration(const char* name, const char* file, int maxThreads, void (*entry)(P...))
      : Kernel{MOE_MODULE, name, file, maxThreads, parametersOf<P...>, emu::invoke<P...>, (void (*)())entry, nullptr, 0} {
    registerKernel(this);
  }
};

}  // namespace emu

#define MOE_KERNEL(bounds, name, parameters)                                                          \
  static void name parameters;                                                                       \
  static emu::Registration name##_registration(#name, __FILE__, emu::maxThreadsOf bounds, name);     \
  static void name parameters

#define MOE_SHARED(type, name, dims)      \
  typedef type name##_shared dims;        \
  static emu::SharedSlot name##_slot;     \
  name##_shared& name = *(name##_shared*)emu::sharedArray(&name##_slot, sizeof(name##_shared), alignof(name##_shared), #name)

#define MOE_DYNAMIC_SHARED(name) unsigned char* const name = (unsigned char*)emu::dynamicShared()

// Vector types. Their alignment is that of the device and is checked at every access.
#define EMU_VECTORS(base, type)                                                                                           \
  struct __align__(2 * sizeof(type)) base##2 { type x, y; };                                                              \
  struct base##3 { type x, y, z; };                                                                                       \
  struct __align__(4 * sizeof(type) > 16 ? 16 : 4 * sizeof(type)) base##4 { type x, y, z, w; };                           \
  MOE_DEVICE base##2 make_##base##2(type x, type y) { return base##2{x, y}; }                                             \
  MOE_DEVICE base##3 make_##base##3(type x, type y, type z) { return base##3{x, y, z}; }                                  \
  MOE_DEVICE base##4 make_##base##4(type x, type y, type z, type w) { return base##4{x, y, z, w}; }
EMU_VECTORS(char, signed char)
EMU_VECTORS(uchar, unsigned char)
EMU_VECTORS(short, short)
EMU_VECTORS(ushort, unsigned short)
EMU_VECTORS(int, int)
EMU_VECTORS(uint, unsigned)
EMU_VECTORS(longlong, long long)
EMU_VECTORS(ulonglong, unsigned long long)
EMU_VECTORS(float, float)
EMU_VECTORS(double, double)
#undef EMU_VECTORS

// Constants to a kernel (the compiler may keep them in registers and does not instrument them). The runtime sets them
// before it continues a thread.
extern __attribute__((visibility("hidden"))) const uint3 threadIdx, blockIdx, blockDim, gridDim;
constexpr int warpSize = 32;

// Barriers, shuffles, votes.
#define EMU_PLACE const char *file = __builtin_FILE(), int line = __builtin_LINE()
MOE_DEVICE void __syncthreads(EMU_PLACE) { emu::barrier(file, line); }
MOE_DEVICE int __syncthreads_or(int value, EMU_PLACE) { return emu::barrierReduce(emu::barrierOr, value, file, line); }
MOE_DEVICE int __syncthreads_and(int value, EMU_PLACE) { return emu::barrierReduce(emu::barrierAnd, value, file, line); }
MOE_DEVICE int __syncthreads_count(int value, EMU_PLACE) { return emu::barrierReduce(emu::barrierCount, value, file, line); }
MOE_DEVICE void __syncwarp(unsigned mask = 0xffffffffu, EMU_PLACE) { emu::warpBarrier(mask, file, line); }

namespace emu {
template <class T>
MOE_DEVICE T shuffleValue(ShuffleKind kind, uint32_t mask, T value, int operand, int width, const char* file, int line) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "32 or 64 bits");
  if constexpr (sizeof(T) == 4) {
    const uint32_t bits = (uint32_t)shuffle(kind, mask, __builtin_bit_cast(uint32_t, value), operand, width, file, line);
    return __builtin_bit_cast(T, bits);
  } else {
    return __builtin_bit_cast(T, shuffle(kind, mask, __builtin_bit_cast(uint64_t, value), operand, width, file, line));
  }
}
}  // namespace emu
#define EMU_SHUFFLE(name, kind)                                                             \
  template <class T>                                                                        \
  MOE_DEVICE T name(unsigned mask, T value, int operand, int width = 32, EMU_PLACE) {       \
    return emu::shuffleValue(emu::kind, mask, value, operand, width, file, line);           \
  }
EMU_SHUFFLE(__shfl_sync, shuffleIndex)
EMU_SHUFFLE(__shfl_xor_sync, shuffleXor)
EMU_SHUFFLE(__shfl_up_sync, shuffleUp)
EMU_SHUFFLE(__shfl_down_sync, shuffleDown)
#undef EMU_SHUFFLE

namespace emu {
template <class T>
MOE_DEVICE T fromBits(uint64_t bits) {
  if constexpr (sizeof(T) == 4) return __builtin_bit_cast(T, (uint32_t)bits);
  else return __builtin_bit_cast(T, bits);
}
template <class T>
MOE_DEVICE uint64_t toBits(T value) {
  if constexpr (sizeof(T) == 4) return __builtin_bit_cast(uint32_t, value);
  else return __builtin_bit_cast(uint64_t, value);
}
/// The shuffles of `joinLanes` for all lanes, without the hooks of the sanitizer.
template <class Op, class T>
__attribute__((no_sanitize("thread"), no_sanitize("undefined"))) void joinAllLanes(uint64_t* bits, int lanes) {
  T values[32], joined[32];
  for (int i = 0; i < 32; i++) values[i] = fromBits<T>(bits[i]);
  for (int step = lanes / 2; step > 0; step /= 2) {
    for (int i = 0; i < 32; i++) joined[i] = Op::join(values[i], values[i ^ step]);
    for (int i = 0; i < 32; i++) values[i] = joined[i];
  }
  for (int i = 0; i < 32; i++) bits[i] = toBits(values[i]);
}
/// The same for arrays of N values, which the lanes pass by address.
template <class Op, class T, int N>
__attribute__((no_sanitize("thread"), no_sanitize("undefined"))) void joinAllArrays(uint64_t* arrays, int lanes) {
  for (int n = 0; n < N; n++) {
    uint64_t bits[32];
    for (int i = 0; i < 32; i++) bits[i] = toBits(((const T*)arrays[i])[n]);
    joinAllLanes<Op, T>(bits, lanes);
    for (int i = 0; i < 32; i++) ((T*)arrays[i])[n] = fromBits<T>(bits[i]);
  }
}
}  // namespace emu
/// As `joinLanes` in reduce.cuh, with one meeting of the warp in place of one for each shuffle.
template <class Op, class T>
MOE_DEVICE T joinLanes(T x, int lanes, EMU_PLACE) {
  return emu::fromBits<T>(emu::combineLanes(emu::toBits(x), emu::joinAllLanes<Op, T>, lanes, file, line));
}
template <class Op, class T, int N>
MOE_DEVICE void joinLanes(T (&x)[N], int lanes, EMU_PLACE) {
  emu::combineLanes((uint64_t)x, emu::joinAllArrays<Op, T, N>, lanes, file, line);
}
MOE_DEVICE unsigned __ballot_sync(unsigned mask, int value, EMU_PLACE) { return emu::ballot(mask, value != 0, file, line); }
MOE_DEVICE int __any_sync(unsigned mask, int value, EMU_PLACE) { return emu::ballot(mask, value != 0, file, line) != 0; }
MOE_DEVICE int __all_sync(unsigned mask, int value, EMU_PLACE) { return emu::ballot(mask, value != 0, file, line) == mask; }

MOE_DEVICE void __threadfence() { __asm__ volatile("" ::: "memory"); }
MOE_DEVICE void __threadfence_block() { __asm__ volatile("" ::: "memory"); }
MOE_DEVICE void __trap(EMU_PLACE) { emu::trap(file, line); }

// Integer atomics.
MOE_DEVICE int atomicAdd(int* p, int v) { return (int)emu::atomic(emu::atomicAddKind, p, (uint32_t)v, 0); }
MOE_DEVICE unsigned atomicAdd(unsigned* p, unsigned v) { return emu::atomic(emu::atomicAddKind, p, v, 0); }
MOE_DEVICE int atomicSub(int* p, int v) { return (int)emu::atomic(emu::atomicAddKind, p, 0u - (uint32_t)v, 0); }
MOE_DEVICE unsigned atomicSub(unsigned* p, unsigned v) { return emu::atomic(emu::atomicAddKind, p, 0u - v, 0); }
MOE_DEVICE int atomicMax(int* p, int v) { return (int)emu::atomic(emu::atomicMaxSigned, p, (uint32_t)v, 0); }
MOE_DEVICE unsigned atomicMax(unsigned* p, unsigned v) { return emu::atomic(emu::atomicMaxKind, p, v, 0); }
MOE_DEVICE int atomicMin(int* p, int v) { return (int)emu::atomic(emu::atomicMinSigned, p, (uint32_t)v, 0); }
MOE_DEVICE unsigned atomicMin(unsigned* p, unsigned v) { return emu::atomic(emu::atomicMinKind, p, v, 0); }
MOE_DEVICE int atomicExch(int* p, int v) { return (int)emu::atomic(emu::atomicExchange, p, (uint32_t)v, 0); }
MOE_DEVICE unsigned atomicExch(unsigned* p, unsigned v) { return emu::atomic(emu::atomicExchange, p, v, 0); }
MOE_DEVICE int atomicCAS(int* p, int old, int v) { return (int)emu::atomic(emu::atomicCompare, p, (uint32_t)v, (uint32_t)old); }
MOE_DEVICE unsigned atomicCAS(unsigned* p, unsigned old, unsigned v) { return emu::atomic(emu::atomicCompare, p, v, old); }
MOE_DEVICE int atomicAnd(int* p, int v) { return (int)emu::atomic(emu::atomicAndKind, p, (uint32_t)v, 0); }
MOE_DEVICE unsigned atomicAnd(unsigned* p, unsigned v) { return emu::atomic(emu::atomicAndKind, p, v, 0); }
MOE_DEVICE int atomicOr(int* p, int v) { return (int)emu::atomic(emu::atomicOrKind, p, (uint32_t)v, 0); }
MOE_DEVICE unsigned atomicOr(unsigned* p, unsigned v) { return emu::atomic(emu::atomicOrKind, p, v, 0); }

#define EMU_LOAD(name) template <class T> MOE_DEVICE T name(const T* p) { return *p; }
EMU_LOAD(__ldg)
EMU_LOAD(__ldcg)
EMU_LOAD(__ldcs)
EMU_LOAD(__ldca)
#undef EMU_LOAD
#define EMU_STORE(name) template <class T> MOE_DEVICE void name(T* p, T value) { *p = value; }
EMU_STORE(__stcg)
EMU_STORE(__stcs)
#undef EMU_STORE

// Bits.
MOE_DEVICE unsigned __float_as_uint(float x) { return __builtin_bit_cast(unsigned, x); }
MOE_DEVICE int __float_as_int(float x) { return __builtin_bit_cast(int, x); }
MOE_DEVICE float __uint_as_float(unsigned x) { return __builtin_bit_cast(float, x); }
MOE_DEVICE float __int_as_float(int x) { return __builtin_bit_cast(float, x); }
MOE_DEVICE int __popc(unsigned x) { return __builtin_popcount(x); }
MOE_DEVICE int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
MOE_DEVICE int __ffs(int x) { return __builtin_ffs(x); }
MOE_DEVICE int __ffsll(long long x) { return __builtin_ffsll(x); }
MOE_DEVICE int __clz(int x) { return x == 0 ? 32 : __builtin_clz((unsigned)x); }
MOE_DEVICE int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll((unsigned long long)x); }
MOE_DEVICE unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((uint64_t)a * b >> 32); }
MOE_DEVICE unsigned __brev(unsigned x) {
  unsigned y = 0;
  for (int i = 0; i < 32; i++) y |= (x >> i & 1u) << (31 - i);
  return y;
}
MOE_DEVICE unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t both = (uint64_t)b << 32 | a;
  unsigned y = 0;
  for (int i = 0; i < 4; i++) y |= (unsigned)(both >> (selector >> 4 * i & 7u) * 8 & 0xffu) << 8 * i;
  return y;
}

// Mathematics. Declared rather than included: <math.h> is most of a kernel's compile time.
extern "C" {
float expf(float) noexcept(true);
float exp2f(float) noexcept(true);
float expm1f(float) noexcept(true);
float logf(float) noexcept(true);
float log2f(float) noexcept(true);
float log1pf(float) noexcept(true);
float sqrtf(float) noexcept(true);
float sinf(float) noexcept(true);
float cosf(float) noexcept(true);
void sincosf(float, float*, float*) noexcept(true);
float tanhf(float) noexcept(true);
float erff(float) noexcept(true);
float powf(float, float) noexcept(true);
float fmodf(float, float) noexcept(true);
float floorf(float) noexcept(true);
float ceilf(float) noexcept(true);
float truncf(float) noexcept(true);
float roundf(float) noexcept(true);
float rintf(float) noexcept(true);
float fabsf(float) noexcept(true);
float fmaf(float, float, float) noexcept(true);
float fmaxf(float, float) noexcept(true);
float fminf(float, float) noexcept(true);
float copysignf(float, float) noexcept(true);
float ldexpf(float, int) noexcept(true);
double exp(double) noexcept(true);
double log(double) noexcept(true);
double sqrt(double) noexcept(true);
double sin(double) noexcept(true);
double cos(double) noexcept(true);
double pow(double, double) noexcept(true);
double fma(double, double, double) noexcept(true);
double floor(double) noexcept(true);
double fabs(double) noexcept(true);
int abs(int) noexcept(true);
}
MOE_DEVICE float rsqrtf(float x) { return 1.f / __builtin_sqrtf(x); }
MOE_DEVICE float __expf(float x) { return expf(x); }
MOE_DEVICE float __logf(float x) { return logf(x); }
MOE_DEVICE float __log2f(float x) { return log2f(x); }
MOE_DEVICE float __sinf(float x) { return sinf(x); }
MOE_DEVICE float __cosf(float x) { return cosf(x); }
MOE_DEVICE float __powf(float x, float y) { return powf(x, y); }
MOE_DEVICE float __fdividef(float x, float y) { return x / y; }
MOE_DEVICE float __frcp_rn(float x) { return 1.f / x; }
MOE_DEVICE float __fdiv_rn(float x, float y) { return x / y; }
MOE_DEVICE float __fsqrt_rn(float x) { return __builtin_sqrtf(x); }
MOE_DEVICE float __frsqrt_rn(float x) { return 1.f / __builtin_sqrtf(x); }
MOE_DEVICE float __saturatef(float x) { return x > 0.f ? (x < 1.f ? x : 1.f) : 0.f; }
MOE_DEVICE float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
/// Rounds immediately: prevents contraction into a fused multiply-add.
MOE_DEVICE float emuRounded(float x) {
#if defined(__x86_64__)
  __asm__("" : "+x"(x));
#elif defined(__aarch64__)
  __asm__("" : "+w"(x));
#else
  __asm__("" : "+m"(x));
#endif
  return x;
}
MOE_DEVICE float __fadd_rn(float a, float b) { return emuRounded(emuRounded(a) + emuRounded(b)); }
MOE_DEVICE float __fsub_rn(float a, float b) { return emuRounded(emuRounded(a) - emuRounded(b)); }
MOE_DEVICE float __fmul_rn(float a, float b) { return emuRounded(a * b); }
MOE_DEVICE int __float2int_rn(float x) { return (int)__builtin_rintf(x); }
MOE_DEVICE int __float2int_rz(float x) { return (int)x; }
MOE_DEVICE int __float2int_rd(float x) { return (int)__builtin_floorf(x); }
MOE_DEVICE float __int2float_rn(int x) { return (float)x; }
MOE_DEVICE bool isnan(float x) { return x != x; }
MOE_DEVICE bool isinf(float x) { return __builtin_isinf(x); }
MOE_DEVICE bool isfinite(float x) { return __builtin_isfinite(x); }

#define EMU_MIN_MAX(type)                                                 \
  MOE_DEVICE type min(type a, type b) { return a < b ? a : b; }           \
  MOE_DEVICE type max(type a, type b) { return a > b ? a : b; }
EMU_MIN_MAX(int)
EMU_MIN_MAX(unsigned)
EMU_MIN_MAX(long)
EMU_MIN_MAX(unsigned long)
EMU_MIN_MAX(long long)
EMU_MIN_MAX(unsigned long long)
#undef EMU_MIN_MAX
MOE_DEVICE float min(float a, float b) { return fminf(a, b); }
MOE_DEVICE float max(float a, float b) { return fmaxf(a, b); }
