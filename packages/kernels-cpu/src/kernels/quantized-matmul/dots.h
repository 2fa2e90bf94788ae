// Dot products of a few rows of x with bf16 and fp8 weights: each weight is read once, decoded in registers and multiplied with all rows.
// Memory bandwidth is the limit, so decoding must be cheap enough to keep up with it: see formats.h.
#pragma once

#include "formats.h"

namespace moe {
namespace {

// Weights per register, and the most rows of x that one pass over the weights multiplies.
template <class W>
constexpr int64_t group_size = W::per * lanes;
constexpr int64_t most_rows = 4;
// The most accumulators for one row of the weight that leave enough registers for a second row.
#if defined(__aarch64__)
constexpr int most_chains = 8;
#else
constexpr int most_chains = 4;
#endif

// Packs a row of x for weights W: groups of `per` vectors, where vector j contains the elements that multiply weight j of each lane.
// The last group is padded with zeros.
template <class W>
void pack_x(const float* x, int64_t k, float* packed) {
  const int64_t group = group_size<W>, groups = (k + group - 1) / group;
  for (int64_t g = 0; g < groups; ++g) {
    float* to = packed + g * group;
    const int64_t most = std::min(group, k - g * group);
    const float* from = x + g * group;
    for (int l = 0; l < lanes; ++l) {
      for (int j = 0; j < W::per; ++j) {
        const int64_t i = W::in_order ? j * lanes + l : l * W::per + j;
        to[j * lanes + l] = i < most ? from[i] : 0.0f;
      }
    }
  }
}

// Independent accumulators for each row of x, so that about four additions are in flight. For bf16 weights on Arm, the fastest to decode, there are up to
// sixteen with two rows of the weight: four units with a latency of four cycles.
template <class W, int M>
constexpr int chains = M == 1 ? (W::per < 4 ? W::per : 4) : M == 2 ? 2 : 1;
#if defined(__aarch64__)
template <int M>
constexpr int chains<Bf16Weights, M> = M == 1 ? 8 : M == 2 ? 4 : 2;
#endif
// Registers of a row of the weight per iteration. On Arm, where a prefetch costs as much as a load, they make up a cache line.
#if defined(__aarch64__)
constexpr int at_once = 4;
#else
constexpr int at_once = 1;
#endif

template <class W, int j = 0, int first = 0>
struct Decode {
  // Adds to `sums` the products of x with weights j, j + 1, .. of each lane, for R rows of the weight. Accumulators take turns, starting with `first`.
  template <int R, int M>
  MOE_INLINE void multiply(const i32v (&v)[R], const float* const* x, int64_t at, f32v (&sums)[R][M][chains<W, M>]) {
    f32v w[R];
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r) w[r] = W::template get<j>(v[r]);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const f32v numbers = load(x[m] + at + j * lanes);
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r) {
        f32v& sum = sums[r][m][(first + j) % chains<W, M>];
        sum = fma(w[r], numbers, sum);
      }
    }
    if constexpr (j + 1 < W::per) Decode<W, j + 1, first>::template multiply<R, M>(v, x, at, sums);
  }
};

template <int n>
MOE_INLINE f32v joined(const f32v (&sums)[n]) {
  if constexpr (n == 8) return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
  if constexpr (n == 4) return (sums[0] + sums[1]) + (sums[2] + sums[3]);
  if constexpr (n == 2) return sums[0] + sums[1];
  return sums[0];
}

// Calls body(0), body(1), .. with compile-time constants.
template <int count, int first = 0, class F>
MOE_INLINE void each_turn(F&& body) {
  body(std::integral_constant<int, first>());
  if constexpr (first + 1 < count) each_turn<count, first + 1>(body);
}

struct Dots {
  const float* x[most_rows];  // packed by pack_x
  float* y[most_rows];
  const uint8_t* q;
  const float* scale;
  int64_t row_bytes;
  int64_t block_rows;
  int64_t scale_columns;
  int64_t run;  // consecutive groups that share a scale
};

