// Stored weights in registers. A register of stored weights is taken as 32-bit lanes with `per` weights each; weight j of every lane
// comes out with one to four operations and no shuffle. x is laid out to match.
#pragma once

#include "convert.h"
#include "moe.h"

namespace moe {
namespace {

enum class Format : int { bf16, fp8, int8, int4 };

MOE_INLINE i32v load_bytes(const uint8_t* from) {
  i32v v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

struct Bf16Weights {
  static constexpr int per = 2;
  static constexpr bool scaled = false;
  template <int j>
  MOE_INLINE f32v get(i32v v) {
    return from_bits(j == 0 ? v << 16 : v & static_cast<int32_t>(0xffff0000));
  }
};

struct Fp8Weights {
  static constexpr int per = 4;
  static constexpr bool scaled = true;
  // Sign and exponent of f32 are reached by an arithmetic shift; 2^120 mends the bias, and makes subnormals right as well.
  template <int j>
  MOE_INLINE f32v get(i32v v) {
    const i32v top = j == 3 ? v : v << (24 - 8 * j);
    return from_bits((top >> 4) & static_cast<int32_t>(0x87f00000)) * splat(1.329227995784916e36f);
  }
};

// Multiplied as whole numbers: see integer-dots.h and nibble-dots.h.
struct Int8Weights {
  static constexpr int per = 4;
  static constexpr int zero = 128;
};

struct Int4Weights {
  static constexpr int per = 8;
  static constexpr int zero = 8;
};

// Bytes that are NaN in f8e4m3 as nonzero bytes.
MOE_INLINE i32v fp8_nans(i32v v) {
  typedef uint8_t bytes __attribute__((vector_size(MOE_LANES * 4)));
  return (i32v)(((bytes)v & 0x7f) == 0x7f);
}

// As many halves of bytes as there are lanes, in order: of eight lanes each has the same word and shifts it by its own place.
MOE_INLINE i32v nibbles(const uint8_t* from) {
  uint32_t words[(lanes + 7) / 8] = {};
  std::memcpy(words, from, lanes / 2);
  u32v v, places;
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i) v[i] = words[i / 8], places[i] = static_cast<uint32_t>(4 * (i % 8));
  return (i32v)(v >> places & 15);
}

// Row `row` of a stored matrix [n, k] as f32.
MOE_INLINE void decode_row(Format format, const uint8_t* q, const float* scales, int64_t k, int64_t block_columns, float* to) {
  if (format == Format::bf16) {
    const uint16_t* from = reinterpret_cast<const uint16_t*>(q);
    int64_t i = 0;
    for (; i + lanes <= k; i += lanes) store(to + i, from_bf16(load(from + i)));
    for (; i < k; ++i) {
      const uint32_t code = static_cast<uint32_t>(from[i]) << 16;
      std::memcpy(to + i, &code, 4);
    }
    return;
  }
  for (int64_t begin = 0, block = 0; begin < k; begin += block_columns, ++block) {
    const int64_t end = std::min(k, begin + block_columns);
    const float scale = scales[block];
    if (format == Format::int8) {
      for (int64_t i = begin; i < end; ++i) to[i] = static_cast<float>(q[i] - 128) * scale;
    } else if (format == Format::int4) {
      int64_t i = begin;
      for (; i + lanes <= end; i += lanes) store(to + i, to_f32(nibbles(q + i / 2) - Int4Weights::zero) * splat(scale));
      for (; i < end; ++i) to[i] = static_cast<float>(((q[i >> 1] >> (4 * (i & 1))) & 15) - Int4Weights::zero) * scale;
    } else {
      for (int64_t i = begin; i < end; i += lanes) {
        const int count = static_cast<int>(std::min<int64_t>(lanes, end - i));
        u8v codes{};
        std::memcpy(&codes, q + i, static_cast<size_t>(count));
        store_some(to + i, from_f8e4m3(codes) * splat(scale), count);
      }
    }
  }
}

}  // namespace
}  // namespace moe
