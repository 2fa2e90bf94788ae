// Packing for the microkernels: writes the panels of gemm-kernel.h for both operands, transposed, padded and rounded to bf16 as needed.
#pragma once

#include <cstddef>
#include <cstring>

#include "gemm-kernel.h"

namespace moe {
namespace {

/** Adjacent panels: lanes start[q] .. start[q + 1] go to the panel that is q * stride elements after the first. */
#if defined(__AVX512F__)
constexpr int kMostPanels = 4;
#else
constexpr int kMostPanels = 16;
#endif
struct Panels {
  int count;
  std::ptrdiff_t start[kMostPanels + 1];
  std::ptrdiff_t stride;
};

#if defined(__AVX512F__)
/** In-place transpose of 16 x 16 32-bit elements. */
inline void transpose(__m512i (&r)[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

inline __mmask16 first(std::ptrdiff_t n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : __mmask16((1u << n) - 1); }

/** Loads 16 panel elements of a row, from `p` on: 16 floats, or 16 pairs of bf16, rounded to nearest even if necessary; zeros past `left`. */
template <bool kBf16, bool kMasked>
inline __m512i load_row(const float* p, std::ptrdiff_t left) {
#if defined(__AVX512BF16__)
  if constexpr (kBf16) {
    const __m512 low = kMasked ? _mm512_maskz_loadu_ps(first(left), p) : _mm512_loadu_ps(p);
    const __m512 high = kMasked ? _mm512_maskz_loadu_ps(first(left - 16), p + 16) : _mm512_loadu_ps(p + 16);
    return (__m512i)_mm512_cvtne2ps_pbh(high, low);
  }
#endif
  return kMasked ? _mm512_maskz_loadu_epi32(first(left), p) : _mm512_loadu_si512(p);
}

#if defined(__AVX512BF16__)
template <bool kBf16, bool kMasked>
inline __m512i load_row(const Bf16* p, std::ptrdiff_t left) {
  static_assert(kBf16, "numbers in bf16 are multiplied as such");
  if (!kMasked || left >= 32) return _mm512_loadu_si512(p);
  return _mm512_maskz_loadu_epi16(left <= 0 ? 0 : (__mmask32(1) << left) - 1, p);
}
#endif

/** Prefetches the cache lines of the `elements` elements from `p` on. */
template <class T>
inline void ask_for(const T* p, int elements) {
  for (int i = 0; i < elements; i += int(64 / sizeof(T))) _mm_prefetch(reinterpret_cast<const char*>(p + i), _MM_HINT_T1);
}

template <bool kBf16, bool kMasked, class T>
inline void pack_block(const T* src, std::ptrdiff_t stride, int rows, std::ptrdiff_t left, int depth, int width, float* dst) {
  __m512i r[16];
  if (!kMasked) {
    // The next rows: the hardware does not prefetch this many streams.
    const T* ahead = src + rows * stride;
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) ask_for(ahead + i * stride, kBf16 ? 32 : 16);
  }
  if (rows == 16) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) r[i] = load_row<kBf16, kMasked>(src + i * stride, left);
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) r[i] = i < rows ? load_row<kBf16, kMasked>(src + i * stride, left) : _mm512_setzero_si512();
  }
  transpose(r);
#pragma GCC unroll 16
  for (int t = 0; t < 16; ++t)
    if (!kMasked || t < depth) _mm512_storeu_si512(dst + t * width, r[t]);
}

/** Rows that are contiguous along k become lanes of one panel. */
template <bool kBf16, int kWidth, class T>
void pack_transposed(const T* src, std::ptrdiff_t stride, int count, std::ptrdiff_t k, float* dst) {
  constexpr int step = kBf16 ? 32 : 16;
  for (int lane = 0; lane < kWidth; lane += 16) {
    const int rows = count - lane < 16 ? count - lane : 16;
    const T* from = src + lane * stride;
    float* to = dst + lane;
    std::ptrdiff_t p = 0;
    for (; p + step <= k; p += step, to += 16 * kWidth) pack_block<kBf16, false>(from + p, stride, rows, 0, 16, kWidth, to);
    if (p < k) pack_block<kBf16, true>(from + p, stride, rows, k - p, int(kBf16 ? (k - p + 1) / 2 : k - p), kWidth, to);
  }
}

