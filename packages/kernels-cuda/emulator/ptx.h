// PTX instructions that are not C++ operators, as defined by the PTX ISA, for kernels translated by scripts/ptx/.
// Included only by those.
#pragma once
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "abi.h"

// The access checks (hooks.cc), called by name, because instructions specify the size and the alignment of an access.
extern "C" {
#define HOOK(bytes)               \
  void __tsan_read##bytes(void*); \
  void __tsan_write##bytes(void*);
HOOK(1) HOOK(2) HOOK(4) HOOK(8) HOOK(16)
#undef HOOK
}

struct PtxIndex {
  uint32_t x, y, z;
};
extern __attribute__((visibility("hidden"))) const PtxIndex threadIdx, blockIdx, blockDim, gridDim;

namespace ptx {

#define PTX_OP static inline __attribute__((always_inline, unused))

template <class To, class From>
PTX_OP To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "a register as another type of its size");
  return __builtin_bit_cast(To, from);
}

/// A kernel and the layout of its arguments; `parameters` ends with letter 0.
struct Registration : emu::Kernel {
  Registration(const char* module, const char* name, const char* file, int maxThreads, const emu::Parameter* parameters, void (*entry)(const char*))
      : Kernel{module, name, file, maxThreads, parameters, [](void (*entry)(), const char* packed) { ((void (*)(const char*))entry)(packed); }, (void (*)())entry, nullptr, 0} {
    emu::registerKernel(this);
  }
};

// --- Memory ---

/// The base address of the shared window.
PTX_OP char* sharedWindow() { return (char*)emu::dynamicShared() - emu::sharedAddress(emu::dynamicShared()); }

template <class T, int N = 1>
struct Vector {
  T v[N];
};
template <size_t Bytes>
PTX_OP void checkRead(void* at) {
  if constexpr (Bytes == 1) __tsan_read1(at);
  else if constexpr (Bytes == 2) __tsan_read2(at);
  else if constexpr (Bytes == 4) __tsan_read4(at);
  else if constexpr (Bytes == 8) __tsan_read8(at);
  else __tsan_read16(at);
}
template <size_t Bytes>
PTX_OP void checkWrite(void* at) {
  if constexpr (Bytes == 1) __tsan_write1(at);
  else if constexpr (Bytes == 2) __tsan_write2(at);
  else if constexpr (Bytes == 4) __tsan_write4(at);
  else if constexpr (Bytes == 8) __tsan_write8(at);
  else __tsan_write16(at);
}
template <class T, int N = 1>
PTX_OP Vector<T, N> load(const void* at) {
  checkRead<sizeof(T) * N>((void*)at);
  Vector<T, N> value;
  memcpy(&value, at, sizeof value);
  return value;
}
template <class T, int N = 1>
PTX_OP void store(void* at, Vector<T, N> value) {
  checkWrite<sizeof(T) * N>(at);
  memcpy(at, &value, sizeof value);
}
/// Parameters and a thread's local memory, which need no checks.
template <class T, int N = 1>
PTX_OP Vector<T, N> loadOwn(const void* at) {
  Vector<T, N> value;
  memcpy(&value, at, sizeof value);
  return value;
}
template <class T, int N = 1>
PTX_OP void storeOwn(void* at, Vector<T, N> value) {
  memcpy(at, &value, sizeof value);
}

// --- Integers ---

