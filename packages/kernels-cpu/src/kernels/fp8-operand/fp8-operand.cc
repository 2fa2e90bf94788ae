// Rounds operands of products with precision 'fp8': the results are f32 numbers that are f8e4m3 values times a power of two, which every 128 elements along
// k share.
#include <vector>

#include "../grouped-matmul/ranges.h"
#include "convert.h"
#include "moe.h"

using namespace moe;

namespace {

constexpr int64_t tile = 128;
constexpr int64_t stripe = 64;  // columns; with `tile` rows they fill L1

// The larger magnitude, as integers, which sort like the floats; NaN and infinity are larger than all others.
MOE_INLINE i32v larger(i32v top, f32v x) {
  const i32v magnitude = bits(x) & 0x7fffffff;
  return select(magnitude > top, magnitude, top);
}

// A scale and its inverse.
struct Scale {
  f32v up, down;
};
MOE_INLINE f32v round(f32v x, const Scale& scale) { return from_f8e4m3(to_f8e4m3(x * scale.down)) * scale.up; }
// Returns 2^e (and its inverse) with the smallest e >= -100 for which the largest magnitude is at most 448 * 2^e; 448 = 1.75 * 2^8 is the largest f8e4m3.
// NaN and infinity give NaN.
MOE_INLINE Scale scale_for(i32v largest) {
  const i32v least = ((largest + 0x1fffff) >> 23) - 135;
  const i32v e = select(least < -100, splat(-100), least);
  const i32v up = select(largest >= 0x7f800000, splat(0x7fc00000), (e + 127) << 23);
  return {from_bits(up), from_bits((127 - e) << 23)};
}

// Rounds a tile of `rows` x `columns`; each column has its own scale, and a vector computes `lanes` of them.
void round_columns(float* y, const float* x, int64_t rows, int64_t columns, int64_t stride) {
  each_vector(columns, [&](int64_t c, int count) {
    i32v top = i32v{};
    for (int64_t r = 0; r < rows; r++) top = larger(top, load_some(x + r * stride + c, count));
    const Scale scale = scale_for(top);
    for (int64_t r = 0; r < rows; r++) store_some(y + r * stride + c, round(load_some(x + r * stride + c, count), scale), count);
  });
}

}  // namespace

// (y [rows, k], x [rows, k], rows, k): k is contiguous
MOE_KERNEL(moe_fp8_operand_along) {
  float* y = args.ptr<float>();
  const float* x = args.ptr<const float>();
  const int64_t rows = args.size(), k = args.size();
  parallel_for(rows, 8192 / (k + 1), [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; r++) {
      for (int64_t first = 0; first < k; first += tile) {
        const int64_t size = std::min(tile, k - first), at = r * k + first;
        i32v top = i32v{};
        each_vector(size, [&](int64_t i, int count) { top = larger(top, load_some(x + at + i, count)); });
        int32_t largest = 0;
        for (int i = 0; i < lanes; i++) largest = std::max(largest, top[i]);
        const Scale scale = scale_for(splat(largest));
        each_vector(size, [&](int64_t i, int count) { store_some(y + at + i, round(load_some(x + at + i, count), scale), count); });
      }
    }
  });
}

// (y [rows, columns], x [rows, columns], offsets or null, rows, columns, runs): k runs along the rows, in `runs` runs of equal length, or as given by
// offsets [runs + 1]. Rows outside of all runs are not written.
MOE_KERNEL(moe_fp8_operand_across) {
  float* y = args.ptr<float>();
  const float* x = args.ptr<const float>();
  const int32_t* offsets = args.ptr<const int32_t>();
  const int64_t rows = args.size(), columns = args.size(), runs = args.size();
  struct Tile {
    int64_t row, size;
  };
  std::vector<Tile> tiles;
  auto cut = [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row += tile) tiles.push_back({row, std::min(tile, end - row)});
  };
  if (offsets == nullptr) {
    for (int64_t run = 0; run < runs; run++) cut(rows / runs * run, rows / runs * (run + 1));
  } else {
    const Ranges ranges(offsets, runs, rows);
    for (int64_t run = 0; run < runs; run++) cut(ranges.begin(run), ranges.begin(run) + ranges.size(run));
  }
  const int64_t stripes = (columns + stripe - 1) / stripe;
  parallel_for(static_cast<int64_t>(tiles.size()) * stripes, 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; i++) {
      const Tile& t = tiles[static_cast<size_t>(i / stripes)];
      const int64_t first = i % stripes * stripe, at = t.row * columns + first;
      round_columns(y + at, x + at, t.size, std::min(stripe, columns - first), columns);
    }
  });
}
