// Products of few rows with bf16 and fp8 weights: every weight is read once, decoded in registers and multiplied with all rows. Memory sets
// the pace, so decoding must take no more instructions than the memory's pace leaves: see formats.h.
#pragma once

#include "formats.h"

namespace moe {
namespace {

// Weights of a register, and rows of x that one pass over the weights serves.
template <class W>
constexpr int64_t group_size = W::per * lanes;
constexpr int64_t most_rows = 4;

// x of a row for weights W: groups of `per` vectors, vector j with what multiplies weight j of each lane, zeros behind k.
template <class W>
void pack_x(const float* x, int64_t k, float* packed) {
  const int64_t group = group_size<W>, groups = (k + group - 1) / group;
  for (int64_t g = 0; g < groups; ++g) {
    float* to = packed + g * group;
    const int64_t most = std::min(group, k - g * group);
    const float* from = x + g * group;
    for (int l = 0; l < lanes; ++l) {
      for (int j = 0; j < W::per; ++j) {
        const int64_t i = l * W::per + j;
        to[j * lanes + l] = i < most ? from[i] : 0.0f;
      }
    }
  }
}

// Chains of additions for each row of x, so that there are about four at once.
template <class W, int M>
constexpr int chains = M == 1 ? (W::per < 4 ? W::per : 4) : M == 2 ? 2 : 1;

template <class W, int j = 0>
struct Decode {
  // sums += weights j.. of each lane times x.
  template <int M>
  MOE_INLINE void multiply(i32v v, const float* const* x, int64_t at, f32v (&sums)[M][chains<W, M>]) {
    const f32v w = W::template get<j>(v);
    for (int m = 0; m < M; ++m) {
      f32v& sum = sums[m][j % chains<W, M>];
      sum = fma(w, load(x[m] + at + j * lanes), sum);
    }
    if constexpr (j + 1 < W::per) Decode<W, j + 1>::template multiply<M>(v, x, at, sums);
  }
};

template <int n>
MOE_INLINE f32v joined(const f32v (&sums)[n]) {
  if constexpr (n == 4) return (sums[0] + sums[1]) + (sums[2] + sums[3]);
  if constexpr (n == 2) return sums[0] + sums[1];
  return sums[0];
}

struct Dots {
  const float* x[most_rows];  // packed
  float* y[most_rows];
  const uint8_t* q;
  const float* scale;
  int64_t row_bytes;
  int64_t block_rows;
  int64_t scale_columns;
  int64_t run;  // groups with one scale
};

// How far ahead of the weights memory is asked for.
constexpr int64_t ahead = 2048;

// One row of the weight times M rows of x. Rows are taken one after another, because memory is fastest when it is read in order.
template <class W, int M>
MOE_INLINE void dot_row(const Dots& d, int64_t row) {
  constexpr bool scaled = W::scaled;
  constexpr int64_t bytes = lanes * 4;
  const int64_t full = d.row_bytes / bytes;
  const int64_t rest = d.row_bytes % bytes;
  const int64_t groups = full + (rest != 0);
  const uint8_t* from = d.q + row * d.row_bytes;
  const float* scale = scaled ? d.scale + row / d.block_rows * d.scale_columns : nullptr;
  f32v total[M] = {};
  f32v sums[M][chains<W, M>] = {};
  i32v nans{};
  const int64_t run = scaled ? d.run : groups;
  for (int64_t g = 0, block = 0; g < groups; ++block) {
    const int64_t end = std::min(groups, g + run), whole = std::min(full, end);
    if constexpr (scaled) {
      for (int m = 0; m < M; ++m) {
        for (f32v& sum : sums[m]) sum = zero();
      }
    }
    for (; g < whole; ++g) {
      __builtin_prefetch(from + g * bytes + ahead);
      const i32v v = load_bytes(from + g * bytes);
      if constexpr (std::is_same_v<W, Fp8Weights>) nans |= fp8_nans(v);
      Decode<W>::template multiply<M>(v, d.x, g * group_size<W>, sums);
    }
    if (g < end) {
      i32v v{};
      std::memcpy(&v, from + g * bytes, static_cast<size_t>(rest));
      if constexpr (std::is_same_v<W, Fp8Weights>) nans |= fp8_nans(v);
      Decode<W>::template multiply<M>(v, d.x, g * group_size<W>, sums);
      ++g;
    }
    if constexpr (scaled) {
      const f32v s = splat(scale[block]);
      for (int m = 0; m < M; ++m) total[m] = fma(joined(sums[m]), s, total[m]);
    }
  }
  for (int m = 0; m < M; ++m) {
    const float y = sum(scaled ? total[m] : joined(sums[m]));
    d.y[m][row] = std::is_same_v<W, Fp8Weights> && any(nans != 0) ? __builtin_nanf("") : y;
  }
}

template <class W, int M>
void dot_range(const Dots& d, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) dot_row<W, M>(d, row);
}

// Rows begin .. end of the weight times `rows` (1 .. most_rows) rows of x.
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
