// Vectors of the width that this variant of the library is compiled for: `f32v` and `i32v` with `lanes` elements each.
//
// They are GCC/Clang vector types: + - * / and comparisons work on them (a comparison gives an i32v of 0 and -1). Everything is static,
// because the same names mean other widths in other variants. Use partial loads and stores for tails rather than scalar loops, so that an
// element's bits do not depend on where a tail begins.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
#define MOE_LANES 16
#elif defined(__AVX2__)
#define MOE_LANES 8
#else
#define MOE_LANES 4
#endif

#define MOE_INLINE static inline __attribute__((always_inline, unused))

namespace moe {

constexpr int lanes = MOE_LANES;

typedef float f32v __attribute__((vector_size(MOE_LANES * 4)));
typedef int32_t i32v __attribute__((vector_size(MOE_LANES * 4)));
typedef uint32_t u32v __attribute__((vector_size(MOE_LANES * 4)));
typedef uint16_t u16v __attribute__((vector_size(MOE_LANES * 2)));
typedef uint8_t u8v __attribute__((vector_size(MOE_LANES)));
typedef float f32v_unaligned __attribute__((vector_size(MOE_LANES * 4), aligned(4), may_alias));
typedef int32_t i32v_unaligned __attribute__((vector_size(MOE_LANES * 4), aligned(4), may_alias));
typedef uint16_t u16v_unaligned __attribute__((vector_size(MOE_LANES * 2), aligned(2), may_alias));
typedef uint8_t u8v_unaligned __attribute__((vector_size(MOE_LANES), aligned(1), may_alias));

// --- loads, stores, splats ---

MOE_INLINE f32v load(const float* from) { return *reinterpret_cast<const f32v_unaligned*>(from); }
MOE_INLINE void store(float* to, f32v x) { *reinterpret_cast<f32v_unaligned*>(to) = x; }
MOE_INLINE i32v load(const int32_t* from) { return *reinterpret_cast<const i32v_unaligned*>(from); }
MOE_INLINE void store(int32_t* to, i32v x) { *reinterpret_cast<i32v_unaligned*>(to) = x; }
// By subtraction, which the compiler removes; an addition of zero would turn -0 into 0 and therefore stays in the code.
MOE_INLINE f32v splat(float x) { return x - f32v{}; }
MOE_INLINE i32v splat(int32_t x) { return i32v{} + x; }
MOE_INLINE f32v zero() { return f32v{}; }
// The first `count` (0 .. lanes) elements; the other lanes get `fill`. Does not access memory after them.
MOE_INLINE f32v load_partial(const float* from, int count, float fill = 0) {
#if defined(__AVX512F__)
  return (f32v)_mm512_mask_loadu_ps((__m512)splat(fill), static_cast<__mmask16>((1u << count) - 1), from);
#else
  f32v x = splat(fill);
  std::memcpy(&x, from, static_cast<size_t>(count) * 4);
  return x;
#endif
}
MOE_INLINE void store_partial(float* to, f32v x, int count) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << count) - 1), (__m512)x);
#else
  std::memcpy(to, &x, static_cast<size_t>(count) * 4);
#endif
}
MOE_INLINE i32v load_partial(const int32_t* from, int count, int32_t fill = 0) {
  i32v x = splat(fill);
  std::memcpy(&x, from, static_cast<size_t>(count) * 4);
  return x;
}
MOE_INLINE void store_partial(int32_t* to, i32v x, int count) { std::memcpy(to, &x, static_cast<size_t>(count) * 4); }

// --- bits, selection, conversion ---

MOE_INLINE i32v bits(f32v x) { return (i32v)x; }
MOE_INLINE f32v from_bits(i32v x) { return (f32v)x; }
// Lanes of the mask are 0 or -1.
MOE_INLINE f32v select(i32v mask, f32v yes, f32v no) { return (f32v)((mask & (i32v)yes) | (~mask & (i32v)no)); }
MOE_INLINE i32v select(i32v mask, i32v yes, i32v no) { return (mask & yes) | (~mask & no); }
MOE_INLINE f32v to_f32(i32v x) { return __builtin_convertvector(x, f32v); }
// Truncates; the values must be in range.
MOE_INLINE i32v to_i32(f32v x) { return __builtin_convertvector(x, i32v); }

// Bit i: whether lane i of a mask is set.
MOE_INLINE uint32_t set_lanes(i32v mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)mask);
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps((__m256)mask));
#elif defined(__x86_64__)
  return static_cast<uint32_t>(_mm_movemask_ps((__m128)mask));