/** Rows that are contiguous along k stay rows, kPitch apart. */
template <bool kBf16>
void pack_rows(const float* src, std::ptrdiff_t stride, int count, std::ptrdiff_t k, float* dst) {
  constexpr int step = kBf16 ? 32 : 16, rows_ahead = 4;
  for (int i = 0; i < count; ++i, src += stride, dst += kPitch) {
    const float* ahead = src + rows_ahead * stride;
    std::ptrdiff_t p = 0;
    float* to = dst;
    for (; p + step <= k; p += step, to += 16) {
      ask_for(ahead + p, step);
      _mm512_storeu_si512(to, load_row<kBf16, false>(src + p, 0));
    }
    if (p < k) _mm512_storeu_si512(to, load_row<kBf16, true>(src + p, k - p));
  }
}

#if defined(__AVX512BF16__)
/** Adjacent pairs of one column. */
inline __m512i interleave(__m512i even_then_odd) {
  alignas(64) static const std::uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(order), even_then_odd);
}
inline __m512i interleave_bf16(__m512 even, __m512 odd) { return interleave((__m512i)_mm512_cvtne2ps_pbh(odd, even)); }
inline __m512i interleave_bf16(__m256i even, __m256i odd) { return interleave(_mm512_inserti64x4(_mm512_castsi256_si512(even), odd, 1)); }
#endif

template <bool kFull>
inline __m512 load_lanes(const float* p, __mmask16 mask) {
  return kFull ? _mm512_loadu_ps(p) : _mm512_maskz_loadu_ps(mask, p);
}
#if defined(__AVX512BF16__)
template <bool kFull>
inline __m256i load_lanes(const Bf16* p, __mmask16 mask) {
  return kFull ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)) : _mm256_maskz_loadu_epi16(mask, p);
}
#endif

/** Lanes that are contiguous in memory stay lanes. Processes several panels at once, so that runs of memory are long. */
template <bool kBf16, int kWidth, int kCount, bool kFull, class T>
void pack_side_by_side(const T* src, std::ptrdiff_t stride, const Panels& panels, std::ptrdiff_t k, float* dst) {
  constexpr int vectors = kWidth / 16;
  __mmask16 mask[kCount][vectors];
  const T* from[kCount];
  for (int q = 0; q < kCount; ++q) {
    from[q] = src + panels.start[q];
    for (int v = 0; v < vectors; ++v) mask[q][v] = first(panels.start[q + 1] - panels.start[q] - 16 * v);
  }
  const auto row_at = [&](int q, int v, std::ptrdiff_t row) { return load_lanes<kFull>(from[q] + row * stride + 16 * v, mask[q][v]); };
  if constexpr (kBf16) {
    std::ptrdiff_t p = 0;
    for (; p + 2 <= k; p += 2, dst += kWidth) {
#pragma GCC unroll 4
      for (int q = 0; q < kCount; ++q)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; ++v)
          _mm512_storeu_si512(dst + q * panels.stride + 16 * v, interleave_bf16(row_at(q, v, p), row_at(q, v, p + 1)));
    }
    if (p < k) {
      for (int q = 0; q < kCount; ++q)
        for (int v = 0; v < vectors; ++v)
          _mm512_storeu_si512(dst + q * panels.stride + 16 * v, interleave_bf16(row_at(q, v, p), decltype(row_at(q, v, p)){}));
    }
  } else {
    for (std::ptrdiff_t p = 0; p < k; ++p, dst += kWidth)
#pragma GCC unroll 4
      for (int q = 0; q < kCount; ++q)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; ++v) _mm512_storeu_ps(dst + q * panels.stride + 16 * v, row_at(q, v, p));
  }
}

