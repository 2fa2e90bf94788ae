// The AVX-512 instructions that our kernels use, computed with AVX2, so that their AVX-512 paths run on machines without it.
//
// The emulated build (scripts/build-native.mjs --emulated) includes this file in front of every source of the levels avx512,
// avx512vnni and avx512bf16 and compiles with the flags of avx2. GCC's own headers come first; then every intrinsic that kernels call is redirected to
// a function here, and the macros that kernels test are defined. Using an intrinsic that is missing here is a compile error, because GCC
// refuses to inline its own into code for AVX2. Semantics are those of the Intel SDM, volume 2, bit for bit except for the payloads of NaN. If an
// instruction requires aligned memory, unaligned memory traps. Lanes that an instruction leaves undefined are filled with NaN.
#pragma once

#if !defined(__GNUC__) || defined(__clang__) || !defined(__OPTIMIZE__) || !defined(__AVX2__) || !defined(__FMA__)
#error "needs GCC with -O1 or more, -mavx2 and -mfma"
#endif
#if defined(__AVX512F__)
#error "not for a compiler that emits AVX-512 itself"
#endif

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512DQ__ 1
#define __AVX512VL__ 1
#if defined(MOE_ISA_AVX512VNNI) || defined(MOE_ISA_AVX512BF16)
#define __AVX512VNNI__ 1
#endif
#if defined(MOE_ISA_AVX512BF16)
#define __AVX512BF16__ 1
#endif

// For longer functions, which are not inlined: kernels unroll their loops, so inlining these would take minutes to compile.
#define MOE_EMULATED_CALLED static __attribute__((noinline, unused))

namespace emulated {

// A register as an array of lanes.
template <class T>
struct Lanes {
  T at[64 / sizeof(T)];
};

template <class To, class From>
static inline To as(const From& x) {
  static_assert(sizeof(To) == sizeof(From), "bits of the same size");
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}

// A register as two AVX2 registers, for instructions that work on each half separately.
template <class V>
struct Halves {
  V low, high;
};
using Floats = Halves<__m256>;
using Integers = Halves<__m256i>;

static inline void need_aligned(const void* p) {
  if (reinterpret_cast<std::uintptr_t>(p) % 64 != 0) __builtin_trap();
}

static constexpr bool has(unsigned mask, int lane) { return (mask >> lane & 1) != 0; }

}  // namespace emulated

// --- memory ---

static inline __m512 emulated_loadu_ps(const void* from) {
  __m512 x;
  std::memcpy(&x, from, 64);
  return x;
}
#define _mm512_loadu_ps emulated_loadu_ps

static inline __m512i emulated_loadu_si512(const void* from) {
  __m512i x;
  std::memcpy(&x, from, 64);
  return x;
}
#define _mm512_loadu_si512 emulated_loadu_si512

static inline __m512i emulated_load_si512(const void* from) {
  emulated::need_aligned(from);
  return emulated_loadu_si512(from);
}
#define _mm512_load_si512 emulated_load_si512

static inline void emulated_storeu_ps(void* to, __m512 x) { std::memcpy(to, &x, 64); }
#define _mm512_storeu_ps emulated_storeu_ps

static inline void emulated_storeu_si512(void* to, __m512i x) { std::memcpy(to, &x, 64); }
#define _mm512_storeu_si512 emulated_storeu_si512

static inline void emulated_stream_ps(float* to, __m512 x) {
  emulated::need_aligned(to);
  std::memcpy(to, &x, 64);
}
#define _mm512_stream_ps emulated_stream_ps

// Memory of lanes outside of the mask is not touched.
MOE_EMULATED_CALLED __m512 emulated_mask_loadu_ps(__m512 others, __mmask16 mask, const void* from) {
  auto x = emulated::as<emulated::Lanes<float>>(others);
  for (int i = 0; i < 16; ++i)
    if (emulated::has(mask, i)) std::memcpy(&x.at[i], static_cast<const char*>(from) + 4 * i, 4);
  return emulated::as<__m512>(x);
}
#define _mm512_mask_loadu_ps emulated_mask_loadu_ps

static inline __m512 emulated_maskz_loadu_ps(__mmask16 mask, const void* from) { return emulated_mask_loadu_ps(__m512{}, mask, from); }
#define _mm512_maskz_loadu_ps emulated_maskz_loadu_ps

static inline __m512i emulated_maskz_loadu_epi32(__mmask16 mask, const void* from) {
  return (__m512i)emulated_mask_loadu_ps(__m512{}, mask, from);
}
#define _mm512_maskz_loadu_epi32 emulated_maskz_loadu_epi32

