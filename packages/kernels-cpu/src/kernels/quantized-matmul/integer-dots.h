// Dot products of a few rows of x with int8 weights in integer arithmetic. For each block of the weight's columns, x is quantized to 31-bit integers,
// multiplied as two 16-bit halves, or to 16-bit integers (one half) if bf16 precision is enough. With Arm's byte dot products, each half is multiplied
// as two 8-bit digits. The sums of a block are exact; one conversion and one multiplication with both scales turn them into f32. This takes half as many
// instructions as decoding each weight to f32.
// Precision: with two halves, an element of x is as precise as in f32. With one, its error is 2^-16 of the largest element of its block, whereas that of
// bf16 is 2^-9 of the element itself.
#pragma once

#include <cmath>

#include "dots.h"

namespace moe {
namespace {

// Multiplies 16-bit integers and adds each pair of neighbouring products to a 32-bit lane of `sums`. Additions wrap around, so only the final sum has to
// fit into 32 bits.
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
  // These products are not neighbours, but the same two always share a lane.
  const int32x4_t low = vmlal_s16((int32x4_t)sums, vget_low_s16((int16x8_t)a), vget_low_s16((int16x8_t)b));
  return (i32v)vmlal_high_s16(low, (int16x8_t)a, (int16x8_t)b);
#endif
}

#if defined(__ARM_FEATURE_DOTPROD)
// A 32-bit lane contains four weights, which are multiplied in the order in which they are stored, converted to signed bytes.
constexpr bool by_bytes = true;
constexpr int parts = 1;
MOE_INLINE i32v weight_part(i32v v, int) { return v ^ static_cast<int32_t>(0x80808080); }
MOE_INLINE i32v add_products(i32v sums, i32v weights, i32v x) { return (i32v)vdotq_s32((int32x4_t)sums, (int8x16_t)weights, (int8x16_t)x); }
#else
// A 32-bit lane contains four weights. Part j consists of weights j and j + 2 as a pair of 16-bit integers.
constexpr bool by_bytes = false;
constexpr int parts = 2;
MOE_INLINE i32v weight_part(i32v v, int part) {
  typedef uint16_t halves_of_lanes __attribute__((vector_size(MOE_LANES * 4)));
  return part == 0 ? v & 0x00ff00ff : (i32v)((halves_of_lanes)v >> 8);
}
MOE_INLINE i32v add_products(i32v sums, i32v weights, i32v x) { return add_products16(sums, weights, x); }
#endif
// Vectors of x for one part of a group of weights: one for each half, or one for each of its digits; the most significant first.
template <int halves>
constexpr int vectors = by_bytes ? 2 * halves : halves;

constexpr int64_t byte_group = group_size<Int8Weights>;
// The longest block, in groups, whose sums stay below 2^30: a product is at most 2^15 * 2^7, and a group adds four products to a lane.
constexpr int64_t most_run = 64;

// Loads elements i .. i + lanes - 1 of x; those from `size` on are zero.
MOE_INLINE f32v elements(const float* x, int64_t i, int64_t size) {
  if (i + lanes <= size) return load(x + i);
  return i < size ? load_partial(x + i, static_cast<int>(size - i)) : zero();
}

MOE_INLINE u16v low_halves(i32v x) { return __builtin_convertvector((u32v)x, u16v); }

// Packs one half of a group as pairs of 16-bit integers, with parts `stride` words apart. Returns the zero-point correction of each lane,
// -zero * (sum of its elements of x).
MOE_INLINE i32v pack_pairs(const uint16_t* numbers, int32_t* to, int64_t stride) {
  typedef uint64_t quads __attribute__((vector_size(MOE_LANES * 8)));
  quads q;
  std::memcpy(&q, numbers, sizeof q);
  i32v sum{};
  for (int j = 0; j < parts; ++j, q >>= 16) {
    const i32v pairs = (i32v)__builtin_convertvector((q & 0xffff) | (q >> 16 & 0xffff0000), u32v);
    store(to + j * stride, pairs);
    sum = add_products16(sum, pairs, splat(0x10001));
  }
  return sum * -Int8Weights::zero;
}

// Splits the integers of a group into signed 8-bit digits, the most significant first. All but the most significant are in -128 .. 127 by construction.
template <int digits>
MOE_INLINE void pack_digits(i32v (&numbers)[Int8Weights::per], int32_t* to) {
  for (int digit = digits - 1; digit >= 0; --digit) {
    for (int i = 0; i < Int8Weights::per; ++i) {
      const u8v bytes = __builtin_convertvector((u32v)numbers[i], u8v);
      std::memcpy(reinterpret_cast<uint8_t*>(to + digit * lanes) + i * lanes, &bytes, sizeof bytes);
      // The products read the digit as signed, so 128 or more carries into the next digit.
      numbers[i] = (numbers[i] + 128) >> 8;
    }
  }
}

// Packs a row of x. `packed`: for each part of each group, `vectors` vectors, padded with zeros beyond k. `scales`: for each block of `run` groups, the
// scale of its least significant half. `starts`: for each half of each block, a vector of zero-point corrections (zeros if weights are made signed).
template <int halves>
void pack_integer_x(const float* x, int64_t k, int64_t run, int32_t* packed, float* scales, int32_t* starts) {
  // Up to 32639 = 127 * 256 + 127, both digits are in -128 .. 127.
  constexpr float range = halves == 2 ? 1073741824.0f : by_bytes ? 32639.0f : 32767.0f;
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
    // A block whose largest element is too small to divide by is treated as zeros. NaN and infinities make the block's sums NaN.
    const bool usable = largest > 1e-28f;
    const f32v factor = splat(usable ? range / largest : 0.0f);
    scales[b] = any(odd) ? __builtin_nanf("") : usable ? largest / range : 0.0f;
    i32v start[halves] = {};
    for (int64_t g = 0; g * byte_group < size; ++g) {
      int32_t* const to = packed + (b * run + g) * parts * vectors<halves> * lanes;
      if constexpr (by_bytes) {
        i32v numbers[Int8Weights::per];
        for (int i = 0; i < Int8Weights::per; ++i) {
          const f32v v = elements(from, g * byte_group + i * lanes, size) * factor;
          numbers[i] = to_i32(halves == 2 ? v : round_small(v));
        }
        pack_digits<vectors<halves>>(numbers, to);
        continue;
      }
      uint16_t numbers[halves][byte_group];
      for (int64_t i = 0; i < byte_group; i += lanes) {
        const f32v v = elements(from, g * byte_group + i, size) * factor;
        if constexpr (halves == 2) {
          const i32v whole = to_i32(v), upper = (whole + 0x8000) >> 16;
          store(numbers[0] + i, low_halves(upper));
          store(numbers[1] + i, low_halves(whole));
        } else {
          store(numbers[0] + i, low_halves(to_i32(round_small(v))));
        }
      }
      for (int h = 0; h < halves; ++h) start[h] += pack_pairs(numbers[h], to + h * lanes, halves * lanes);
    }
    for (int h = 0; h < halves; ++h) store(starts + (b * halves + h) * lanes, start[h]);
  }
}