template <bool kBf16, int kWidth, class T>
void pack_straight(const T* src, std::ptrdiff_t stride, const Panels& panels, std::ptrdiff_t k, float* dst) {
  switch (panels.count) {
    case 1: return pack_side_by_side<kBf16, kWidth, 1, false>(src, stride, panels, k, dst);
    case 2: return pack_side_by_side<kBf16, kWidth, 2, false>(src, stride, panels, k, dst);
    case 3: return pack_side_by_side<kBf16, kWidth, 3, false>(src, stride, panels, k, dst);
    default: break;
  }
  if (panels.start[4] - panels.start[0] == 4 * kWidth) return pack_side_by_side<kBf16, kWidth, 4, true>(src, stride, panels, k, dst);
  return pack_side_by_side<kBf16, kWidth, 4, false>(src, stride, panels, k, dst);
}

#else  // not AVX-512: bf16 on Arm only

#if defined(__AVX2__)
/** In-place transpose of 8 x 8. */
inline void transpose(f32v (&r)[8]) {
  __m256 t[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_ps((__m256)r[2 * i], (__m256)r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps((__m256)r[2 * i], (__m256)r[2 * i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    r[4 * i] = (f32v)_mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    r[4 * i + 1] = (f32v)_mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    r[4 * i + 2] = (f32v)_mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    r[4 * i + 3] = (f32v)_mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm256_permute2f128_ps((__m256)r[i], (__m256)r[i + 4], 0x20);
    t[i + 4] = _mm256_permute2f128_ps((__m256)r[i], (__m256)r[i + 4], 0x31);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) r[i] = (f32v)t[i];
}
#else
/** In-place transpose of 4 x 4. */
inline void transpose(f32v (&r)[4]) {
  const f32v a = {r[0][0], r[1][0], r[2][0], r[3][0]}, b = {r[0][1], r[1][1], r[2][1], r[3][1]};
  const f32v c = {r[0][2], r[1][2], r[2][2], r[3][2]}, d = {r[0][3], r[1][3], r[2][3], r[3][3]};
  r[0] = a, r[1] = b, r[2] = c, r[3] = d;
}
#endif

/** A mask of the first `count` lanes, for any number; and loads of these lanes, with zeros in the others. */
#if defined(__AVX2__)
using First = __m256i;
inline First first(std::ptrdiff_t count) {
  alignas(32) static const std::int32_t ones[2 * lanes] = {-1, -1, -1, -1, -1, -1, -1, -1};
  const std::ptrdiff_t others = count >= lanes ? 0 : count <= 0 ? lanes : lanes - count;
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(ones + others));
}
inline f32v load_first(First lanes_there, const float* from) { return (f32v)_mm256_maskload_ps(from, lanes_there); }
#else
using First = int;
inline First first(std::ptrdiff_t count) { return count >= lanes ? lanes : count <= 0 ? 0 : int(count); }
inline f32v load_first(First count, const float* from) { return load_some(from, count); }
#endif

/** Copies `kLanes` rows by `lanes` columns from `src`, of which `rows` and `columns` exist, to `columns` rows of the panel. */
template <int kLanes, bool kWhole>
inline void pack_block(const float* src, std::ptrdiff_t stride, int rows, int columns, int width, float* dst) {
  f32v r[lanes];
#pragma GCC unroll 8
  for (int i = 0; i < lanes; ++i) {
    if (i >= kLanes || (!kWhole && i >= rows))
      r[i] = zero();
    else
      r[i] = kWhole ? load(src + i * stride) : load_first(first(columns), src + i * stride);
  }
  transpose(r);
#pragma GCC unroll 8
  for (int i = 0; i < lanes; ++i)
    if (kWhole || i < columns) store(dst + i * width, r[i]);
}

/** Rows that are contiguous along k become lanes of one panel. */
template <bool kBf16, int kWidth>
std::enable_if_t<!kBf16> pack_transposed(const float* src, std::ptrdiff_t stride, int count, std::ptrdiff_t k, float* dst) {
  constexpr int last = (kWidth - 1) / lanes * lanes, rest = kWidth - last;
  for (std::ptrdiff_t p = 0; p < k; p += lanes, src += lanes, dst += lanes * kWidth) {
    const int columns = k - p < lanes ? int(k - p) : lanes;
    // If the width is not a multiple of a vector, the last vector of a row extends into the next row, so it is written first.
    if (count == kWidth && columns == lanes) {
      pack_block<rest, true>(src + last * stride, stride, 0, 0, kWidth, dst + last);
#pragma GCC unroll 4
      for (int lane = last - lanes; lane >= 0; lane -= lanes) pack_block<lanes, true>(src + lane * stride, stride, 0, 0, kWidth, dst + lane);
    } else {
      for (int lane = last; lane >= 0; lane -= lanes)
        pack_block<lanes, false>(src + lane * stride, stride, count - lane < lanes ? count - lane : lanes, columns, kWidth, dst + lane);
    }
  }
}

constexpr std::ptrdiff_t kRowsAhead = 8;

/** Lanes that are contiguous in memory stay lanes. Processes several panels at once, so that runs of memory are long. */
template <bool kBf16, int kWidth>
std::enable_if_t<!kBf16> pack_straight(const float* src, std::ptrdiff_t stride, const Panels& panels, std::ptrdiff_t k, float* dst) {
  constexpr int vectors = (kWidth + lanes - 1) / lanes;
  First there[kMostPanels][vectors];
  for (int q = 0; q < panels.count; ++q)
    for (int v = 0; v < vectors; ++v) there[q][v] = first(panels.start[q + 1] - panels.start[q] - v * lanes);
  const std::ptrdiff_t begin = panels.start[0], end = panels.start[panels.count];
  const bool whole = kWidth % lanes == 0 && end - begin == panels.count * kWidth;
  for (std::ptrdiff_t p = 0; p < k; ++p, src += stride, dst += kWidth) {
    // Rows needed soon: the hardware does not prefetch runs of memory this short.
    for (std::ptrdiff_t i = begin; i < end; i += 16) __builtin_prefetch(src + kRowsAhead * stride + i);
    if (whole) {
      const float* from = src + panels.start[0];
      for (int q = 0; q < panels.count; ++q, from += kWidth)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) store(dst + q * panels.stride + v * lanes, load(from + v * lanes));
    } else {
      for (int q = 0; q < panels.count; ++q)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v)
          store(dst + q * panels.stride + v * lanes, load_first(there[q][v], src + panels.start[q] + v * lanes));
    }
  }
}

