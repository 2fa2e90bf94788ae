// Products of few rows with int4 weights in whole numbers: x becomes numbers of 24 bits, or of 16 where precision allows, written with digits of 8 bits, and
// each digit is multiplied with the nibbles as they lie, 32 or more products to an instruction. Sums are exact up to one scale's worth of
// weights; one conversion and one multiplication with both scales bring them to f32. A number of 24 bits is as exact as f32 beside the
// largest of its group, one of 16 bits to 2^-16 of it, where bf16 has 2^-9 of its own size.
#pragma once

#include "integer-dots.h"

namespace moe {
namespace {

// Per lane, four nibbles of `low` and `high` each (one to a byte) times the signed bytes of x that belong to them.
MOE_INLINE i32v nibble_products(i32v low, i32v high, i32v x_low, i32v x_high) {
#if defined(__AVX512VNNI__)
  return (i32v)_mm512_dpbusd_epi32(_mm512_dpbusd_epi32(_mm512_setzero_si512(), (__m512i)low, (__m512i)x_low), (__m512i)high, (__m512i)x_high);
#elif defined(__AVX512BW__)
  const __m512i pairs =
      _mm512_add_epi16(_mm512_maddubs_epi16((__m512i)low, (__m512i)x_low), _mm512_maddubs_epi16((__m512i)high, (__m512i)x_high));
  return (i32v)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
#elif defined(__AVX2__)
  const __m256i pairs =
      _mm256_add_epi16(_mm256_maddubs_epi16((__m256i)low, (__m256i)x_low), _mm256_maddubs_epi16((__m256i)high, (__m256i)x_high));
  return (i32v)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
  i32v sums{};
  for (int shift = 0; shift < 32; shift += 8) {
    sums += ((low >> shift) & 255) * (x_low << (24 - shift) >> 24) + ((high >> shift) & 255) * (x_high << (24 - shift) >> 24);
  }
  return sums;
#endif
}

// Weights of a register: byte i of it holds weights 2 i (low nibble) and 2 i + 1.
constexpr int64_t nibble_group = Int4Weights::per * lanes;

// x of one group: per digit, the highest first, what belongs to low and to high nibbles; what the zero point takes off; the scale.
template <int digits>
struct NibbleX {
  int32_t x[digits][2][lanes];
  int32_t start[lanes];
  float scale[lanes];
};

template <int digits>
void pack_nibble_x(const float* x, int64_t k, NibbleX<digits>* to) {
  // The digits of such numbers are all within -128 .. 127.
  constexpr float range = digits == 3 ? 8355000.0f : 32639.0f;
  for (int64_t begin = 0; begin < k; begin += nibble_group, ++to) {
    const int64_t size = std::min(nibble_group, k - begin);
    f32v most = zero();
    i32v odd{};
    for (int64_t i = 0; i < nibble_group; i += lanes) {
      const f32v v = abs(elements(x + begin, i, size));
      odd |= ~(v <= splat(3.4028235e38f));
      most = fast_max(v, most);
    }
    const float largest = max(most);
    // A group that is too small to divide by counts as zeros; NaN and infinities make its sums NaN.
    const bool usable = largest > 1e-28f;
    const f32v factor = splat(usable ? range / largest : 0.0f);
    store(to->scale, splat(any(odd) ? __builtin_nanf("") : usable ? largest / range : 0.0f));
    int32_t numbers[nibble_group];
    for (int64_t i = 0; i < nibble_group; i += lanes) {
      const f32v v = elements(x + begin, i, size) * factor;
      store(numbers + i, to_i32(v + from_bits((bits(v) & INT32_MIN) | bits(splat(0.5f)))));
    }
    for (int l = 0; l < lanes; ++l) {
      int32_t* const own = numbers + l * Int4Weights::per;
      uint32_t sum = 0;  // wraps around where x has an infinity or NaN, whose scale is NaN
      for (int i = 0; i < Int4Weights::per; ++i) sum += static_cast<uint32_t>(own[i]);
      to->start[l] = static_cast<int32_t>(0u - Int4Weights::zero * sum);
      for (int digit = digits - 1; digit >= 0; --digit) {
        for (int half = 0; half < 2; ++half) {
          uint32_t bytes = 0;
          for (int i = 0; i < 4; ++i) bytes |= (static_cast<uint32_t>(own[2 * i + half]) & 255) << (8 * i);
          to->x[digit][half][l] = static_cast<int32_t>(bytes);
        }
        // The last digit was read as a signed one.
        for (int i = 0; i < Int4Weights::per; ++i) own[i] = static_cast<int32_t>(static_cast<uint32_t>(own[i]) + 128) >> 8;
      }
    }
  }
}

// Scales of the weight: one to a whole number of groups; or one to 32 weights, several to a group, so that a lane's is that of its run.
enum class Scales { blocks, runs };

// The scale of each lane where lanes * 8 weights are runs of 32; `left` of them are there.
MOE_INLINE f32v run_scales(const float* scale, int64_t left) {
#if defined(__AVX512F__)
  const __m128 s = _mm_maskz_loadu_ps(static_cast<__mmask8>((1 << std::min<int64_t>(left, 4)) - 1), scale);
  return (f32v)_mm512_permutexvar_ps(_mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0), _mm512_castps128_ps512(s));
#elif defined(__AVX2__)
  return (f32v)_mm256_set_m128(_mm_broadcast_ss(scale + (left > 1)), _mm_broadcast_ss(scale));
#else
  static_cast<void>(left);
  return splat(*scale);
#endif
}

// Of up to most_rows rows.
template <int digits>
struct NibbleDots {
  const NibbleX<digits>* x[most_rows];
  float* y[most_rows];
  const uint8_t* q;
  const float* scale;
  int64_t row_bytes;
  int64_t block_rows;
  int64_t scale_columns;
  int64_t run;  // groups with one scale
};

template <int digits, int M>
MOE_INLINE void nibble_group_products(i32v v, f32v scale, const NibbleDots<digits>& d, int64_t g, f32v (&total)[M]) {
  const i32v low = v & 0x0f0f0f0f, high = (v >> 4) & 0x0f0f0f0f;
  for (int m = 0; m < M; ++m) {
    const NibbleX<digits>& x = d.x[m][g];
    i32v sums = nibble_products(low, high, load(x.x[0][0]), load(x.x[0][1]));
#pragma GCC unroll 2
    for (int digit = 1; digit < digits; ++digit) sums = (sums << 8) + nibble_products(low, high, load(x.x[digit][0]), load(x.x[digit][1]));
    total[m] = fma(to_f32(sums + load(x.start)), scale * load(x.scale), total[m]);
  }
}

template <int digits, Scales kind, int M>
MOE_INLINE void nibble_dot_row(const NibbleDots<digits>& d, int64_t row) {
  constexpr int64_t bytes = lanes * 4, runs = nibble_group / 32;
  const int64_t full = d.row_bytes / bytes, rest = d.row_bytes % bytes;
  const uint8_t* from = d.q + row * d.row_bytes;
  const float* scale = d.scale + row / d.block_rows * d.scale_columns;
  const auto scale_of = [&](int64_t g, int64_t block) {
    return kind == Scales::runs ? run_scales(scale + g * runs, d.scale_columns - g * runs) : splat(scale[block]);
  };
  f32v total[M] = {};
  int64_t block = 0, left = d.run;
  for (int64_t g = 0; g < full; ++g) {
    __builtin_prefetch(from + g * bytes + ahead);
    nibble_group_products<digits, M>(load_bytes(from + g * bytes), scale_of(g, block), d, g, total);
    if (kind == Scales::blocks && --left == 0) ++block, left = d.run;
  }
  if (rest != 0) {
    i32v v{};
    std::memcpy(&v, from + full * bytes, static_cast<size_t>(rest));
    nibble_group_products<digits, M>(v, scale_of(full, block), d, full, total);
  }
  for (int m = 0; m < M; ++m) d.y[m][row] = sum(total[m]);
}

template <int digits, Scales kind, int M>
void nibble_dot_range(const NibbleDots<digits>& d, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) nibble_dot_row<digits, kind, M>(d, row);
}

// Rows begin .. end of the weight times `rows` (1 .. most_rows) rows of x.
template <int digits, Scales kind>
void nibble_dots(const NibbleDots<digits>& d, int64_t rows, int64_t begin, int64_t end) {
  switch (rows) {
    case 1: return nibble_dot_range<digits, kind, 1>(d, begin, end);
    case 2: return nibble_dot_range<digits, kind, 2>(d, begin, end);
    case 3: return nibble_dot_range<digits, kind, 3>(d, begin, end);
    default: return nibble_dot_range<digits, kind, 4>(d, begin, end);
  }
}

}  // namespace
}  // namespace moe
