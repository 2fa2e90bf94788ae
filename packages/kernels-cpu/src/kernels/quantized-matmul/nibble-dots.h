// Dot products of a few rows of x with int4 weights in integer arithmetic. x is quantized to 24-bit integers, or to 16 bits if bf16 precision is enough, and
// split into 8-bit digits. Each digit is multiplied with the nibbles in the order in which they are stored, 32 or more products per instruction. A sum
// covers only weights that share a scale and is exact; one conversion and one multiplication with both scales turn it into f32.
// Precision: a 24-bit integer is as precise as f32 relative to the largest element of its group. The error of a 16-bit integer is 2^-16 of that element,
// whereas that of bf16 is 2^-9 of the element itself. Arm's i8mm has its own kernel: nibble-matrices.h.
#pragma once

#include "integer-dots.h"

namespace moe {
namespace {

// Returns `sums` plus, for each 32-bit lane, the products of four nibbles of `low` and four of `high` (one per byte) with the matching signed bytes of x.
MOE_INLINE i32v add_nibble_products(i32v sums, i32v low, i32v high, i32v x_low, i32v x_high) {
#if defined(__AVX512VNNI__)
  const __m512i of_low = _mm512_dpbusd_epi32(_mm512_setzero_si512(), (__m512i)low, (__m512i)x_low);
  return sums + (i32v)_mm512_dpbusd_epi32(of_low, (__m512i)high, (__m512i)x_high);
#elif defined(__AVX512BW__)
  const __m512i pairs =
      _mm512_add_epi16(_mm512_maddubs_epi16((__m512i)low, (__m512i)x_low), _mm512_maddubs_epi16((__m512i)high, (__m512i)x_high));
  return sums + (i32v)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
#elif defined(__AVX2__)
  const __m256i pairs =
      _mm256_add_epi16(_mm256_maddubs_epi16((__m256i)low, (__m256i)x_low), _mm256_maddubs_epi16((__m256i)high, (__m256i)x_high));
  return sums + (i32v)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#elif defined(__ARM_FEATURE_DOTPROD)
  const int32x4_t with_low = vdotq_s32((int32x4_t)sums, (int8x16_t)low, (int8x16_t)x_low);
  return (i32v)vdotq_s32(with_low, (int8x16_t)high, (int8x16_t)x_high);
#elif defined(__aarch64__)
  const auto part = [](auto low, auto high, auto x_low, auto x_high) { return vmlal_s8(vmull_s8(low, x_low), high, x_high); };
  const auto lower = [](i32v v) { return vget_low_s8((int8x16_t)v); };
  const auto upper = [](i32v v) { return vget_high_s8((int8x16_t)v); };
  const int16x8_t first = part(lower(low), lower(high), lower(x_low), lower(x_high));
  const int16x8_t second = part(upper(low), upper(high), upper(x_low), upper(x_high));
  return (i32v)vpadalq_s16((int32x4_t)sums, vpaddq_s16(first, second));
#else
  for (int shift = 0; shift < 32; shift += 8) {
    sums += ((low >> shift) & 255) * (x_low << (24 - shift) >> 24) + ((high >> shift) & 255) * (x_high << (24 - shift) >> 24);
  }
  return sums;
#endif
}

// Weights per register: its byte i contains weights 2 i (low nibble) and 2 i + 1 (high nibble).
constexpr int64_t nibble_group = Int4Weights::per * lanes;

// One packed group of x. `x`: for each digit, the most significant first, the bytes that multiply low and high nibbles. `start`: the zero-point correction
// of each lane. `scale`: the scale of the group, in every lane.
template <int digits>
struct NibbleX {
  int32_t x[digits][2][lanes];
  int32_t start[lanes];
  float scale[lanes];
};

// Quantizes `size` elements of x to integers, padded with zeros. Returns their scale.
template <int digits>
MOE_INLINE float whole_numbers(const float* x, int64_t size, int32_t (&numbers)[nibble_group]) {
  // Within this range, all digits are in -128 .. 127.
  constexpr float range = digits == 3 ? 8355000.0f : 32639.0f;
  f32v most = zero();
  i32v odd{};
  for (int64_t i = 0; i < nibble_group; i += lanes) {
    const f32v v = abs(elements(x, i, size));
    odd |= ~(v <= splat(3.4028235e38f));
    most = fast_max(v, most);
  }
  const float largest = max(most);
  // A group whose largest element is too small to divide by is treated as zeros. NaN and infinities make the group's sums NaN.
  const bool usable = largest > 1e-28f;
  const f32v factor = splat(usable ? range / largest : 0.0f);
  for (int64_t i = 0; i < nibble_group; i += lanes) {
    const f32v v = elements(x, i, size) * factor;
    store(numbers + i, to_i32(v + from_bits((bits(v) & INT32_MIN) | bits(splat(0.5f)))));
  }
  return any(odd) ? __builtin_nanf("") : usable ? largest / range : 0.0f;
}

template <int digits>
void pack_nibble_x(const float* x, int64_t k, NibbleX<digits>* to) {
  for (int64_t begin = 0; begin < k; begin += nibble_group, ++to) {
    int32_t numbers[nibble_group];
    store(to->scale, splat(whole_numbers<digits>(x + begin, std::min(nibble_group, k - begin), numbers)));
    for (int l = 0; l < lanes; ++l) {
      int32_t* const own = numbers + l * Int4Weights::per;
      uint32_t sum = 0;  // wraps around if x contains an infinity or NaN; the scale is NaN then
      for (int i = 0; i < Int4Weights::per; ++i) sum += static_cast<uint32_t>(own[i]);
      to->start[l] = static_cast<int32_t>(0u - Int4Weights::zero * sum);
      for (int digit = digits - 1; digit >= 0; --digit) {
        for (int half = 0; half < 2; ++half) {
          uint32_t bytes = 0;
          for (int i = 0; i < 4; ++i) bytes |= (static_cast<uint32_t>(own[2 * i + half]) & 255) << (8 * i);
          to->x[digit][half][l] = static_cast<int32_t>(bytes);
        }
        // The products read the digit as signed, so 128 or more carries into the next digit.
        for (int i = 0; i < Int4Weights::per; ++i) own[i] = static_cast<int32_t>(static_cast<uint32_t>(own[i]) + 128) >> 8;
      }
    }
  }
}

// How the weight is scaled: `blocks` of one or more whole groups share a scale; or `runs` of 32 weights do, so that a group has a scale for each of its runs
// (and a lane that of the run it belongs to).
enum class Scales { blocks, runs };

// Returns the scale of each lane for a group whose weights are scaled in runs of 32; `left` of its scales exist.
MOE_INLINE f32v run_scales(const float* scale, int64_t left) {
#if defined(__AVX512F__)
  const __m128 s = _mm_maskz_loadu_ps(static_cast<__mmask8>((1 << std::min<int64_t>(left, 4)) - 1), scale);
  return (f32v)_mm512_permutexvar_ps(_mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0), _mm512_castps128_ps512(s));
#elif defined(__AVX2__)
  if (left > 1) {
    double both;
    std::memcpy(&both, scale, sizeof both);
    return (f32v)_mm256_permutevar_ps((__m256)_mm256_set1_pd(both), _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1));
  }
  return splat(*scale);
#else
  static_cast<void>(left);
  return splat(*scale);
#endif
}