#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
/** Loads four elements from `a` on and four from `b` on, rounded to bf16. Only the first `of_a` and `of_b` exist; the others are zero. */
inline f32v load_two(const float* a, const float* b, std::ptrdiff_t of_a = lanes, std::ptrdiff_t of_b = lanes) {
  return pair_neighbours(load_first(first(of_a), a), load_first(first(of_b), b));
}
inline f32v load_two(const Bf16* a, const Bf16* b, std::ptrdiff_t of_a = lanes, std::ptrdiff_t of_b = lanes) {
  return (f32v)vcombine_u16((uint16x4_t)load_some(a, first(of_a)), (uint16x4_t)load_some(b, first(of_b)));
}

/** Rows that are contiguous along k become lanes of one panel. */
template <bool kBf16, int kWidth, class T>
std::enable_if_t<kBf16> pack_transposed(const T* src, std::ptrdiff_t stride, int count, std::ptrdiff_t k, float* dst) {
  for (std::ptrdiff_t p = 0; p < k; p += 2 * kPairs, src += 2 * kPairs, dst += kPairs * kWidth) {
    if (count == kWidth && k - p >= 2 * kPairs) {
#pragma GCC unroll 6
      for (int i = 0; i < kWidth; i += 2) store(dst + i * kPairs, load_two(src + i * stride, src + (i + 1) * stride));
    } else {
      for (int i = 0; i < kWidth; i += 2)
        store(dst + i * kPairs, load_two(src + i * stride, src + (i + 1) * stride, i < count ? k - p : 0, i + 1 < count ? k - p : 0));
    }
  }
}

