// Products of few rows with int8 weights in whole numbers: per block of the weight's columns x becomes numbers of 31 bits, multiplied as two
// halves of 16, or of 16 bits where precision allows. Sums of a block are exact; one conversion and one multiplication with both scales
// bring it to f32. That takes half of the instructions that decoding each weight to f32 takes. An element of x is as exact as
// in f32 with two halves; with one, to 2^-16 of the largest of its block, where bf16 has 2^-9 of its own size.
#pragma once

#include <cmath>

#include "dots.h"

namespace moe {
namespace {

// Sums of neighbouring products of 16-bit numbers, added to `sums`. Wraps around, so only the end of a chain of sums has to fit.
MOE_INLINE i32v add_products16(i32v sums, i32v a, i32v b) {
#if defined(__AVX512VNNI__)
  return (i32v)_mm512_dpwssd_epi32((__m512i)sums, (__m512i)a, (__m512i)b);
#elif defined(__AVX512BW__)
  return sums + (i32v)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return sums + (i32v)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__x86_64__)
  return sums + (i32v)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
  return sums + (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
}

// A 32-bit lane holds four weights. Part j are weights j and j + 2 as a pair of 16-bit numbers.
constexpr int parts = 2;

MOE_INLINE i32v weight_pairs(i32v v, int part) { return (i32v)((u32v)v >> (8 * part)) & 0x00ff00ff; }

constexpr int64_t byte_group = group_size<Int8Weights>;
// The longest block, in groups, whose sums stay below 2^30: 2^15 times 2^7 a weight, four weights a lane and group.
constexpr int64_t most_run = 64;

// Elements i .. i + lanes of `size`, zeros behind.
MOE_INLINE f32v elements(const float* x, int64_t i, int64_t size) {
  if (i + lanes <= size) return load(x + i);
  return i < size ? load_partial(x + i, static_cast<int>(size - i)) : zero();
}

// One half of a group as pairs of 16-bit numbers, part after part `stride` words apart; what the zero point takes off is added to `starts`.
MOE_INLINE void pack_pairs(const int32_t* numbers, int32_t* to, int64_t stride, int32_t* starts) {
  for (int l = 0; l < lanes; ++l) {
    const int32_t* own = numbers + l * Int8Weights::per;
    uint32_t sum = 0;  // wraps around where x has an infinity or NaN, whose scale is NaN
    for (int j = 0; j < parts; ++j) {
      const uint32_t low = static_cast<uint32_t>(own[j]), high = static_cast<uint32_t>(own[j + parts]);
      to[j * stride + l] = static_cast<int32_t>((low & 0xffff) | high << 16);
      sum += low + high;
    }
    starts[l] = static_cast<int32_t>(static_cast<uint32_t>(starts[l]) - Int8Weights::zero * sum);
  }
}

// x of one row: per group of 32-bit lanes, and per part of it, `halves` vectors of pairs, the upper one first; zeros behind k. Per block
// of `run` groups the scale of the lowest half, and per half a vector with what the zero point takes off.
template <int halves>
void pack_integer_x(const float* x, int64_t k, int64_t run, int32_t* packed, float* scales, int32_t* starts) {
  constexpr float range = halves == 2 ? 1073741824.0f : 32767.0f;
  const int64_t block = run * byte_group;
  for (int64_t b = 0; b * block < k; ++b) {
    const float* from = x + b * block;
    const int64_t size = std::min(block, k - b * block);
    f32v most = zero();
    i32v odd{};
    for (int64_t i = 0; i < size; i += lanes) {
      const f32v v = abs(elements(from, i, size));
      odd |= ~(v <= splat(3.4028235e38f));
      most = fast_max(v, most);
    }
    const float largest = max(most);
    // A block that is too small to divide by counts as zeros; NaN and infinities make its sums NaN.
    const bool usable = largest > 1e-28f;
    const f32v factor = splat(usable ? range / largest : 0.0f);
    scales[b] = any(odd) ? __builtin_nanf("") : usable ? largest / range : 0.0f;
    int32_t* const start = starts + b * halves * lanes;
    for (int h = 0; h < halves; ++h) store(start + h * lanes, i32v{});
    for (int64_t g = 0; g * byte_group < size; ++g) {
      int32_t numbers[halves][byte_group];
      for (int64_t i = 0; i < byte_group; i += lanes) {
        const f32v v = elements(from, g * byte_group + i, size) * factor;
        if constexpr (halves == 2) {
          const i32v whole = to_i32(v), upper = (whole + 0x8000) >> 16;
          store(numbers[0] + i, upper);
          store(numbers[1] + i, whole - (upper << 16));
        } else {
          store(numbers[0] + i, to_i32(round_small(v)));
        }
      }
      int32_t* const to = packed + (b * run + g) * parts * halves * lanes;
      for (int h = 0; h < halves; ++h) pack_pairs(numbers[h], to + h * lanes, halves * lanes, start + h * lanes);
    }
  }
}

// Chains of additions for each row and half of x: with one row there are registers for two.
template <int M>
constexpr int integer_chains = M == 1 ? 2 : 1;

template <int halves, int M>
MOE_INLINE void integer_group_products(i32v v, const int32_t* const* x, int64_t at, i32v (&sums)[M][halves][integer_chains<M>]) {
#pragma GCC unroll 2
  for (int j = 0; j < parts; ++j) {
    const i32v w = weight_pairs(v, j);
    for (int m = 0; m < M; ++m) {
      for (int h = 0; h < halves; ++h) {
        i32v& sum = sums[m][h][j % integer_chains<M>];
        sum = add_products16(sum, w, load(x[m] + at + (j * halves + h) * lanes));
      }
    }
  }
}

// Of up to most_rows rows: packed x, scales and starts as pack_integer_x makes them.
struct IntegerDots {
  const int32_t* x[most_rows];
  const float* x_scales[most_rows];
  const int32_t* starts[most_rows];
  float* y[most_rows];
  const uint8_t* q;
  const float* scale;
  int64_t row_bytes;
  int64_t block_rows;
  int64_t scale_columns;
  int64_t run;  // groups of a block of x
};

template <int halves, int M>
MOE_INLINE void integer_dot_row(const IntegerDots& d, int64_t row) {
  constexpr int64_t bytes = lanes * 4;
  const int64_t full = d.row_bytes / bytes, rest = d.row_bytes % bytes;
  const int64_t groups = full + (rest != 0);
  const uint8_t* from = d.q + row * d.row_bytes;
  const float* scale = d.scale + row / d.block_rows * d.scale_columns;
  f32v total[M] = {};
  for (int64_t g = 0, block = 0; g < groups; ++block) {
    const int64_t end = std::min(groups, g + d.run), whole = std::min(full, end);
    i32v sums[M][halves][integer_chains<M>] = {};
    for (int m = 0; m < M; ++m) {
      for (int h = 0; h < halves; ++h) sums[m][h][0] = load(d.starts[m] + (block * halves + h) * lanes);
    }
    for (; g < whole; ++g) {
      __builtin_prefetch(from + g * bytes + ahead);
      integer_group_products<halves, M>(load_bytes(from + g * bytes), d.x, g * parts * halves * lanes, sums);
    }
    if (g < end) {
      i32v v{};
      std::memcpy(&v, from + g * bytes, static_cast<size_t>(rest));
      integer_group_products<halves, M>(v, d.x, g * parts * halves * lanes, sums);
      ++g;
    }
    const f32v s = splat(scale[block]);
    for (int m = 0; m < M; ++m) {
      f32v sum = zero();
      for (int h = 0; h < halves; ++h) {
        const i32v own = M == 1 ? sums[m][h][0] + sums[m][h][integer_chains<M> - 1] : sums[m][h][0];
        sum = fma(sum, splat(65536.0f), to_f32(own));
      }
      total[m] = fma(sum, s * splat(d.x_scales[m][block]), total[m]);
    }
  }
  for (int m = 0; m < M; ++m) d.y[m][row] = sum(total[m]);
}

template <int halves, int M>
void integer_dot_range(const IntegerDots& d, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) integer_dot_row<halves, M>(d, row);
}

// Rows begin .. end of the weight times `rows` (1 .. most_rows) rows of x.
template <int halves>
void integer_dots(const IntegerDots& d, int64_t rows, int64_t begin, int64_t end) {
  switch (rows) {
    case 1: return integer_dot_range<halves, 1>(d, begin, end);
    case 2: return integer_dot_range<halves, 2>(d, begin, end);
    case 3: return integer_dot_range<halves, 3>(d, begin, end);
    default: return integer_dot_range<halves, 4>(d, begin, end);
  }
}

}  // namespace
}  // namespace moe
