// Products with few rows: dot products along k that read B directly.
#pragma once

#include <cstddef>

#include "gemm-packing.h"

namespace moe {
namespace {

constexpr int kFewRows = 4;
/** Maximum length of a piece of k; the packed rows then take as much memory as other A panels. */
constexpr std::ptrdiff_t kDotLength = 4096;

/** Number of elements along k that one vector holds. */
template <bool kBf16>
constexpr std::ptrdiff_t kDotStep = kBf16 ? 2 * lanes : lanes;

template <bool kBf16, class T>
inline f32v load_dot(const T* p, std::ptrdiff_t left) {
#if defined(__AVX512F__)
  return left >= kDotStep<kBf16> ? (f32v)load_row<kBf16, false>(p, left) : (f32v)load_row<kBf16, true>(p, left);
#elif defined(MOE_BF16_PRODUCTS)
  if constexpr (kBf16)
    return load_two(p, p + lanes, left, left - lanes);
  else
    return load_some(p, left < lanes ? int(left) : lanes);
#else
  return load_some(p, left < lanes ? int(left) : lanes);
#endif
}

/** Row `row` of A from k0 on, as vectors for dot(). */
template <bool kBf16>
void pack_dot_row(const GemmOperand& a, std::ptrdiff_t row, std::ptrdiff_t k0, std::ptrdiff_t k, float* dst) {
  const float* src = a.data + row * a.lane_stride + k0 * a.k_stride;
  for (std::ptrdiff_t p = 0; p < k; p += kDotStep<kBf16>, dst += lanes) {
    if (a.k_stride == 1) {
      store(dst, load_dot<kBf16>(src + p, k - p));
    } else {
      float gathered[kDotStep<kBf16>] = {};
      for (std::ptrdiff_t i = 0; i < kDotStep<kBf16> && p + i < k; ++i) gathered[i] = src[(p + i) * a.k_stride];
      store(dst, load_dot<kBf16>(gathered, kDotStep<kBf16>));
    }
  }
}

template <bool kBf16>
inline f32v dot_step(f32v acc, f32v a, f32v b) {
#if defined(MOE_BF16_PRODUCTS)
  if constexpr (kBf16) return dot_pairs(a, b, acc);
#endif
  return fma(a, b, acc);
}

/** C[kRows, kColumns] (+)= rows of A (packed, a_stride apart) times columns of B that are contiguous along k. */
template <bool kBf16, int kRows, int kColumns, class T>
void dot(std::ptrdiff_t k, const float* a, std::ptrdiff_t a_stride, const T* b, std::ptrdiff_t b_stride, float* c, std::ptrdiff_t ldc,
         bool accumulate) {
  f32v acc[kRows][kColumns] = {};
  for (std::ptrdiff_t p = 0; p < k; p += kDotStep<kBf16>, a += lanes) {
    f32v av[kRows];
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) av[i] = load(a + i * a_stride);
#pragma GCC unroll 8
    for (int j = 0; j < kColumns; ++j) {
      const T* from = b + j * b_stride + p;
      __builtin_prefetch(from + kColumns * b_stride);
      const f32v bv = load_dot<kBf16>(from, k - p);
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) acc[i][j] = dot_step<kBf16>(acc[i][j], av[i], bv);
    }
  }
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kColumns; ++j) c[i * ldc + j] = sum(acc[i][j]) + (accumulate ? c[i * ldc + j] : 0.0f);
}

template <bool kBf16, int kRows, class T>
void dot_columns(std::ptrdiff_t k, const float* a, std::ptrdiff_t a_stride, const T* b, std::ptrdiff_t b_stride, float* c,
                 std::ptrdiff_t ldc, std::ptrdiff_t columns, bool accumulate) {
  constexpr int wide = kRows == 1 ? 8 : 4;
  std::ptrdiff_t j = 0;
  for (; j + wide <= columns; j += wide) dot<kBf16, kRows, wide>(k, a, a_stride, b + j * b_stride, b_stride, c + j, ldc, accumulate);
  for (; j < columns; ++j) dot<kBf16, kRows, 1>(k, a, a_stride, b + j * b_stride, b_stride, c + j, ldc, accumulate);
}

}  // namespace
}  // namespace moe