/** Lanes that are contiguous in memory stay lanes, of several panels at once. */
template <bool kBf16, int kWidth, class T>
std::enable_if_t<kBf16> pack_straight(const T* src, std::ptrdiff_t stride, const Panels& panels, std::ptrdiff_t k, float* dst) {
  const std::ptrdiff_t begin = panels.start[0], end = panels.start[panels.count];
  for (std::ptrdiff_t p = 0; p < k; p += 2 * kPairs, src += 2 * kPairs * stride, dst += kPairs * kWidth) {
    for (std::ptrdiff_t r = 0; r < 2 * kPairs; ++r)
      for (std::ptrdiff_t i = begin; i < end; i += std::ptrdiff_t(64 / sizeof(T))) __builtin_prefetch(src + (kRowsAhead + r) * stride + i);
    for (int q = 0; q < panels.count; ++q) {
      for (int v = 0; v < kWidth; v += lanes) {
        const std::ptrdiff_t left = panels.start[q + 1] - panels.start[q] - v;
        const T* from = src + panels.start[q] + v;
        const auto rows = [&](int first_row) {
          const uint16x8_t two = (uint16x8_t)load_two(from + first_row * stride, from + (first_row + 1) * stride,
                                                      first_row < k - p ? left : 0, first_row + 1 < k - p ? left : 0);
          return (float32x4_t)vzip1q_u16(two, vextq_u16(two, two, 4));
        };
        const float32x4_t low = rows(0), high = rows(2);
        float* const to = dst + q * panels.stride + v * kPairs;
        store(to, (f32v)vzip1q_f32(low, high));
        store(to + lanes, (f32v)vzip2q_f32(low, high));
      }
    }
  }
}
#endif
#endif

/** Packs adjacent panels: lanes from lane0 on, and k columns from k0 on. */
template <bool kBf16, int kWidth, class T>
inline void pack(const Operand<T>& from, std::ptrdiff_t lane0, const Panels& panels, std::ptrdiff_t k0, std::ptrdiff_t k, float* dst) {
  const T* src = from.data + lane0 * from.lane_stride + k0 * from.k_stride;
  if (from.k_stride != 1) return pack_straight<kBf16, kWidth>(src, from.k_stride, panels, k, dst);
  for (int q = 0; q < panels.count; ++q) {
    const int count = int(panels.start[q + 1] - panels.start[q]);
    pack_transposed<kBf16, kWidth>(src + panels.start[q] * from.lane_stride, from.lane_stride, count, k, dst + q * panels.stride);
  }
}

/** Packs panels of A from lane0 on; with `kKept`, they keep rows. */
template <bool kBf16, bool kKept>
inline void pack_a(const GemmOperand& a, std::ptrdiff_t lane0, const Panels& panels, std::ptrdiff_t k0, std::ptrdiff_t k, float* dst) {
#if defined(__AVX512F__)
  if constexpr (kKept) {
    for (int q = 0; q < panels.count; ++q) {
      const std::ptrdiff_t from = lane0 + panels.start[q];
      pack_rows<kBf16>(a.data + from * a.lane_stride + k0, a.lane_stride, int(panels.start[q + 1] - panels.start[q]), k, dst + q * panels.stride);
    }
    return;
  }
#endif
  pack<kBf16, kAWidth>(a, lane0, panels, k0, k, dst);
}

}  // namespace
}  // namespace moe
