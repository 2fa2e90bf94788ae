// Dot products of a few rows of x with int4 weights, using Arm's products of small byte matrices (i8mm): an instruction multiplies eight columns of two rows
// of the weight with two digits of x. Like nibble-dots.h, except that each digit has its own sum. Each sum is exact and converted to f32 separately.
#pragma once

#include "nibble-dots.h"

namespace moe {
namespace {

// One packed group of x. `x`: for each pair of digits, the most significant first, and for each half of a register's bytes, the bytes that multiply low and
// high nibbles, eight of each digit of the pair. `start`: zero-point corrections; `scale`: scales. Both are in the order of an instruction's sums: (first
// row, first digit), (first row, second digit), (second row, first digit), (second row, second digit).
template <int digits>
struct NibbleMatrixX {
  static constexpr int pairs = (digits + 1) / 2;
  int8_t x[pairs][2][2][2][8];
  int32_t start[pairs][lanes];
  float scale[pairs][lanes];
};

template <int digits>
void pack_nibble_x(const float* x, int64_t k, NibbleMatrixX<digits>* to) {
  for (int64_t begin = 0; begin < k; begin += nibble_group, ++to) {
    int32_t numbers[nibble_group];
    float scale = whole_numbers<digits>(x + begin, std::min(nibble_group, k - begin), numbers);
    std::memset(to, 0, sizeof *to);
    for (int digit = digits - 1; digit >= 0; --digit, scale *= 256) {
      const int pair = digit / 2, side = digit % 2;
      int32_t sum = 0;
      for (int i = 0; i < nibble_group; ++i) {
        const int8_t byte = static_cast<int8_t>(numbers[i]);
        to->x[pair][i / 16][i % 2][side][i / 2 % 8] = byte;
        sum += byte;
        numbers[i] = static_cast<int32_t>(static_cast<uint32_t>(numbers[i]) + 128) >> 8;
      }
      for (int row = 0; row < 2; ++row) {
        to->start[pair][2 * row + side] = -Int4Weights::zero * sum;
        to->scale[pair][2 * row + side] = scale;
      }
    }
  }
}

// Multiplies rows `row` and `row` + 1 of the weight with M rows of x. `there`: whether row `row` + 1 exists.
template <int digits, Scales kind, int M>
MOE_INLINE void nibble_two_rows(const NibbleDots<NibbleMatrixX<digits>>& d, int64_t row, bool there) {
  constexpr int64_t bytes = lanes * 4;
  const int64_t full = d.row_bytes / bytes, rest = d.row_bytes % bytes, second = there ? 1 : 0;
  const uint8_t* const from = d.q + row * d.row_bytes;
  const uint8_t* const next = from + second * d.row_bytes;
  const float* const scale = d.scale + row / d.block_rows * d.scale_columns;
  const float* const next_scale = d.scale + (row + second) / d.block_rows * d.scale_columns;
  f32v total[M] = {};
  const auto multiply = [&](int64_t g, int64_t block, int64_t count) MOE_CLANG_INLINE {
    uint64x2_t a{}, b{};
    std::memcpy(&a, from + g * bytes, static_cast<size_t>(count));
    std::memcpy(&b, next + g * bytes, static_cast<size_t>(count));
    const i32v halves[2] = {(i32v)vzip1q_u64(a, b), (i32v)vzip2q_u64(a, b)};
    const float32x4_t one = {scale[block], 0, 0, 0}, other = {next_scale[block], 0, 0, 0};
    const float32x4_t both = vzip1q_f32(one, other);
    const f32v scales = (f32v)vzip1q_f32(both, both);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const NibbleMatrixX<digits>& x = d.x[m][g];
#pragma GCC unroll 2
      for (int pair = 0; pair < x.pairs; ++pair) {
        int32x4_t sums = vld1q_s32(x.start[pair]);
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          const i32v low = halves[half] & 0x0f0f0f0f, high = (halves[half] >> 4) & 0x0f0f0f0f;
          sums = vmmlaq_s32(sums, (int8x16_t)low, vld1q_s8(x.x[pair][half][0][0]));
          sums = vmmlaq_s32(sums, (int8x16_t)high, vld1q_s8(x.x[pair][half][1][0]));
        }
        total[m] = fma(to_f32((i32v)sums), scales * load(x.scale[pair]), total[m]);
      }
    }
  };
  int64_t block = 0, left = d.run;
  for (int64_t g = 0; g < full; ++g) {
    for (int64_t i = 0; i < 2; ++i) __builtin_prefetch(from + (2 * g + i) * bytes + ahead);
    multiply(g, kind == Scales::runs ? g : block, bytes);
    if (kind == Scales::blocks && --left == 0) ++block, left = d.run;
  }
  if (rest != 0) multiply(full, kind == Scales::runs ? full : block, rest);
  for (int m = 0; m < M; ++m) {
    d.y[m][row] = total[m][0] + total[m][1];
    if (there) d.y[m][row + 1] = total[m][2] + total[m][3];
  }
}

template <int digits, Scales kind, int M>
void nibble_dot_range(const NibbleDots<NibbleMatrixX<digits>>& d, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; row += 2) nibble_two_rows<digits, kind, M>(d, row, row + 1 < end);
}

}  // namespace
}  // namespace moe
