// Sums and maxima over the middle axis of [outer, count, inner]: (y [outer, inner], x, outer, count, inner).
//
// The order of additions depends on the sizes only: rows are split into blocks, a block is summed in vector lanes, and block results are combined in order,
// in double precision. So the rounding error does not grow with the number of blocks.
#include "moe.h"

using namespace moe;

namespace {

struct Sum {
  static float start() { return 0; }
  static f32v combine(f32v a, f32v b) { return a + b; }
  static float fold(f32v x) { return sum(x); }
  using Total = double;
  static void add(double& total, float part) { total += part; }
  static int32_t combine(int32_t a, int32_t b) { return static_cast<int32_t>(static_cast<uint32_t>(a) + static_cast<uint32_t>(b)); }
  static int32_t start_i32() { return 0; }
};

struct Max {
  static float start() { return -std::numeric_limits<float>::infinity(); }
  static f32v combine(f32v a, f32v b) { return nan_max(a, b); }
  static float fold(f32v x) { return any(x != x) ? std::numeric_limits<float>::quiet_NaN() : max(x); }
  using Total = float;
  static void add(float& total, float part) { total = part > total || part != part ? part : total; }
  static int32_t combine(int32_t a, int32_t b) { return a > b ? a : b; }
  static int32_t start_i32() { return std::numeric_limits<int32_t>::min(); }
};

constexpr int64_t row_block = 4096;

template <class Op>
float reduce_block(const float* x, int64_t n) {
  f32v acc[4];
  for (auto& a : acc) a = splat(Op::start());
  int64_t i = 0;
  for (; i + 4 * lanes <= n; i += 4 * lanes) {
    for (int v = 0; v < 4; v++) acc[v] = Op::combine(acc[v], load(x + i + v * lanes));
  }
  for (int v = 0; i < n; i += lanes, v = (v + 1) & 3) {
    const int count = static_cast<int>(std::min<int64_t>(lanes, n - i));
    acc[v] = Op::combine(acc[v], load_some(x + i, count, Op::start()));
  }
  return Op::fold(Op::combine(Op::combine(acc[0], acc[1]), Op::combine(acc[2], acc[3])));
}

template <class Op>
void reduce_rows(float* y, const float* x, int64_t rows, int64_t n) {
  const int64_t blocks = (n + row_block - 1) / row_block;
  const auto total = [&](auto&& part) {
    typename Op::Total result = Op::start();
    for (int64_t b = 0; b < blocks; b++) Op::add(result, part(b));
    return static_cast<float>(result);
  };
  const auto block_of = [&](int64_t row, int64_t b) {
    return reduce_block<Op>(x + row * n + b * row_block, std::min(row_block, n - b * row_block));
  };
  if (rows >= 8 || blocks < 8) {
    parallel_for(rows, std::max<int64_t>(1, 32768 / n), [&](int64_t begin, int64_t end, int) {
      for (int64_t row = begin; row < end; row++) y[row] = total([&](int64_t b) { return block_of(row, b); });
    });
    return;
  }
  Scratch memory(static_cast<size_t>(rows * blocks) * sizeof(float));
  float* parts = memory.as<float>();
  parallel_for(rows * blocks, 8, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; i++) parts[i] = block_of(i / blocks, i % blocks);
  });
  for (int64_t row = 0; row < rows; row++) y[row] = total([&](int64_t b) { return parts[row * blocks + b]; });
}

constexpr int64_t column_rows = 256;
constexpr int strip_vectors = 4;
constexpr int64_t strip = strip_vectors * lanes;

// Reduces `rows` rows of a strip of `width` columns to `strip` numbers.
template <class Op>
void reduce_strip(float* to, const float* x, int64_t rows, int64_t stride, int64_t width) {
  f32v acc[strip_vectors];
  for (int v = 0; v < strip_vectors; v++) acc[v] = splat(Op::start());
  if (width == strip) {
    f32v a0 = acc[0], a1 = acc[1], a2 = acc[2], a3 = acc[3];
    for (int64_t r = 0; r < rows; r++) {
      const float* row = x + r * stride;
      a0 = Op::combine(a0, load(row));
      a1 = Op::combine(a1, load(row + lanes));
      a2 = Op::combine(a2, load(row + 2 * lanes));
      a3 = Op::combine(a3, load(row + 3 * lanes));
    }
    acc[0] = a0, acc[1] = a1, acc[2] = a2, acc[3] = a3;
  } else {
    for (int64_t r = 0; r < rows; r++) {
      const float* row = x + r * stride;
      int v = 0;
      each_vector(width, [&](int64_t i, int count) {
        acc[v] = Op::combine(acc[v], load_some(row + i, count));
        v++;
      });
    }
  }
  for (int v = 0; v < strip_vectors; v++) store(to + v * lanes, acc[v]);
}

