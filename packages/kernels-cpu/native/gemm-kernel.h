// Register-blocked microkernels. Included once per instruction set, inside its namespace.
//
// Legend: a packed A panel is [depth][kAWidth], of which the first 1 .. kMr of each row are used, or, if it keeps rows, [kMr][kPitch], of
// which the first `depth` of each row are used. A packed B panel is [depth][kNr], with zeros in columns past the end. For bf16 every
// element of a panel is a pair of bf16 that are adjacent along k (low half first), so the depth is ceil(k / 2). Arm's instruction
// multiplies four adjacent elements of two rows by those of two columns: there the pairs of two rows of a bf16 panel are adjacent,
// [depth / 2][width][2], and the depth is even. Rows are written in whole vectors, which may extend past the end: each A panel is
// followed by kSlack elements.
#pragma once

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12's own AVX-512 headers trip this one.
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "gemm.h"
#include "simd.h"

namespace moe {
namespace {

#if defined(__AVX512F__)
constexpr int kMr = 14, kAWidth = 16, kSlack = 0;
#elif defined(__aarch64__)
constexpr int kMr = 12, kAWidth = kMr, kSlack = 0;
#else
// The slack also keeps the panels of a group from sharing sets of the cache.
constexpr int kMr = 6, kAWidth = kMr, kSlack = 16;
#endif
// With AVX-512 a panel of A keeps rows contiguous along k, which avoids transposing them. Otherwise panels of A are read from L2.
#if defined(__AVX512F__)
constexpr bool kKeepsRows = true;
#else
constexpr bool kKeepsRows = false;
#endif
// An odd number of cache lines, so that rows do not share cache sets.
constexpr int kPitch = 400;
static_assert(kAWidth % lanes == 0 || kSlack >= lanes, "whole vectors need room");
constexpr int kNr = 2 * lanes;
#if defined(__AVX512F__)
constexpr int kStepsAtOnce = 2;
#else
constexpr int kStepsAtOnce = 4;
#endif
#if defined(MOE_BF16_PRODUCTS)
constexpr bool kHasBf16 = true;
#else
constexpr bool kHasBf16 = false;
#endif
// Adjacent pairs of a row or column in a bf16 panel.
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
constexpr int kPairs = 2;
#else
constexpr int kPairs = 1;
#endif

/** Depth of panels for `k` elements. */
constexpr std::ptrdiff_t depth_of(std::ptrdiff_t k, bool bf16) { return bf16 ? (k + 2 * kPairs - 1) / (2 * kPairs) * kPairs : k; }

template <bool kBf16>
inline f32v multiply_add(f32v acc, const float* a, f32v b) {
#if defined(MOE_BF16_PRODUCTS)
  if constexpr (kBf16) return dot_pairs(splat_pair(*a), b, acc);
#endif
  return fma(splat(*a), b, acc);
}

// `stream` writes whole aligned vectors, bypassing the caches.
enum class Output { set, add, stream };

inline void store_past_caches(float* to, f32v x) {
#if defined(__AVX512F__)
  _mm512_stream_ps(to, (__m512)x);
#elif defined(__AVX2__)
  _mm256_stream_ps(to, (__m256)x);
#else
  store(to, x);
#endif
}

/** Makes streamed stores visible before the task counts as done. */
inline void finish_stores_past_caches() {
#if defined(__AVX2__) || defined(__AVX512F__)
  _mm_sfence();
#endif
}

#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
/** The products of a block in bf16: every register holds two rows of A, two columns of B, or two by two elements of C. */
template <int kRows, int kVecs>
MOE_INLINE void multiply_by_twos(std::ptrdiff_t depth, const float* a, const float* b, const char* ahead, std::ptrdiff_t ahead_step, f32v (&c)[kRows][kVecs]) {
  constexpr int kDown = (kRows + 1) / 2, kAcross = 2 * kVecs;
  float32x4_t acc[kDown][kAcross] = {};
#pragma GCC unroll 2
  for (std::ptrdiff_t p = 0; p < depth; p += kPairs) {
    for (int i = 0; i < kPairs; ++i, ahead += ahead_step) __builtin_prefetch(ahead, 0, 2);
    bfloat16x8_t bv[kAcross];
#pragma GCC unroll 4
    for (int j = 0; j < kAcross; ++j) bv[j] = vreinterpretq_bf16_f32((float32x4_t)load(b + j * lanes));
#pragma GCC unroll 6
    for (int i = 0; i < kDown; ++i) {
      const bfloat16x8_t av = vreinterpretq_bf16_f32((float32x4_t)load(a + i * lanes));
#pragma GCC unroll 4
      for (int j = 0; j < kAcross; ++j) acc[i][j] = vbfmmlaq_f32(acc[i][j], av, bv[j]);
    }
    a += kPairs * kAWidth;
    b += kPairs * kNr;
  }
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kVecs; ++j) {
      const float64x2_t left = (float64x2_t)acc[i / 2][2 * j], right = (float64x2_t)acc[i / 2][2 * j + 1];
      c[i][j] = (f32v)(i % 2 == 0 ? vzip1q_f64(left, right) : vzip2q_f64(left, right));
    }
  }
}
#endif