// Operands of the dot products with up to most_rows rows of x; `x`, `x_scales` and `starts` are made by pack_integer_x.
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
  int64_t run;  // groups in a block of x
};

// Groups in a block of 128 columns, the most common size.
constexpr int64_t usual_run = 128 / byte_group;

// Multiplies group g of R rows of the weight with that of M rows of x. Only `there` bytes of the group are stored (fewer than all at the end of a row).
template <int halves, int R, int M>
MOE_INLINE void integer_group_products(const IntegerDots& d, const uint8_t* from, int64_t g, int64_t there, i32v (&sums)[R][M][vectors<halves>]) {
  constexpr int64_t bytes = lanes * 4;
  i32v v[R] = {};
#pragma GCC unroll 2
  for (int r = 0; r < R; ++r) std::memcpy(&v[r], from + r * d.row_bytes + g * bytes, static_cast<size_t>(there));
#pragma GCC unroll 2
  for (int j = 0; j < parts; ++j) {
    i32v w[R];
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r) w[r] = weight_part(v[r], j);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
      for (int h = 0; h < vectors<halves>; ++h) {
        const i32v numbers = load(d.x[m] + ((g * parts + j) * vectors<halves> + h) * lanes);
#pragma GCC unroll 2
        for (int r = 0; r < R; ++r) sums[r][m][h] = add_products(sums[r][m][h], w[r], numbers);
      }
    }
  }
}