// The results of a strip's chunks of rows, combined like the blocks of a row.
template <class Op>
struct StripTotal {
  typename Op::Total totals[strip];

  StripTotal() { std::fill_n(totals, strip, Op::start()); }
  void add(const float* part) {
    for (int64_t i = 0; i < strip; i++) Op::add(totals[i], part[i]);
  }
  void write(float* y, int64_t width) const {
    for (int64_t i = 0; i < width; i++) y[i] = static_cast<float>(totals[i]);
  }
};

template <class Op>
void reduce_columns(float* y, const float* x, int64_t outer, int64_t n, int64_t inner) {
  const int64_t strips = (inner + strip - 1) / strip;
  const int64_t chunks = (n + column_rows - 1) / column_rows;
  const auto chunk = [&](float* to, int64_t o, int64_t s, int64_t c) {
    const int64_t rows = std::min(column_rows, n - c * column_rows);
    reduce_strip<Op>(to, x + (o * n + c * column_rows) * inner + s * strip, rows, inner, std::min(strip, inner - s * strip));
  };
  if (outer * strips >= 4 || chunks < 4) {
    const int64_t grain = std::max<int64_t>(1, 32768 / (n * std::min(strip, inner)));
    parallel_for(outer * strips, grain, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; i++) {
        const int64_t o = i / strips, s = i % strips;
        StripTotal<Op> total;
        for (int64_t c = 0; c < chunks; c++) {
          alignas(64) float part[strip];
          chunk(part, o, s, c);
          total.add(part);
        }
        total.write(y + o * inner + s * strip, std::min(strip, inner - s * strip));
      }
    });
    return;
  }
  // With few columns and many rows, each chunk of rows is a task.
  const int64_t per = strips * strip;
  Scratch memory(static_cast<size_t>(outer * chunks * per) * sizeof(float));
  float* parts = memory.as<float>();
  const int64_t grain = std::max<int64_t>(1, 32768 / (column_rows * std::min(strip, inner)));
  parallel_for(outer * strips * chunks, grain, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t c = i % chunks, s = i / chunks % strips, o = i / chunks / strips;
      chunk(parts + (o * chunks + c) * per + s * strip, o, s, c);
    }
  });
  for (int64_t o = 0; o < outer; o++) {
    for (int64_t s = 0; s < strips; s++) {
      StripTotal<Op> total;
      for (int64_t c = 0; c < chunks; c++) total.add(parts + (o * chunks + c) * per + s * strip);
      total.write(y + o * inner + s * strip, std::min(strip, inner - s * strip));
    }
  }
}

template <class Op>
void reduce_f32(Args& args) {
  float* y = args.ptr<float>();
  const float* x = args.ptr<const float>();
  const int64_t outer = args.size(), n = args.size(), inner = args.size();
  if (outer * inner == 0) return;
  if (n == 0) {
    std::fill(y, y + outer * inner, Op::start());
  } else if (inner == 1) {
    reduce_rows<Op>(y, x, outer, n);
  } else {
    reduce_columns<Op>(y, x, outer, n, inner);
  }
}

template <class Op>
void reduce_i32(Args& args) {
  int32_t* y = args.ptr<int32_t>();
  const int32_t* x = args.ptr<const int32_t>();
  const int64_t outer = args.size(), n = args.size(), inner = args.size();
  parallel_for(outer, std::max<int64_t>(1, 32768 / std::max<int64_t>(1, n * inner)), [&](int64_t begin, int64_t end, int) {
    for (int64_t o = begin; o < end; o++) {
      int32_t* to = y + o * inner;
      const int32_t* from = x + o * n * inner;
      if (inner == 1) {
        int32_t total = Op::start_i32();
        for (int64_t r = 0; r < n; r++) total = Op::combine(total, from[r]);
        *to = total;
        continue;
      }
      std::fill(to, to + inner, Op::start_i32());
      for (int64_t r = 0; r < n; r++) {
        for (int64_t i = 0; i < inner; i++) to[i] = Op::combine(to[i], from[r * inner + i]);
      }
    }
  });
}

}  // namespace

MOE_KERNEL(moe_reduce_sum_f32) { reduce_f32<Sum>(args); }
MOE_KERNEL(moe_reduce_max_f32) { reduce_f32<Max>(args); }
MOE_KERNEL(moe_reduce_sum_i32) { reduce_i32<Sum>(args); }
MOE_KERNEL(moe_reduce_max_i32) { reduce_i32<Max>(args); }