// Prefetch distance in bytes; and that for bf16 and fp8, which AVX-512 multiplies faster than memory delivers them.
constexpr int64_t ahead = 2048, floats_ahead = lanes == 16 ? 8192 : ahead;

// Multiplies R rows of the weight, from `row` on, with M rows of x. Results are the same, bit for bit, for every R. R is at most 2, because
// memory is fastest when it is read sequentially.
template <class W, int R, int M>
MOE_INLINE void dot_rows(const Dots& d, int64_t row) {
  constexpr bool scaled = W::scaled;
  constexpr int64_t bytes = lanes * 4;
  const int64_t full = d.row_bytes / bytes;
  const int64_t rest = d.row_bytes % bytes;
  const int64_t groups = full + (rest != 0);
  const uint8_t* const from = d.q + row * d.row_bytes;
  const float* scales[R] = {};
  if (scaled) {
    for (int r = 0; r < R; ++r) scales[r] = d.scale + (row + r) / d.block_rows * d.scale_columns;
  }
  f32v total[R][M] = {};
  f32v sums[R][M][chains<W, M>] = {};
  i32v nans[R] = {};
  const auto multiply = [&](int64_t g, int64_t there, auto turn) MOE_CLANG_INLINE {
    i32v v[R] = {};
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r) {
      std::memcpy(&v[r], from + r * d.row_bytes + g * bytes, static_cast<size_t>(there));
      if constexpr (std::is_same_v<W, Fp8Weights>) nans[r] |= fp8_nans(v[r]);
    }
    Decode<W, 0, turn * W::per>::template multiply<R, M>(v, d.x, g * group_size<W>, sums);
  };
  const int64_t run = scaled ? d.run : groups;
  for (int64_t g = 0, block = 0; g < groups; ++block) {
    const int64_t end = std::min(groups, g + run), whole = std::min(full, end);
    if constexpr (scaled) {
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
          for (f32v& sum : sums[r][m]) sum = zero();
        }
      }
    }
    using First = std::integral_constant<int, 0>;
    if constexpr (at_once > 1) {
      for (; g + at_once <= whole; g += at_once) {
#pragma GCC unroll 2
        for (int r = 0; r < R; ++r) __builtin_prefetch(from + (R * g + r * at_once) * bytes + floats_ahead);
        each_turn<at_once>([&](auto turn) __attribute__((always_inline)) { multiply(g + turn, bytes, turn); });
      }
    }
    for (; g < whole; ++g) {
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r) __builtin_prefetch(from + (R * g + r) * bytes + floats_ahead);
      multiply(g, bytes, First());
    }
    if (g < end) multiply(g++, rest, First());
    if constexpr (scaled) {
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) total[r][m] = fma(joined(sums[r][m]), splat(scales[r][block] * W::unit), total[r][m]);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int m = 0; m < M; ++m) {
      const float y = sum(scaled ? total[r][m] : joined(sums[r][m]));
      d.y[m][row + r] = std::is_same_v<W, Fp8Weights> && any(nans[r] != 0) ? __builtin_nanf("") : y;
    }
  }
}

template <class W, int M>
void dot_range(const Dots& d, int64_t begin, int64_t end) {
  // Two rows of the weight share the loads of x if there are enough registers.
  constexpr int R = M * chains<W, M> <= most_chains ? 2 : 1;
  int64_t row = begin;
  for (; row + R <= end; row += R) dot_rows<W, R, M>(d, row);
  for (; row < end; ++row) dot_rows<W, 1, M>(d, row);
}

// Multiplies rows begin .. end - 1 of the weight with `rows` (1 .. most_rows) rows of x.
template <class W>
void dots(const Dots& d, int64_t rows, int64_t begin, int64_t end) {
  switch (rows) {
    case 1: return dot_range<W, 1>(d, begin, end);
    case 2: return dot_range<W, 2>(d, begin, end);
    case 3: return dot_range<W, 3>(d, begin, end);
    default: return dot_range<W, 4>(d, begin, end);
  }
}

}  // namespace
}  // namespace moe
