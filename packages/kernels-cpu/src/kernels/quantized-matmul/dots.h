// Products of few rows with stored weights: every weight is read once, decoded in registers and multiplied with all rows. Memory sets
// the pace, so decoding must take no more instructions than the memory's pace leaves: see formats.h.
#pragma once

#include "formats.h"

namespace moe {
namespace {

// Weights of a register, and rows of x that one pass over the weights serves.
template <class W>
constexpr int64_t group_size = W::per * lanes;
constexpr int64_t most_rows = 4;

// Scales lie one per group or coarser; or, for int4 in runs of 32, several to a group: then a lane's scale is that of its run.
enum class Scales { none, groups, runs };

// x of a row for weights W: groups of `per` vectors, vector j with what multiplies weight j of each lane, zeros behind k.
// `starts`, one vector per run of `run` groups: what the zero point takes off.
template <class W>
void pack_x(const float* x, int64_t k, int64_t run, float* packed, float* starts) {
  const int64_t group = group_size<W>, groups = (k + group - 1) / group;
  for (int64_t g = 0; g < groups; ++g) {
    float* to = packed + g * group;
    const int64_t most = std::min(group, k - g * group);
    const float* from = x + g * group;
    float lane_sums[lanes] = {};
    for (int l = 0; l < lanes; ++l) {
      for (int j = 0; j < W::per; ++j) {
        const int64_t i = l * W::per + j;
        const float value = i < most ? from[i] : 0.0f;
        to[j * lanes + l] = value * W::x_factor(j);
        lane_sums[l] += value;
      }
    }
    if (W::zero == 0) continue;
    float* start = starts + g / run * lanes;
    for (int l = 0; l < lanes; ++l) start[l] = (g % run == 0 ? 0.0f : start[l]) - W::zero * lane_sums[l];
  }
}

template <class W, int j = 0>
struct Decode {
  // sums[m] += weight j.. of each lane times x; two chains of additions for a single row, one each for more.
  template <int M, int chains>
  MOE_INLINE void multiply(i32v v, const float* const* x, int64_t at, f32v (&sums)[M * chains]) {
    const f32v w = W::template get<j>(v);
    for (int m = 0; m < M; ++m) {
      f32v& sum = sums[m * chains + j % chains];
      sum = fma(w, load(x[m] + at + j * lanes), sum);
    }
    if constexpr (j + 1 < W::per) Decode<W, j + 1>::template multiply<M, chains>(v, x, at, sums);
  }
};

// The scale of each lane where lanes * 8 weights are runs of 32.
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

struct Dots {
  const float* x[most_rows];       // packed
  const float* starts[most_rows];  // where the zero point is not 0
  float* y[most_rows];
  const uint8_t* q;
  const float* scale;
  int64_t k;
  int64_t row_bytes;
  int64_t block_rows;
  int64_t scale_columns;
  int64_t run;  // groups with one scale
};

// R rows of the weight, from `row`, times M rows of x.
template <class W, Scales kind, int R, int M>
MOE_INLINE void dot_rows(const Dots& d, int64_t row) {
  constexpr int chains = M == 1 ? 2 : 1;
  constexpr bool scaled = kind != Scales::none;
  constexpr int64_t bytes = lanes * 4;
  const int64_t full = d.row_bytes / bytes;
  const bool rest = d.row_bytes % bytes != 0;
  const int64_t groups = full + rest;
  const uint8_t* from[R];
  const float* scale[R];
  for (int r = 0; r < R; ++r) {
    from[r] = d.q + (row + r) * d.row_bytes;
    scale[r] = scaled ? d.scale + (row + r) / d.block_rows * d.scale_columns : nullptr;
  }
  f32v total[R * M] = {};
  i32v nans[R] = {};
  f32v sums[R][M * chains] = {};
  const int64_t run = scaled ? d.run : groups;
  for (int64_t g = 0, block = 0; g < groups; ++block) {
    const int64_t end = std::min(groups, g + run);
    if constexpr (scaled) {
      for (int r = 0; r < R; ++r)
        for (int m = 0; m < M; ++m) {
          sums[r][m * chains] = W::zero == 0 ? zero() : load(d.starts[m] + block * lanes);
          if (chains == 2) sums[r][m * chains + chains - 1] = zero();
        }
    }
    const auto step = [&](const i32v(&v)[R]) {
      for (int r = 0; r < R; ++r) {
        if constexpr (std::is_same_v<W, Fp8Weights>) nans[r] |= fp8_nans(v[r]);
        Decode<W>::template multiply<M, chains>(v[r], d.x, g * group_size<W>, sums[r]);
      }
      ++g;
    };
    for (const int64_t whole = std::min(full, end); g < whole;) {
      i32v v[R];
      for (int r = 0; r < R; ++r) v[r] = load_bytes(from[r] + g * bytes);
      step(v);
    }
    if (g < end) {
      i32v v[R] = {};
      for (int r = 0; r < R; ++r) std::memcpy(&v[r], from[r] + g * bytes, static_cast<size_t>(d.row_bytes - g * bytes));
      step(v);
    }
    if constexpr (scaled) {
      for (int r = 0; r < R; ++r) {
        const f32v s = kind == Scales::runs ? run_scales(scale[r] + block * (lanes / 4), d.scale_columns - block * (lanes / 4))
                                            : splat(scale[r][block]);
        for (int m = 0; m < M; ++m) {
          const f32v sum = chains == 2 ? sums[r][m * chains] + sums[r][m * chains + chains - 1] : sums[r][m];
          total[r * M + m] = fma(sum, s, total[r * M + m]);
        }
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) {
      if constexpr (!scaled) total[r * M + m] = chains == 2 ? sums[r][m * chains] + sums[r][m * chains + chains - 1] : sums[r][m];
      const float y = sum(total[r * M + m]);
      d.y[m][row + r] = std::is_same_v<W, Fp8Weights> && any(nans[r] != 0) ? __builtin_nanf("") : y;
    }
}

template <class W, Scales kind, int M>
void dot_range(const Dots& d, int64_t begin, int64_t end) {
  constexpr int R = M == 1 ? 4 : 2;
  int64_t row = begin;
  for (; row + R <= end; row += R) dot_rows<W, kind, R, M>(d, row);
  for (; row < end; ++row) dot_rows<W, kind, 1, M>(d, row);
}

// Rows begin .. end of the weight times `rows` (1 .. most_rows) rows of x.
template <class W, Scales kind>
void dots(const Dots& d, int64_t rows, int64_t begin, int64_t end) {
  switch (rows) {
    case 1: return dot_range<W, kind, 1>(d, begin, end);
    case 2: return dot_range<W, kind, 2>(d, begin, end);
    case 3: return dot_range<W, kind, 3>(d, begin, end);
    default: return dot_range<W, kind, 4>(d, begin, end);
  }
}

}  // namespace
}  // namespace moe
