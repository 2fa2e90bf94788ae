// Small matrix products on tiles that are in the caches: a block of C is accumulated in registers, A is broadcast, B is read as vectors.
//
// An element of A and B is 32 bits wide: one f32, or two bf16 that are adjacent along the reduction (`pack` values).
#pragma once

#include "moe.h"

namespace moe {

struct F32Product {
  static constexpr int pack = 1;
  MOE_INLINE f32v splat_of(float a) {
#if defined(__AVX512F__)
    return (f32v)_mm512_set1_ps(a);
#elif defined(__AVX2__)
    return (f32v)_mm256_set1_ps(a);
#else
    return f32v{a, a, a, a};
#endif
  }
  MOE_INLINE f32v multiply_add(f32v a, f32v b, f32v c) { return fma(a, b, c); }
};

#if defined(MOE_BF16_PRODUCTS)
struct Bf16Product {
  static constexpr int pack = 2;
  MOE_INLINE auto splat_of(float a) { return splat_pair(a); }
  template <class Pair>
  MOE_INLINE f32v multiply_add(Pair a, f32v b, f32v c) { return dot_pairs(a, b, c); }
};
#endif

namespace detail {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int tall = 12, tall_of_three = 8;  // 32 registers
#else
constexpr int tall = 6, tall_of_three = 4;  // 16 registers
#endif

// Micro-kernel: C[i][j] (+)= sum over r of A(i, r) * B[r * ldb + j], `Rows` by `Vectors * lanes`; A(i, r) = Column ? A[r * lda + i] : A[i * lda + r].
template <class Op, int Rows, int Vectors, bool Column, bool Add>
static inline __attribute__((always_inline)) void tile(const float* A, int64_t lda, const float* B, int64_t ldb, int64_t R, float* C,
                                                        int64_t ldc) {
  f32v c[Rows][Vectors];
#pragma GCC unroll 16
  for (int i = 0; i < Rows; i++)
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; j++) c[i][j] = Add ? load(C + i * ldc + j * lanes) : zero();
  if constexpr (Column) {
    for (int64_t r = 0; r < R; r++, A += lda, B += ldb) {
      f32v b[Vectors];
#pragma GCC unroll 4
      for (int j = 0; j < Vectors; j++) b[j] = load(B + j * lanes);
#pragma GCC unroll 16
      for (int i = 0; i < Rows; i++) {
        const auto a = Op::splat_of(A[i]);
#pragma GCC unroll 4
        for (int j = 0; j < Vectors; j++) c[i][j] = Op::multiply_add(a, b[j], c[i][j]);
      }
    }
  } else {
    // One pointer for three rows: x86 addresses p, p + lda and p + 2 lda without extra instructions, so that all pointers fit into registers.
    constexpr int pointers = (Rows + 2) / 3;
    const float* p[pointers];
#pragma GCC unroll 16
    for (int i = 0; i < pointers; i++) {
      p[i] = A + 3 * i * lda;
      asm("" : "+r"(p[i]));
    }
    for (int64_t r = 0; r < R; r++, B += ldb) {
      f32v b[Vectors];
#pragma GCC unroll 4
      for (int j = 0; j < Vectors; j++) b[j] = load(B + j * lanes);
#pragma GCC unroll 16
      for (int i = 0; i < Rows; i++) {
        const auto a = Op::splat_of(p[i / 3][(i % 3) * lda]);
#pragma GCC unroll 4
        for (int j = 0; j < Vectors; j++) c[i][j] = Op::multiply_add(a, b[j], c[i][j]);
      }
#pragma GCC unroll 16
      for (int i = 0; i < pointers; i++) p[i]++;
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < Rows; i++)
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; j++) store(C + i * ldc + j * lanes, c[i][j]);
}

template <class Op, int Vectors, bool Column, bool Add>
__attribute__((noinline)) static void panel(int64_t m, const float* A, int64_t lda, const float* B, int64_t ldb, int64_t R, float* C,
                                            int64_t ldc) {
  constexpr int most = Vectors == 3 ? tall_of_three : tall;
  const int64_t step = Column ? 1 : lda;
  int64_t i = 0;
  for (; i + most <= m; i += most) tile<Op, most, Vectors, Column, Add>(A + i * step, lda, B, ldb, R, C + i * ldc, ldc);
  if constexpr (most > 8)
    for (; i + 8 <= m; i += 8) tile<Op, 8, Vectors, Column, Add>(A + i * step, lda, B, ldb, R, C + i * ldc, ldc);
  if constexpr (most > 4)
    for (; i + 4 <= m; i += 4) tile<Op, 4, Vectors, Column, Add>(A + i * step, lda, B, ldb, R, C + i * ldc, ldc);
  for (; i + 2 <= m; i += 2) tile<Op, 2, Vectors, Column, Add>(A + i * step, lda, B, ldb, R, C + i * ldc, ldc);
  for (; i < m; i++) tile<Op, 1, Vectors, Column, Add>(A + i * step, lda, B, ldb, R, C + i * ldc, ldc);
}

}  // namespace detail

