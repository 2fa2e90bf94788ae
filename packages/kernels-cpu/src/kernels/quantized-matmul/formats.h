// Decodes stored weights, in registers or to memory. A register of stored weights is treated as 32-bit lanes with `per` weights each. Weight j of every
// lane is extracted with one to four operations and no shuffle. If NEON widens them in order (`in_order`), vector j contains the weights from j * lanes
// on instead. x is packed to match.
#pragma once

#include "convert.h"
#include "moe.h"

namespace moe {
namespace {

// For lambdas that Clang has to inline. GCC inlines them without the attribute, and then also more of the code around them.
#if defined(__clang__)
#define MOE_CLANG_INLINE __attribute__((always_inline))
#else
#define MOE_CLANG_INLINE
#endif

enum class Format : int { bf16, fp8, int8, int4 };

MOE_INLINE i32v load_bytes(const uint8_t* from) {
  i32v v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

struct Bf16Weights {
  static constexpr int per = 2;
  static constexpr bool scaled = false, in_order = false;
  template <int j>
  MOE_INLINE f32v get(i32v v) {
    return from_bits(j == 0 ? v << 16 : v & static_cast<int32_t>(0xffff0000));
  }
};

struct Fp8Weights {
  static constexpr int per = 4;
  static constexpr bool scaled = true;
#if defined(__aarch64__)
  // Widened, shifted and masked, the bits of fp8 are those of f16 except for the exponent bias, which `unit` corrects. That also holds for subnormals.
  static constexpr bool in_order = true;
  static constexpr float unit = 256;
  template <int j>
  MOE_INLINE f32v get(i32v v) {
    const int16x8_t wide = j < 2 ? vshll_n_s8(vget_low_s8((int8x16_t)v), 7) : vshll_high_n_s8((int8x16_t)v, 7);
    const int16x8_t half = vandq_s16(wide, vdupq_n_s16(static_cast<int16_t>(0xbfff)));
    f32v weights;
    // Inline assembly, because Clang would extract the upper half first and mask each half separately.
    if constexpr (j % 2 == 0)
      asm("fcvtl %0.4s, %1.4h" : "=w"(weights) : "w"(half));
    else
      asm("fcvtl2 %0.4s, %1.8h" : "=w"(weights) : "w"(half));
    return weights;
  }
#else
  static constexpr bool in_order = false;
  static constexpr float unit = 1;
  // An arithmetic shift aligns sign, exponent and mantissa with those of f32. The factor 2^120 corrects the exponent bias, also for subnormals.
  template <int j>
  MOE_INLINE f32v get(i32v v) {
    const i32v top = j == 3 ? v : v << (24 - 8 * j);
    return from_bits((top >> 4) & static_cast<int32_t>(0x87f00000)) * splat(1.329227995784916e36f);
  }
#endif
};

// int8 and int4 weights are multiplied as integers: see integer-dots.h and nibble-dots.h.
struct Int8Weights {
  static constexpr int per = 4;
  static constexpr int zero = 128;
};

struct Int4Weights {
  static constexpr int per = 8;
  static constexpr int zero = 8;
};

// Returns a nonzero byte for each byte that is NaN in f8e4m3, zero for the others.
MOE_INLINE i32v fp8_nans(i32v v) {
  typedef uint8_t bytes __attribute__((vector_size(MOE_LANES * 4)));
  return (i32v)(((bytes)v & 0x7f) == 0x7f);
}

// Expands `lanes` nibbles, in order, to 32-bit lanes: every eight lanes get the same 32-bit word, and each lane shifts its nibble down. The words are
// combined in registers, because loading a vector right after storing its halves stalls until the stores complete.
MOE_INLINE i32v nibbles(const uint8_t* from) {
  static_assert(lanes <= 16, "two words");
  uint32_t words[2] = {};
  std::memcpy(words, from, lanes / 2);
  u32v places, second;
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i) places[i] = static_cast<uint32_t>(4 * (i % 8)), second[i] = i < 8 ? 0 : ~0u;
  u32v v = u32v{} + words[0];
  if (lanes > 8) v = (v & ~second) | ((u32v{} + words[1]) & second);
  return (i32v)(v >> places & 15);
}

// A stored weight `[n, k]`, or one for each expert.
struct Stored {
  const uint8_t* q;
  const float* scale;
  int64_t n, k;
  Format format;
  int64_t block_rows, block_columns;

  int64_t row_bytes() const { return bytes_before(k + (format == Format::int4)); }
  int64_t scale_columns() const { return block_columns ? (k + block_columns - 1) / block_columns : 0; }
  int64_t scale_rows() const { return (n + block_rows - 1) / block_rows; }

  // Decodes columns begin .. end - 1 of a row to f32. For int4, `begin` must be even.
  void decode(int64_t expert, int64_t row, int64_t begin, int64_t end, float* to) const {
    const uint8_t* from = q + (expert * n + row) * row_bytes() + bytes_before(begin);
    if (format == Format::bf16) return decode_bf16(reinterpret_cast<const uint16_t*>(from), end - begin, to);
    const float* scales = scale + (expert * scale_rows() + row / block_rows) * scale_columns();
    for (int64_t i = begin; i < end;) {
      const int64_t block = i / block_columns, count = std::min(end, (block + 1) * block_columns) - i;
      decode_run(from, scales[block], count, to);
      i += count, from += bytes_before(count), to += count;
    }
  }

 private:
  int64_t bytes_before(int64_t column) const { return format == Format::bf16 ? 2 * column : format == Format::int4 ? column / 2 : column; }

  static void decode_bf16(const uint16_t* from, int64_t count, float* to) {
    int64_t i = 0;
    for (; i + lanes <= count; i += lanes) store(to + i, from_bf16(load(from + i)));
    for (; i < count; ++i) {
      const uint32_t code = static_cast<uint32_t>(from[i]) << 16;
      std::memcpy(to + i, &code, 4);
    }
  }

  // Decodes `count` weights that share a scale.
  void decode_run(const uint8_t* from, float scale, int64_t count, float* to) const {
    int64_t i = 0;
    if (format == Format::int8) {
      for (; i < count; ++i) to[i] = static_cast<float>(from[i] - 128) * scale;
    } else if (format == Format::int4) {
      for (; i + lanes <= count; i += lanes) store(to + i, to_f32(nibbles(from + i / 2) - Int4Weights::zero) * splat(scale));
      for (; i < count; ++i) to[i] = static_cast<float>(((from[i >> 1] >> (4 * (i & 1))) & 15) - Int4Weights::zero) * scale;
    } else {
      u8v codes{};
      for (; i + lanes <= count; i += lanes) {
        std::memcpy(&codes, from + i, lanes);
        store(to + i, from_f8e4m3(codes) * splat(scale));
      }
      const int rest = static_cast<int>(count - i);
      std::memcpy(&codes, from + i, static_cast<size_t>(rest));
      store_some(to + i, from_f8e4m3(codes) * splat(scale), rest);
    }
  }
};

}  // namespace
}  // namespace moe
