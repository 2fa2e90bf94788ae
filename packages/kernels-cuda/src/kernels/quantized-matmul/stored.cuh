// The stored formats of quantized weights (WeightFormat in @moe/core) and their conversion to f32. A row is a sequence
// of bytes. Threads take 8 neighbouring values at a time, which are 16, 8 or 4 bytes, so that a warp reads whole lines
// of both the weight and x.
#pragma once
#include "moe.cuh"

enum class Format { bf16, fp8, int8, int4 };

/// perWord: values in 4 bytes. unpack: converts a word to its values, without their scale, the first from the lowest
/// bits.
template <Format F>
struct Stored;

template <>
struct Stored<Format::bf16> {
  static constexpr int perWord = 2;
  MOE_DEVICE void unpack(float* v, uint32_t word) { v[0] = lowBf16(word), v[1] = highBf16(word); }
};

template <>
struct Stored<Format::fp8> {
  static constexpr int perWord = 4;
  MOE_DEVICE void unpack(float* v, uint32_t word) {
#ifdef MOE_HAS_FP8_CONVERSIONS
    const float2 low = unpackF8e4m3(word), high = unpackF8e4m3(word >> 16);
    v[0] = low.x, v[1] = low.y, v[2] = high.x, v[3] = high.y;
#else
    // Adjusts the exponent bias from 7 to 127 by a multiplication with 2^120, subnormals included.
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const uint32_t top = word << (24 - 8 * i);
      v[i] = asFloat((top & 0x80000000u) | (top & 0x7f000000u) >> 4) * asFloat(0x7b800000u);
    }
    if (((word & 0x7f7f7f7fu) + 0x01010101u) & 0x80808080u) { // NaN is rare
#pragma unroll
      for (int i = 0; i < 4; i++) {
        if ((word >> 8 * i & 0x7fu) == 0x7fu) v[i] = asFloat(0x7fc00000u);
      }
    }
#endif
  }
};

/// The integer in `bits` bits of the word, starting at bit `at`, minus `zero`; at + bits <= 23. Inserted into the
/// mantissa of 2^23, it has the value times 2^at, so one logical operation and one fused multiply-add suffice; both are
/// exact.
template <int at, int bits, int zero>
MOE_DEVICE float wholeNumber(uint32_t word) {
  static_assert(at + bits <= 23, "within the mantissa");
  constexpr float step = 1.f / (1 << at);
  return fmaf(asFloat((word & ((1u << bits) - 1) << at) | 0x4b000000u), step, -((1 << (23 - at)) + zero));
}

template <>
struct Stored<Format::int8> {
  static constexpr int perWord = 4;
  MOE_DEVICE void unpack(float* v, uint32_t word) {
    const uint32_t high = word >> 16;
    v[0] = wholeNumber<0, 8, 128>(word), v[1] = wholeNumber<8, 8, 128>(word);
    v[2] = wholeNumber<0, 8, 128>(high), v[3] = wholeNumber<8, 8, 128>(high);
  }
};

template <>
struct Stored<Format::int4> {
  static constexpr int perWord = 8;
  MOE_DEVICE void unpack(float* v, uint32_t word) {
    const uint32_t high = word >> 16;
    v[0] = wholeNumber<0, 4, 8>(word), v[1] = wholeNumber<4, 4, 8>(word), v[2] = wholeNumber<8, 4, 8>(word), v[3] = wholeNumber<12, 4, 8>(word);
    v[4] = wholeNumber<0, 4, 8>(high), v[5] = wholeNumber<4, 4, 8>(high), v[6] = wholeNumber<8, 4, 8>(high), v[7] = wholeNumber<12, 4, 8>(high);
  }
};

template <Format F>
MOE_DEVICE int64_t rowBytes(int columns) {
  return divUp((int64_t)columns * 4, (int64_t)Stored<F>::perWord);
}

/// 8 stored values, aligned to their size.
template <Format F>
struct alignas(32 / Stored<F>::perWord) Eight {
  static constexpr int words = 8 / Stored<F>::perWord;
  uint32_t v[words];

  /// Loads the values at column `at`, a multiple of 8, as is the number of columns.
  MOE_DEVICE Eight load(const unsigned char* row, int at) { return *(const Eight*)(row + at / Stored<F>::perWord * 4); }
  __device__ void unpack(float (&values)[8]) const {
#pragma unroll
    for (int i = 0; i < words; i++) Stored<F>::unpack(values + i * Stored<F>::perWord, v[i]);
  }
};

/// One value of a row of any length.
template <Format F>
MOE_DEVICE float storedValue(const unsigned char* row, int column) {
  uint32_t word;
  if constexpr (F == Format::bf16) word = ((const uint16_t*)row)[column];
  else if constexpr (F == Format::int4) word = row[column / 2] >> column % 2 * 4;
  else word = row[column];
  float values[Stored<F>::perWord];
  Stored<F>::unpack(values, word);
  return values[0];
}

/// The scale of a column: the number of its block of `size` columns, and the column's position within the block.
struct ScaleBlock {
  int block, within, size;
  MOE_DEVICE ScaleBlock of(int column, int size) { return {column / size, column % size, size}; }
  __device__ void advance(int blocks, int columns) {
    block += blocks, within += columns;
    if (within >= size) within -= size, block++;
  }
};

/// Columns at .. at + 7 of a row times their scales (which start with those of the row's first column), zeros from
/// column `columns` on. Sizes are arbitrary.
template <Format F>
MOE_DEVICE void loadScaled(float (&values)[8], const unsigned char* row, const float* scales, ScaleBlock block, int at, int columns) {
#pragma unroll
  for (int i = 0; i < 8; i++) {
    values[i] = 0.f;
    if (at + i < columns) values[i] = storedValue<F>(row, at + i) * (F == Format::bf16 ? 1.f : scales[block.block]);
    block.advance(0, 1);
  }
}