template <class T>
PTX_OP T shl(T a, uint32_t n) { return n >= sizeof(T) * 8 ? 0 : (T)(a << n); }
template <class T>
PTX_OP T shr(T a, uint32_t n) { return n >= sizeof(T) * 8 ? (T)(a < 0 ? -1 : 0) : (T)(a >> n); }
template <class T>
PTX_OP T smaller(T a, T b) { return a < b ? a : b; }
template <class T>
PTX_OP T larger(T a, T b) { return a < b ? b : a; }
/// "Division by zero yields an unspecified, machine-specific value".
template <class T>
PTX_OP T divide(T a, T b) { return b == 0 || ((T)-1 < 0 && b == (T)-1) ? (b == 0 ? (T)-1 : (T)(0 - a)) : a / b; }
template <class T>
PTX_OP T remainder(T a, T b) { return b == 0 ? a : (T)-1 < 0 && b == (T)-1 ? 0 : a % b; }
PTX_OP uint32_t mulHi(uint32_t a, uint32_t b) { return (uint32_t)((uint64_t)a * b >> 32); }
PTX_OP int32_t mulHi(int32_t a, int32_t b) { return (int32_t)((int64_t)a * b >> 32); }
PTX_OP uint64_t mulHi(uint64_t a, uint64_t b) { return (uint64_t)((unsigned __int128)a * b >> 64); }
PTX_OP int64_t mulHi(int64_t a, int64_t b) { return (int64_t)((__int128)a * b >> 64); }
template <class T>
PTX_OP T bfi(T insert, T into, uint32_t at, uint32_t length) {
  at &= 255, length &= 255;
  const uint32_t width = sizeof(T) * 8;
  T mask = length >= width ? ~(T)0 : ((T)1 << length) - 1;
  mask = at >= width ? 0 : (T)(mask << at);
  return (into & ~mask) | ((at >= width ? 0 : (T)(insert << at)) & mask);
}
template <class T>
PTX_OP T bfe(T a, uint32_t at, uint32_t length) {
  at &= 255, length &= 255;
  const uint32_t width = sizeof(T) * 8;
  const bool isSigned = (T)-1 < 0;
  T out = 0;
  const uint32_t last = smaller(at + length - 1, width - 1);
  const bool sign = isSigned && length > 0 && (a >> last & 1);
  for (uint32_t i = 0; i < width; i++) {
    const bool bit = i < length && at + i < width ? a >> (at + i) & 1 : sign;
    out |= (T)((T)bit << i);
  }
  return out;
}
PTX_OP uint32_t brev(uint32_t x) {
  uint32_t y = 0;
  for (int i = 0; i < 32; i++) y |= (x >> i & 1u) << (31 - i);
  return y;
}
/// The highest set bit or, with `Shift`, its distance from the top; 2^32 - 1 if there is none.
template <bool Shift>
PTX_OP uint32_t bfind(uint32_t x) { return x == 0 ? 0xffffffffu : Shift ? (uint32_t)__builtin_clz(x) : 31u - (uint32_t)__builtin_clz(x); }
PTX_OP uint32_t clz(uint32_t x) { return x == 0 ? 32u : (uint32_t)__builtin_clz(x); }
PTX_OP uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t both = (uint64_t)b << 32 | a;
  uint32_t y = 0;
  for (int i = 0; i < 4; i++) {
    const uint32_t pick = selector >> 4 * i & 15, byte = (uint32_t)(both >> (pick & 7) * 8) & 255;
    y |= (pick & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8 * i;
  }
  return y;
}

// --- Floating point ---