static inline __m128 emulated_maskz_loadu_ps_128(__mmask8 mask, const void* from) {
  float x[4] = {};
  for (int i = 0; i < 4; ++i)
    if (emulated::has(mask, i)) std::memcpy(&x[i], static_cast<const char*>(from) + 4 * i, 4);
  return _mm_loadu_ps(x);
}
#define _mm_maskz_loadu_ps emulated_maskz_loadu_ps_128

static inline __m256i emulated_maskz_loadu_epi16_256(__mmask16 mask, const void* from) {
  std::uint16_t x[16] = {};
  for (int i = 0; i < 16; ++i)
    if (emulated::has(mask, i)) std::memcpy(&x[i], static_cast<const char*>(from) + 2 * i, 2);
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
}
#define _mm256_maskz_loadu_epi16 emulated_maskz_loadu_epi16_256

MOE_EMULATED_CALLED __m512i emulated_maskz_loadu_epi16(__mmask32 mask, const void* from) {
  emulated::Lanes<std::uint16_t> x{};
  for (int i = 0; i < 32; ++i)
    if (emulated::has(mask, i)) std::memcpy(&x.at[i], static_cast<const char*>(from) + 2 * i, 2);
  return emulated::as<__m512i>(x);
}
#define _mm512_maskz_loadu_epi16 emulated_maskz_loadu_epi16

static inline __m512i emulated_inserti64x4(__m512i x, __m256i half, int which) {
  std::memcpy(reinterpret_cast<char*>(&x) + 32 * which, &half, 32);
  return x;
}
#define _mm512_inserti64x4 emulated_inserti64x4

static inline __m512i emulated_castsi256_si512(__m256i low) { return emulated_inserti64x4(__m512i{}, low, 0); }
#define _mm512_castsi256_si512 emulated_castsi256_si512

MOE_EMULATED_CALLED void emulated_mask_storeu_ps(void* to, __mmask16 mask, __m512 x) {
  const auto lanes = emulated::as<emulated::Lanes<float>>(x);
  for (int i = 0; i < 16; ++i)
    if (emulated::has(mask, i)) std::memcpy(static_cast<char*>(to) + 4 * i, &lanes.at[i], 4);
}
#define _mm512_mask_storeu_ps emulated_mask_storeu_ps

// --- constants, casts ---

static inline __m512 emulated_setzero_ps() { return __m512{}; }
#define _mm512_setzero_ps emulated_setzero_ps

static inline __m512i emulated_setzero_si512() { return __m512i{}; }
#define _mm512_setzero_si512 emulated_setzero_si512

static inline __m512 emulated_set1_ps(float x) {
  return emulated::as<__m512>(emulated::Floats{_mm256_set1_ps(x), _mm256_set1_ps(x)});
}
#define _mm512_set1_ps emulated_set1_ps

static inline __m512i emulated_set1_epi32(int x) {
  return emulated::as<__m512i>(emulated::Integers{_mm256_set1_epi32(x), _mm256_set1_epi32(x)});
}
#define _mm512_set1_epi32 emulated_set1_epi32

static inline __m512i emulated_set1_epi16(short x) {
  return emulated::as<__m512i>(emulated::Integers{_mm256_set1_epi16(x), _mm256_set1_epi16(x)});
}
#define _mm512_set1_epi16 emulated_set1_epi16

// Arguments are in order from the last lane to the first.
template <class T, class... X>
static inline __m512i emulated_set(X... x) {
  static_assert(sizeof...(X) * sizeof(T) == 64, "one argument a lane");
  constexpr int last = sizeof...(X) - 1;
  const T given[] = {static_cast<T>(x)...};
  emulated::Lanes<T> y;
  for (int i = 0; i <= last; ++i) y.at[i] = given[last - i];
  return emulated::as<__m512i>(y);
}
#define _mm512_set_epi32 emulated_set<std::int32_t>
#define _mm512_set_epi16 emulated_set<std::int16_t>

static inline __m512 emulated_castps128_ps512(__m128 x) {
  __m512 y = emulated_set1_ps(__builtin_nanf(""));
  std::memcpy(&y, &x, 16);
  return y;
}
#define _mm512_castps128_ps512 emulated_castps128_ps512

// --- arithmetic ---