#else
  uint32_t found = 0;
  for (int i = 0; i < lanes; i++) found |= static_cast<uint32_t>(mask[i] & 1) << i;
  return found;
#endif
}

MOE_INLINE bool any(i32v mask) {
#if defined(__aarch64__)
  return vmaxvq_u32((uint32x4_t)mask) != 0;
#else
  return set_lanes(mask) != 0;
#endif
}

// --- arithmetic ---

MOE_INLINE f32v fma(f32v a, f32v b, f32v c) {
#if defined(__AVX512F__)
  return (f32v)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (f32v)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (f32v)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}
// c - a * b
MOE_INLINE f32v fnma(f32v a, f32v b, f32v c) { return fma(-a, b, c); }

// If one operand is NaN: the second on x86, NaN on Arm. Do not rely on either.
MOE_INLINE f32v fast_max(f32v a, f32v b) {
#if defined(__AVX512F__)
  return (f32v)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (f32v)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__x86_64__)
  return (f32v)_mm_max_ps((__m128)a, (__m128)b);
#elif defined(__aarch64__)
  return (f32v)vmaxq_f32((float32x4_t)a, (float32x4_t)b);
#else
  return select(a > b, a, b);
#endif
}
MOE_INLINE f32v fast_min(f32v a, f32v b) {
#if defined(__AVX512F__)
  return (f32v)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (f32v)_mm256_min_ps((__m256)a, (__m256)b);
#elif defined(__x86_64__)
  return (f32v)_mm_min_ps((__m128)a, (__m128)b);
#elif defined(__aarch64__)
  return (f32v)vminq_f32((float32x4_t)a, (float32x4_t)b);
#else
  return select(a < b, a, b);
#endif
}
// NaN if either operand is NaN.
MOE_INLINE f32v nan_max(f32v a, f32v b) { return select(a != a, a, fast_max(a, b)); }
MOE_INLINE f32v nan_min(f32v a, f32v b) { return select(a != a, a, fast_min(a, b)); }

MOE_INLINE f32v sqrt(f32v x) {
#if defined(__AVX512F__)
  return (f32v)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
  return (f32v)_mm256_sqrt_ps((__m256)x);
#elif defined(__x86_64__)
  return (f32v)_mm_sqrt_ps((__m128)x);
#elif defined(__aarch64__)
  return (f32v)vsqrtq_f32((float32x4_t)x);
#else
  for (int i = 0; i < lanes; i++) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}
MOE_INLINE f32v abs(f32v x) { return from_bits(bits(x) & 0x7fffffff); }
// To the nearest integer, ties to even, for |x| < 2^22.
MOE_INLINE f32v round_small(f32v x) { return (x + splat(12582912.0f)) - splat(12582912.0f); }
MOE_INLINE f32v floor(f32v x) {
#if defined(__AVX512F__)
  return (f32v)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  return (f32v)_mm256_floor_ps((__m256)x);
#elif defined(__aarch64__)
  return (f32v)vrndmq_f32((float32x4_t)x);
#else
  for (int i = 0; i < lanes; i++) x[i] = __builtin_floorf(x[i]);
  return x;
#endif
}

// --- across lanes, always in the same order within one variant ---

MOE_INLINE float sum(f32v x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#elif defined(__x86_64__)
#if defined(__AVX2__)
  __m128 y = _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
#else
  __m128 y = (__m128)x;
#endif
  y = _mm_add_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_add_ss(y, _mm_shuffle_ps(y, y, 1)));
#elif defined(__aarch64__)
  return vaddvq_f32((float32x4_t)x);
#else
  return (x[0] + x[2]) + (x[1] + x[3]);
#endif
}

// The largest lane; NaN lanes may or may not be ignored.
MOE_INLINE float max(f32v x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)x);
#elif defined(__x86_64__)
#if defined(__AVX2__)
  __m128 y = _mm_max_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
#else
  __m128 y = (__m128)x;
#endif
  y = _mm_max_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_max_ss(y, _mm_shuffle_ps(y, y, 1)));
#elif defined(__aarch64__)
  return vmaxvq_f32((float32x4_t)x);
#else
  float best = x[0];
  for (int i = 1; i < lanes; i++) best = x[i] > best ? x[i] : best;
  return best;
#endif
}

// --- bf16 ---