/** The microkernel: kRows x kVecs vectors of C in registers. `kKept`: the panel of A keeps its rows. */
template <bool kBf16, bool kKept, int kRows, int kVecs>
void micro(std::ptrdiff_t depth, const float* a, const float* b, std::ptrdiff_t b_stride, float* c,
           std::ptrdiff_t ldc, Output output, const char* ahead, std::ptrdiff_t ahead_step) {
  f32v acc[kRows][kVecs] = {};
  if (output != Output::stream) {
#pragma GCC unroll 14
    for (int i = 0; i < kRows; ++i) __builtin_prefetch(c + i * ldc, 1), __builtin_prefetch(c + i * ldc + kVecs * lanes - 1, 1);
  }
  // `asks`: prefetch memory from `ahead` on. `packed`: b is a panel.
  const auto along_k = [&](auto asks, auto packed) {
#pragma GCC unroll kStepsAtOnce
    for (std::ptrdiff_t p = 0; p < depth; ++p) {
      f32v bv[kVecs];
      if constexpr (asks) {
        __builtin_prefetch(ahead, 0, 2);
        ahead += ahead_step;
      }
#pragma GCC unroll 2
      for (int j = 0; j < kVecs; ++j) bv[j] = load(b + j * lanes);
#if defined(__aarch64__)
      // Products use one lane of a register, so one load serves four rows.
      f32v av[(kRows + lanes - 1) / lanes];
#pragma GCC unroll 3
      for (int i = 0; i < kRows; i += lanes) av[i / lanes] = load(a + i);
#pragma GCC unroll 14
      for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
        for (int j = 0; j < kVecs; ++j) acc[i][j] = fma(splat(av[i / lanes][i % lanes]), bv[j], acc[i][j]);
      }
#else
#pragma GCC unroll 14
      for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
        for (int j = 0; j < kVecs; ++j) acc[i][j] = multiply_add<kBf16>(acc[i][j], a + i * (kKept ? kPitch : 1), bv[j]);
      }
#endif
      a += kKept ? 1 : kAWidth;
      b += packed ? kNr : b_stride;
    }
  };
  // If a step has few products, other instructions in it matter.
  using std::bool_constant;
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
  if constexpr (kBf16)
    multiply_by_twos(depth, a, b, ahead, ahead_step, acc);
  else
#endif
  if constexpr (kStepsAtOnce == 2)
    along_k(bool_constant<true>(), bool_constant<false>());
  else if (b_stride != kNr)
    along_k(bool_constant<true>(), bool_constant<false>());
  else if (ahead_step)
    along_k(bool_constant<true>(), bool_constant<true>());
  else
    along_k(bool_constant<false>(), bool_constant<true>());
  if (output == Output::add) {
#pragma GCC unroll 14
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < kVecs; ++j) store(c + i * ldc + j * lanes, load(c + i * ldc + j * lanes) + acc[i][j]);
  } else if (output == Output::stream) {
#pragma GCC unroll 14
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < kVecs; ++j) store_past_caches(c + i * ldc + j * lanes, acc[i][j]);
  } else {
#pragma GCC unroll 14
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < kVecs; ++j) store(c + i * ldc + j * lanes, acc[i][j]);
  }
}

using Micro = void (*)(std::ptrdiff_t, const float*, const float*, std::ptrdiff_t, float*, std::ptrdiff_t, Output,
                       const char*, std::ptrdiff_t);

template <bool kBf16, bool kKept, int kVecs, std::size_t... kHeights>
inline Micro pick(int height, std::index_sequence<kHeights...>) {
  static constexpr Micro table[] = {micro<kBf16, kKept, int(kHeights) + 1, kVecs>...};
  return table[height - 1];
}

template <bool kBf16, bool kKept>
inline Micro micro_of(int height, int width) {
  constexpr auto heights = std::make_index_sequence<kMr>();
  return width > lanes ? pick<kBf16, kKept, 2>(height, heights) : pick<kBf16, kKept, 1>(height, heights);
}

}  // namespace
}  // namespace moe