// Operands of the dot products with up to most_rows rows of x.
template <class X>
struct NibbleDots {
  const X* x[most_rows];
  float* y[most_rows];
  const uint8_t* q;
  const float* scale;
  int64_t row_bytes;
  int64_t block_rows;
  int64_t scale_columns;
  int64_t run;  // consecutive groups that share a scale
};

template <int digits, int R, int M>
MOE_INLINE void nibble_group_products(const i32v (&v)[R], const f32v (&scales)[R], const NibbleDots<NibbleX<digits>>& d, int64_t g, f32v (&total)[R][M]) {
  i32v low[R], high[R];
#pragma GCC unroll 2
  for (int r = 0; r < R; ++r) low[r] = v[r] & 0x0f0f0f0f, high[r] = (v[r] >> 4) & 0x0f0f0f0f;
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) {
    const NibbleX<digits>& x = d.x[m][g];
    i32v sums[R];
#pragma GCC unroll 3
    for (int digit = 0; digit < digits; ++digit) {
      const i32v x_low = load(x.x[digit][0]), x_high = load(x.x[digit][1]);
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r) {
        sums[r] = add_nibble_products(digit == 0 ? i32v{} : sums[r] << 8, low[r], high[r], x_low, x_high);
      }
    }
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r) total[r][m] = fma(to_f32(sums[r] + load(x.start)), scales[r] * load(x.scale), total[r][m]);
  }
}