// Rounds to nearest even; NaN stays NaN.
MOE_INLINE u16v to_bf16(f32v x) {
  const u32v b = (u32v)x;
  const u32v rounded = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
  const u32v quiet = (b >> 16) | 0x40;
  const i32v is_nan = x != x;
  return __builtin_convertvector(((u32v)is_nan & quiet) | (~(u32v)is_nan & rounded), u16v);
}
MOE_INLINE f32v from_bf16(u16v x) { return (f32v)(__builtin_convertvector(x, u32v) << 16); }
MOE_INLINE u16v load(const uint16_t* from) { return *reinterpret_cast<const u16v_unaligned*>(from); }
MOE_INLINE void store(uint16_t* to, u16v x) { *reinterpret_cast<u16v_unaligned*>(to) = x; }

#if defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
// bf16 products: a 32-bit lane holds a pair of bf16, the first in its lower half. Conversions to bf16 round to nearest even.
#define MOE_BF16_PRODUCTS 1

// c + a * b for both elements of each pair. On Arm both products, their sum, and c plus that are rounded to odd, with an error below one unit in the last place;
// x86 rounds to nearest. Denormals are treated as zeros on both.
MOE_INLINE f32v dot_pairs(f32v a, f32v b, f32v c) {
#if defined(__x86_64__)
  return (f32v)_mm512_dpbf16_ps((__m512)c, (__m512bh)(__m512)a, (__m512bh)(__m512)b);
#else
  return (f32v)vbfdotq_f32((float32x4_t)c, vreinterpretq_bf16_f32((float32x4_t)a), vreinterpretq_bf16_f32((float32x4_t)b));
#endif
}
// One pair, broadcast to all lanes, as the first operand of dot_pairs.
#if defined(__x86_64__)
MOE_INLINE f32v splat_pair(float pair) {
  f32v x = (f32v)_mm512_set1_ps(pair);
#if defined(__clang__) && __clang_major__ < 18
  asm("" : "+v"(x));  // Older Clang cannot compile a bf16 product with a broadcast operand.
#endif
  return x;
}
#else
MOE_INLINE float32x2_t splat_pair(float pair) { return float32x2_t{pair, 0}; }
MOE_INLINE f32v dot_pairs(float32x2_t a, f32v b, f32v c) {
  asm("bfdot %0.4s, %1.8h, %2.2h[0]" : "+w"(c) : "w"(b), "w"(a));  // Inline assembly, because Clang would broadcast the pair to a register first.
  return c;
}
#endif
// Pairs of adjacent elements: `first` and `second` are 2 * lanes consecutive ones.
MOE_INLINE f32v pair_neighbours(f32v first, f32v second) {
#if defined(__x86_64__)
  return (f32v)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
#else
  return (f32v)vreinterpretq_f32_bf16(vcvtq_high_bf16_f32(vcvtq_low_bf16_f32((float32x4_t)first), (float32x4_t)second));
#endif
}
// Lane i: (low[i], high[i]).
MOE_INLINE f32v pair_lanes(f32v low, f32v high) {
#if defined(__x86_64__)
  const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4,
                                              19, 3, 18, 2, 17, 1, 16, 0);
  return (f32v)_mm512_permutexvar_epi16(interleave, (__m512i)pair_neighbours(low, high));
#else
  const auto rounded = [](f32v x) { return vreinterpretq_u16_bf16(vcvtq_low_bf16_f32((float32x4_t)x)); };
  return (f32v)vzip1q_u16(rounded(low), rounded(high));
#endif
}
#endif

// Calls body(i, count) for 0 .. n in steps of `lanes`; count == lanes except for the last. Keep the body small: it is inlined twice, once with a
// constant count, so that `count == lanes` folds.
template <class F>
__attribute__((always_inline)) inline void each_vector(int64_t n, F&& body) {
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) body(i, lanes);
  if (i < n) body(i, static_cast<int>(n - i));
}
MOE_INLINE f32v load_some(const float* from, int count, float fill = 0) {
  return count == lanes ? load(from) : load_partial(from, count, fill);
}
MOE_INLINE void store_some(float* to, f32v x, int count) { count == lanes ? store(to, x) : store_partial(to, x, count); }
MOE_INLINE i32v load_some(const int32_t* from, int count, int32_t fill = 0) {
  return count == lanes ? load(from) : load_partial(from, count, fill);
}
MOE_INLINE void store_some(int32_t* to, i32v x, int count) { count == lanes ? store(to, x) : store_partial(to, x, count); }
MOE_INLINE u16v load_some(const uint16_t* from, int count) {
  if (count == lanes) return load(from);
  u16v x{};
  std::memcpy(&x, from, static_cast<size_t>(count) * 2);
  return x;
}
MOE_INLINE void store_some(uint16_t* to, u16v x, int count) {
  if (count == lanes) return store(to, x);
  std::memcpy(to, &x, static_cast<size_t>(count) * 2);
}

}  // namespace moe