template <class T>
PTX_OP T minimum(T a, T b) { return a != a ? b : b != b ? a : a < b || (a == b && __builtin_signbit(a)) ? a : b; }
template <class T>
PTX_OP T maximum(T a, T b) { return a != a ? b : b != b ? a : a > b || (a == b && !__builtin_signbit(a)) ? a : b; }
PTX_OP float maximumOrNan(float a, float b) { return a != a || b != b ? __builtin_nanf("") : maximum<float>(a, b); }
PTX_OP float saturate(float x) { return x > 0.f ? (x < 1.f ? x : 1.f) : 0.f; }
/// The result of an approximate instruction: with a relative error of up to `off`, in a pseudo-random direction, if
/// requested.
PTX_OP float approximately(float exact, float off) {
  if (!emu::approximate) return exact;
  return exact * (bits<uint32_t>(exact) * 2654435761u >> 31 ? 1 + off : 1 - off);
}
PTX_OP float ex2(float x) { return x == 0 ? 1.f : approximately(exp2f(x), 0x1p-22f); }
PTX_OP float flush(float x) { return fabsf(x) < 1.17549435e-38f ? copysignf(0.f, x) : x; }
/// a * b + c rounded towards minus infinity. The product is exact in double, and so is the rounding error of the sum.
PTX_OP float fmaDown(float a, float b, float c) {
  const double product = (double)a * b, sum = product + c;
  const double tail = sum - product, lost = (product - (sum - tail)) + (c - tail);
  const float rounded = (float)sum;
  return rounded > sum || (rounded == sum && lost < 0) ? nextafterf(rounded, -INFINITY) : rounded;
}
/// Converts a value, rounded before, to an integer. Saturates; NaN becomes 0.
template <class T, class F>
PTX_OP T toInteger(F x) {
  constexpr T lowest = (T)-1 < 0 ? (T)((T)1 << (sizeof(T) * 8 - 1)) : 0, highest = (T)~lowest;
  if (x != x) return 0;
  if (x <= (F)lowest) return lowest;
  if (x >= (F)highest) return highest;
  return (T)x;
}
PTX_OP float fromHalf(uint16_t half) { return (float)bits<_Float16>(half); }
PTX_OP uint16_t toHalf(float x) { return bits<uint16_t>((_Float16)x); }
PTX_OP uint16_t toBf16(float x) {
  const uint32_t u = bits<uint32_t>(x);
  return (u & 0x7fffffffu) > 0x7f800000u ? 0x7fff : (uint16_t)((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
}
PTX_OP uint32_t toBf16x2(float high, float low) { return (uint32_t)toBf16(high) << 16 | toBf16(low); }
/// The nearest value of e4m3: up to 15 units of the last of its 3 bits, which is at least 2^-9.
PTX_OP uint8_t toE4m3(float x) {
  if (x != x) return 0x7f;
  const float a = fabsf(x) < 448.f ? fabsf(x) : 448.f;
  int exponent = a < 0x1p-6f ? -6 : ilogbf(a);
  float units = nearbyintf(ldexpf(a, 3 - exponent));
  if (units == 16.f) units = 8.f, exponent++;
  const int code = units < 8.f ? (int)units : (exponent + 7) << 3 | ((int)units - 8);
  return (uint8_t)(code | (__builtin_signbit(x) ? 0x80 : 0));
}
PTX_OP uint16_t toE4m3x2(float high, float low) { return (uint16_t)(toE4m3(high) << 8 | toE4m3(low)); }
PTX_OP uint16_t halfOfE4m3(uint8_t x) {
  const int exponent = x >> 3 & 15, fraction = x & 7;
  const uint16_t sign = (uint16_t)((x & 0x80) << 8);
  if (exponent == 15 && fraction == 7) return sign | 0x7fff;
  return sign | toHalf(exponent == 0 ? ldexpf((float)fraction, -9) : ldexpf((float)(8 + fraction), exponent - 10));
}
PTX_OP uint32_t halvesOfE4m3x2(uint16_t pair) { return (uint32_t)halfOfE4m3((uint8_t)(pair >> 8)) << 16 | halfOfE4m3((uint8_t)pair); }

// --- Warp-wide instructions ---

struct Shuffled {
  uint32_t value;
  bool inside;
};
/// shfl.sync as in the PTX ISA: `clamp` contains a segment mask and the last lane.
PTX_OP Shuffled shuffle(emu::ShuffleKind kind, uint32_t value, uint32_t operand, uint32_t clamp, uint32_t mask, const char* file, int line) {
  const int lane = (int)((threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) & 31u);
  const int b = (int)(operand & 31u), c = (int)(clamp & 31u), segment = (int)(clamp >> 8 & 31u);
  const int last = (lane & segment) | (c & ~segment), first = lane & segment;
  int source;
  bool inside;
  switch (kind) {
    case emu::shuffleUp: source = lane - b, inside = source >= last; break;
    case emu::shuffleDown: source = lane + b, inside = source <= last; break;
    case emu::shuffleXor: source = lane ^ b, inside = source <= last; break;
    default: source = first | (b & ~segment), inside = source <= last; break;
  }
  return {(uint32_t)emu::shuffle(emu::shuffleIndex, mask, value, inside ? source : lane, 32, file, line), inside};
}

/// Here asynchronous copies copy all bytes or write zeros.
PTX_OP void copyAsync(void* to, const void* from, int bytes, uint32_t valid, const char* file, int line) {
  if (valid != 0 && valid != (uint32_t)bytes) emu::trap(file, line);
  emu::copyAsync(to, from, bytes, valid != 0);
}

/// A named barrier with 128 threads is that of a warpgroup.
PTX_OP void syncNamed(uint32_t name, uint32_t threads, const char* file, int line) {
  if (threads != 128 || name != 1 + threadIdx.x / 128) emu::trap(file, line);
  emu::syncWarpgroup(file, line);
}

/// A wgmma, computed immediately. Accesses to accumulators and operands in flight are checked in kernels that the host
/// compiler built.
template <int N, class Call>
PTX_OP void computeWgmma(float (&d)[N], Call call, const char* file, int line) {
  emu::wgmmaFence(file, line);
  call(d);
  emu::wgmmaCommit(file, line);
  emu::waitForProducts(0, file, line);
}

}  // namespace ptx