// The product of m rows of A and `vectors` vectors of columns of B; see detail::tile.
template <class Op, bool Column, bool Add>
MOE_INLINE void small_product(int64_t m, int64_t vectors, const float* A, int64_t lda, const float* B, int64_t ldb, int64_t R, float* C,
                              int64_t ldc) {
  for (int64_t j = 0; j < vectors;) {
    const int64_t left = vectors - j;
    const int take = left == 1 ? 1 : left % 3 == 0 || left == 5 ? 3 : 2;
    const float* b = B + j * lanes;
    float* c = C + j * lanes;
    if (take == 3) {
      detail::panel<Op, 3, Column, Add>(m, A, lda, b, ldb, R, c, ldc);
    } else if (take == 2) {
      detail::panel<Op, 2, Column, Add>(m, A, lda, b, ldb, R, c, ldc);
    } else {
      detail::panel<Op, 1, Column, Add>(m, A, lda, b, ldb, R, c, ldc);
    }
    j += take;
  }
}

namespace detail {

template <int Distance>
MOE_INLINE void exchange(f32v* row) {
  i32v first, second;
#pragma GCC unroll 16
  for (int l = 0; l < lanes; l++) {
    first[l] = l & Distance ? lanes + (l ^ Distance) : l;
    second[l] = l & Distance ? lanes + l : (l ^ Distance);
  }
#pragma GCC unroll 16
  for (int i = 0; i < lanes; i++) {
    if (i & Distance) continue;
    const f32v a = row[i], b = row[i + Distance];
#if defined(__clang__)
    f32v x, y;
    for (int l = 0; l < lanes; l++) {
      x[l] = l & Distance ? b[l ^ Distance] : a[l];
      y[l] = l & Distance ? b[l] : a[l ^ Distance];
    }
    row[i] = x;
    row[i + Distance] = y;
#else
    row[i] = __builtin_shuffle(a, b, first);
    row[i + Distance] = __builtin_shuffle(a, b, second);
#endif
  }
}

}  // namespace detail

// Transposes `lanes` vectors in place.
MOE_INLINE void transpose_square(f32v* row) {
  if constexpr (lanes >= 16) detail::exchange<8>(row);
  if constexpr (lanes >= 8) detail::exchange<4>(row);
  detail::exchange<2>(row);
  detail::exchange<1>(row);
}

// 2^x to 1 unit in the last place for x <= 127 or so; below -125 the result may be 0; NaN stays NaN.
MOE_INLINE f32v exp2_small(f32v x) {
#if defined(__AVX512F__)
  const f32v f = (f32v)_mm512_reduce_ps((__m512)x, 8);  // x - round(x), 0 for infinities
  const f32v n = x - f;
#else
  const i32v tiny = x < splat(-125.0f);
  const f32v clamped = select(tiny, splat(-125.0f), x);
  const f32v shifted = clamped + splat(12582912.0f);
  const f32v f = clamped - (shifted - splat(12582912.0f));
#endif
  f32v p = splat(1.535336188319500e-4f);
  p = fma(p, f, splat(1.339887440266574e-3f));
  p = fma(p, f, splat(9.618437357674640e-3f));
  p = fma(p, f, splat(5.550332471162809e-2f));
  p = fma(p, f, splat(2.402264791363012e-1f));
  p = fma(p, f, splat(6.931472028550421e-1f));
  p = fma(p, f, splat(1.0f));
#if defined(__AVX512F__)
  return (f32v)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  const f32v power = from_bits((bits(shifted) << 23) + (127 << 23));
  return from_bits(~tiny & bits(p * power));
#endif
}

}  // namespace moe