// Multiplies R rows of the weight, from `row` on, with M rows of x. Results are the same, bit for bit, for every R.
template <int digits, Scales kind, int R, int M>
MOE_INLINE void nibble_dot_rows(const NibbleDots<NibbleX<digits>>& d, int64_t row) {
  constexpr int64_t bytes = lanes * 4, runs = nibble_group / 32;
  const int64_t full = d.row_bytes / bytes, rest = d.row_bytes % bytes;
  const uint8_t* const from = d.q + row * d.row_bytes;
  const float* scale[R];
  for (int r = 0; r < R; ++r) scale[r] = d.scale + (row + r) / d.block_rows * d.scale_columns;
  f32v total[R][M] = {};
  const auto multiply = [&](int64_t g, int64_t block, int64_t there) MOE_CLANG_INLINE {
    i32v v[R] = {};
    f32v scales[R];
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r) {
      std::memcpy(&v[r], from + r * d.row_bytes + g * bytes, static_cast<size_t>(there));
      scales[r] = kind == Scales::runs ? run_scales(scale[r] + g * runs, there == bytes ? runs : d.scale_columns - g * runs) : splat(scale[r][block]);
    }
    nibble_group_products<digits, R, M>(v, scales, d, g, total);
  };
  int64_t block = 0, left = d.run;
  for (int64_t g = 0; g < full; ++g) {
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r) __builtin_prefetch(from + (R * g + r) * bytes + ahead);
    multiply(g, block, bytes);
    if (kind == Scales::blocks && --left == 0) ++block, left = d.run;
  }
  if (rest != 0) multiply(full, block, rest);
  for (int r = 0; r < R; ++r) {
    for (int m = 0; m < M; ++m) d.y[m][row + r] = sum(total[r][m]);
  }
}

template <int digits, Scales kind, int M>
void nibble_dot_range(const NibbleDots<NibbleX<digits>>& d, int64_t begin, int64_t end) {
  // Two rows of the weight share the loads of x if there are enough registers.
  constexpr int R = M <= 2 ? 2 : 1;
  int64_t row = begin;
  for (; row + R <= end; row += R) nibble_dot_rows<digits, kind, R, M>(d, row);
  for (; row < end; ++row) nibble_dot_rows<digits, kind, 1, M>(d, row);
}

// Multiplies rows begin .. end - 1 of the weight with `rows` (1 .. most_rows) rows of x.
template <int digits, Scales kind, class X>
void nibble_dots(const NibbleDots<X>& d, int64_t rows, int64_t begin, int64_t end) {
  switch (rows) {
    case 1: return nibble_dot_range<digits, kind, 1>(d, begin, end);
    case 2: return nibble_dot_range<digits, kind, 2>(d, begin, end);
    case 3: return nibble_dot_range<digits, kind, 3>(d, begin, end);
    default: return nibble_dot_range<digits, kind, 4>(d, begin, end);
  }
}

}  // namespace
}  // namespace moe