// Defines an instruction as the AVX2 instruction of the same name on both halves.
#define MOE_EMULATED_BINARY(NAME, V512, HALVES)                                                             \
  static inline V512 emulated_##NAME(V512 a, V512 b) {                                                      \
    const auto x = emulated::as<emulated::HALVES>(a), y = emulated::as<emulated::HALVES>(b);                \
    return emulated::as<V512>(emulated::HALVES{_mm256_##NAME(x.low, y.low), _mm256_##NAME(x.high, y.high)}); \
  }
MOE_EMULATED_BINARY(max_ps, __m512, Floats)
MOE_EMULATED_BINARY(min_ps, __m512, Floats)
MOE_EMULATED_BINARY(max_epi32, __m512i, Integers)
MOE_EMULATED_BINARY(madd_epi16, __m512i, Integers)
MOE_EMULATED_BINARY(maddubs_epi16, __m512i, Integers)
MOE_EMULATED_BINARY(add_epi16, __m512i, Integers)
MOE_EMULATED_BINARY(add_epi32, __m512i, Integers)
MOE_EMULATED_BINARY(unpacklo_epi32, __m512i, Integers)
MOE_EMULATED_BINARY(unpackhi_epi32, __m512i, Integers)
MOE_EMULATED_BINARY(unpacklo_epi64, __m512i, Integers)
MOE_EMULATED_BINARY(unpackhi_epi64, __m512i, Integers)
#undef MOE_EMULATED_BINARY
#define _mm512_max_ps emulated_max_ps
#define _mm512_min_ps emulated_min_ps
#define _mm512_max_epi32 emulated_max_epi32
#define _mm512_madd_epi16 emulated_madd_epi16
#define _mm512_maddubs_epi16 emulated_maddubs_epi16
#define _mm512_add_epi16 emulated_add_epi16
#define _mm512_unpacklo_epi32 emulated_unpacklo_epi32
#define _mm512_unpackhi_epi32 emulated_unpackhi_epi32
#define _mm512_unpacklo_epi64 emulated_unpacklo_epi64
#define _mm512_unpackhi_epi64 emulated_unpackhi_epi64

static inline __m512 emulated_fmadd_ps(__m512 a, __m512 b, __m512 c) {
  const auto x = emulated::as<emulated::Floats>(a), y = emulated::as<emulated::Floats>(b), z = emulated::as<emulated::Floats>(c);
  return emulated::as<__m512>(emulated::Floats{_mm256_fmadd_ps(x.low, y.low, z.low), _mm256_fmadd_ps(x.high, y.high, z.high)});
}
#define _mm512_fmadd_ps emulated_fmadd_ps

static inline __m512 emulated_sqrt_ps(__m512 x) {
  const auto h = emulated::as<emulated::Floats>(x);
  return emulated::as<__m512>(emulated::Floats{_mm256_sqrt_ps(h.low), _mm256_sqrt_ps(h.high)});
}
#define _mm512_sqrt_ps emulated_sqrt_ps

// Rounds to integers. The lower four bits of `control` mean the same as for VROUNDPS.
template <int control>
static inline __m512 emulated_roundscale_ps(__m512 x) {
  static_assert(control >= 0 && control < 16, "fraction bits are not emulated");
  const auto h = emulated::as<emulated::Floats>(x);
  return emulated::as<__m512>(emulated::Floats{_mm256_round_ps(h.low, control), _mm256_round_ps(h.high, control)});
}
#define _mm512_roundscale_ps(x, control) emulated_roundscale_ps<(control)>(x)

// x - round(x); +0 for infinities.
template <int control>
MOE_EMULATED_CALLED __m512 emulated_reduce_ps(__m512 x) {
  auto y = emulated::as<emulated::Lanes<float>>(x);
  const auto whole = emulated::as<emulated::Lanes<float>>(emulated_roundscale_ps<control>(x));
  for (float& lane : y.at) {
    const float rounded = whole.at[&lane - y.at];
    lane = __builtin_isinf(lane) ? 0.0f : lane - rounded;
  }
  return emulated::as<__m512>(y);
}
#define _mm512_reduce_ps(x, control) emulated_reduce_ps<(control)>(x)

// x * 2^floor(power), rounded once.
static inline float emulated_scalef(float x, float power) {
  constexpr float infinity = __builtin_inff();
  if (x != x) return power == infinity ? infinity : power == -infinity ? 0.0f : x;
  if (power != power) return power;
  if ((x == 0 && power == infinity) || (__builtin_isinf(x) && power == -infinity)) return __builtin_nanf("");
  // A factor of 2^300 takes even 2^-149 to infinity, and 2^-300 the largest number to zero. Up to these, doubles represent every product exactly.
  const float floor = __builtin_floorf(power), near = floor > 300 ? 300 : floor < -300 ? -300 : floor;
  const auto factor = emulated::as<double>((static_cast<std::uint64_t>(static_cast<int>(near)) + 1023) << 52);
  return static_cast<float>(static_cast<double>(x) * factor);
}
MOE_EMULATED_CALLED __m512 emulated_scalef_ps(__m512 x, __m512 powers) {
  auto y = emulated::as<emulated::Lanes<float>>(x);
  const auto p = emulated::as<emulated::Lanes<float>>(powers);
  for (int i = 0; i < 16; ++i) y.at[i] = emulated_scalef(y.at[i], p.at[i]);
  return emulated::as<__m512>(y);
}
#define _mm512_scalef_ps emulated_scalef_ps

// --- moves across lanes ---

template <int control>
static inline __m512 emulated_permute_ps(__m512 x) {
  const auto h = emulated::as<emulated::Floats>(x);
  return emulated::as<__m512>(emulated::Floats{_mm256_permute_ps(h.low, control), _mm256_permute_ps(h.high, control)});
}
#define _mm512_permute_ps(x, control) emulated_permute_ps<(control)>(x)

// Two quarters of a, then two of b; two bits of `control` select each.
static inline __m512i emulated_shuffle_i32x4(__m512i a, __m512i b, int control) {
  __m128i x[4], y[4];
  std::memcpy(x, &a, 64);
  std::memcpy(y, &b, 64);
  const __m128i z[4] = {x[control & 3], x[control >> 2 & 3], y[control >> 4 & 3], y[control >> 6 & 3]};
  __m512i result;
  std::memcpy(&result, z, 64);
  return result;
}
#define _mm512_shuffle_i32x4 emulated_shuffle_i32x4

MOE_EMULATED_CALLED __m512i emulated_permutexvar_epi16(__m512i order, __m512i x) {
  const auto from = emulated::as<emulated::Lanes<std::uint16_t>>(order), lanes = emulated::as<emulated::Lanes<std::uint16_t>>(x);
  emulated::Lanes<std::uint16_t> y;
  for (int i = 0; i < 32; ++i) y.at[i] = lanes.at[from.at[i] % 32];
  return emulated::as<__m512i>(y);
}
#define _mm512_permutexvar_epi16 emulated_permutexvar_epi16

MOE_EMULATED_CALLED __m512 emulated_permutexvar_ps(__m512i order, __m512 x) {
  const auto from = emulated::as<emulated::Lanes<std::uint32_t>>(order), lanes = emulated::as<emulated::Lanes<std::uint32_t>>(x);
  emulated::Lanes<std::uint32_t> y;
  for (int i = 0; i < 16; ++i) y.at[i] = lanes.at[from.at[i] % 16];
  return emulated::as<__m512>(y);
}
#define _mm512_permutexvar_ps emulated_permutexvar_ps

// The sign bits of the lanes.
static inline __mmask16 emulated_movepi32_mask(__m512i x) {
  const auto h = emulated::as<emulated::Floats>(x);
  return static_cast<__mmask16>(_mm256_movemask_ps(h.low) | _mm256_movemask_ps(h.high) << 8);
}
#define _mm512_movepi32_mask emulated_movepi32_mask

// These intrinsics are sequences of instructions. They reduce in GCC's order: halves first.
static inline __m128 emulated_upper(__m128 x) { return _mm_shuffle_ps(x, x, 0x4e); }

static inline float emulated_reduce_add_ps(__m512 x) {
  const auto h = emulated::as<emulated::Floats>(x);
  const __m256 y = _mm256_add_ps(h.high, h.low);
  const __m128 z = _mm_add_ps(_mm256_extractf128_ps(y, 1), _mm256_castps256_ps128(y));
  const __m128 pair = _mm_add_ps(z, emulated_upper(z));
  return pair[0] + pair[1];
}
#define _mm512_reduce_add_ps emulated_reduce_add_ps

static inline float emulated_reduce_max_ps(__m512 x) {
  const auto h = emulated::as<emulated::Floats>(x);
  const __m256 y = _mm256_max_ps(h.high, h.low);
  const __m128 z = _mm_max_ps(_mm256_extractf128_ps(y, 1), _mm256_castps256_ps128(y));
  const __m128 pair = _mm_max_ps(z, emulated_upper(z));
  return _mm_cvtss_f32(_mm_max_ps(pair, _mm_shuffle_ps(pair, pair, 1)));
}
#define _mm512_reduce_max_ps emulated_reduce_max_ps

static inline std::int32_t emulated_reduce_max_epi32(__m512i x) {
  const auto lanes = emulated::as<emulated::Lanes<std::int32_t>>(x);
  std::int32_t most = lanes.at[0];
  for (const std::int32_t lane : lanes.at) most = lane > most ? lane : most;
  return most;
}
#define _mm512_reduce_max_epi32 emulated_reduce_max_epi32

// --- VNNI ---

#if defined(__AVX512VNNI__)
static inline __m512i emulated_dpwssd_epi32(__m512i sums, __m512i a, __m512i b) {
  return emulated_add_epi32(sums, emulated_madd_epi16(a, b));
}
#define _mm512_dpwssd_epi32 emulated_dpwssd_epi32

// Products of unsigned bytes of a and signed bytes of b, four per lane. Each is below 2^15, so only the last addition can wrap around.
MOE_EMULATED_CALLED __m512i emulated_dpbusd_epi32(__m512i sums, __m512i a, __m512i b) {
  const auto x = emulated::as<emulated::Lanes<std::uint8_t>>(a);
  const auto y = emulated::as<emulated::Lanes<std::int8_t>>(b);
  emulated::Lanes<std::int32_t> products;
  for (int i = 0; i < 16; ++i) {
    products.at[i] = 0;
    for (int j = 4 * i; j < 4 * i + 4; ++j) products.at[i] += x.at[j] * y.at[j];
  }
  return emulated_add_epi32(sums, emulated::as<__m512i>(products));
}
#define _mm512_dpbusd_epi32 emulated_dpbusd_epi32
#endif

// --- BF16 ---

#if defined(__AVX512BF16__)
// Rounds to nearest even and flushes denormals to zero, regardless of MXCSR.
static inline std::uint16_t emulated_to_bf16(float x) {
  const auto bits = emulated::as<std::uint32_t>(x), magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return static_cast<std::uint16_t>(bits >> 16 | 0x40);
  if (magnitude < 0x00800000) return static_cast<std::uint16_t>(bits >> 16 & 0x8000);
  return static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
// The second operand is converted to the lower half.
MOE_EMULATED_CALLED __m512bh emulated_cvtne2ps_pbh(__m512 high, __m512 low) {
  const auto x = emulated::as<emulated::Lanes<float>>(low), y = emulated::as<emulated::Lanes<float>>(high);
  emulated::Lanes<std::uint16_t> z;
  for (int i = 0; i < 16; ++i) {
    z.at[i] = emulated_to_bf16(x.at[i]);
    z.at[i + 16] = emulated_to_bf16(y.at[i]);
  }
  return emulated::as<__m512bh>(z);
}
#define _mm512_cvtne2ps_pbh emulated_cvtne2ps_pbh

// For each lane the odd product is added first, then the even one, each with a fused multiply-add that rounds to nearest even, treats denormal operands as
// zero and flushes denormal results to zero, regardless of MXCSR. MXCSR is set for that and then reset to its default.
MOE_EMULATED_CALLED __m512 emulated_dpbf16_ps(__m512 sums, __m512bh a, __m512bh b) {
  const auto x = emulated::as<emulated::Integers>(a), y = emulated::as<emulated::Integers>(b);
  auto z = emulated::as<emulated::Floats>(sums);
  const __m256i odd = _mm256_set1_epi32(static_cast<int>(0xffff0000));
  const std::uint32_t flushing = 0x9fc0, usual = 0x1f80;
  asm("vldmxcsr %[flushing]\n\t"
      "vfmadd231ps %[odd_y_low], %[odd_x_low], %[low]\n\t"
      "vfmadd231ps %[odd_y_high], %[odd_x_high], %[high]\n\t"
      "vfmadd231ps %[y_low], %[x_low], %[low]\n\t"
      "vfmadd231ps %[y_high], %[x_high], %[high]\n\t"
      "vldmxcsr %[usual]"
      : [low] "+x"(z.low), [high] "+x"(z.high)
      : [odd_x_low] "x"(_mm256_and_si256(x.low, odd)), [odd_x_high] "x"(_mm256_and_si256(x.high, odd)),
        [odd_y_low] "x"(_mm256_and_si256(y.low, odd)), [odd_y_high] "x"(_mm256_and_si256(y.high, odd)),
        [x_low] "x"(_mm256_slli_epi32(x.low, 16)), [x_high] "x"(_mm256_slli_epi32(x.high, 16)),
        [y_low] "x"(_mm256_slli_epi32(y.low, 16)), [y_high] "x"(_mm256_slli_epi32(y.high, 16)), [flushing] "m"(flushing),
        [usual] "m"(usual));
  return emulated::as<__m512>(z);
}
#define _mm512_dpbf16_ps emulated_dpbf16_ps
#endif