// begin_block initializes the accumulators of a block; end_block scales them and adds them to `total`.
template <int halves, int R, int M>
MOE_INLINE void begin_block(const IntegerDots& d, int64_t block, i32v (&sums)[R][M][vectors<halves>]) {
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int h = 0; h < vectors<halves>; ++h) {
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r) sums[r][m][h] = by_bytes ? i32v{} : load(d.starts[m] + (block * halves + h) * lanes);
    }
  }
}
template <int halves, int R, int M>
MOE_INLINE void end_block(const IntegerDots& d, const float* const (&scales)[R], int64_t block, const i32v (&sums)[R][M][vectors<halves>],
                          f32v (&total)[R][M]) {
#pragma GCC unroll 2
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const auto half = [&](int h) { return to_f32(by_bytes ? (sums[r][m][2 * h] << 8) + sums[r][m][2 * h + 1] : sums[r][m][h]); };
      f32v sum = half(0);
      if (halves == 2) sum = fma(sum, splat(65536.0f), half(halves - 1));
      total[r][m] = fma(sum, splat(scales[r][block] * d.x_scales[m][block]), total[r][m]);
    }
  }
}

// Multiplies R rows of the weight, from `row` on, with M rows of x. Results are the same, bit for bit, for every R.
template <int halves, int R, int M>
MOE_INLINE void integer_dot_rows(const IntegerDots& d, int64_t row) {
  constexpr int64_t bytes = lanes * 4;
  const int64_t full = d.row_bytes / bytes, rest = d.row_bytes % bytes, groups = full + (rest != 0);
  const uint8_t* const from = d.q + row * d.row_bytes;
  const float* scales[R];
  for (int r = 0; r < R; ++r) scales[r] = d.scale + (row + r) / d.block_rows * d.scale_columns;
  f32v total[R][M] = {};
  int64_t g = 0, block = 0;
  for (; d.run == usual_run && g + usual_run <= full; g += usual_run, ++block) {
    i32v sums[R][M][vectors<halves>];
    begin_block<halves, R, M>(d, block, sums);
#pragma GCC unroll 4
    for (int64_t i = 0; i < 128 * R; i += 64) __builtin_prefetch(from + R * g * bytes + ahead + i);
#pragma GCC unroll 8
    for (int64_t i = 0; i < usual_run; ++i) integer_group_products<halves, R, M>(d, from, g + i, bytes, sums);
    end_block<halves, R, M>(d, scales, block, sums, total);
  }
  for (; g < groups; ++block) {
    const int64_t end = std::min(groups, g + d.run), whole = std::min(full, end);
    i32v sums[R][M][vectors<halves>];
    begin_block<halves, R, M>(d, block, sums);
    for (; g < whole; ++g) {
      for (int r = 0; r < R; ++r) __builtin_prefetch(from + (R * g + r) * bytes + ahead);
      integer_group_products<halves, R, M>(d, from, g, bytes, sums);
    }
    if (g < end) integer_group_products<halves, R, M>(d, from, g++, rest, sums);
    end_block<halves, R, M>(d, scales, block, sums, total);
  }
  for (int r = 0; r < R; ++r) {
    for (int m = 0; m < M; ++m) d.y[m][row + r] = sum(total[r][m]);
  }
}

template <int halves, int M>
void integer_dot_range(const IntegerDots& d, int64_t begin, int64_t end) {
  // Two rows of the weight share the loads of x if there are enough registers.
  constexpr int R = M <= 2 ? 2 : 1;
  int64_t row = begin;
  for (; row + R <= end; row += R) integer_dot_rows<halves, R, M>(d, row);
  for (; row < end; ++row) integer_dot_rows<halves, 1, M>(d, row);
}

// Multiplies rows begin .. end - 1 of the weight with `rows` (1 .. most_rows) rows of x.
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
