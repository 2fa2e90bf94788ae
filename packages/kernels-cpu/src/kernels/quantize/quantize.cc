// Block-wise quantization to f8e4m3 with one f32 scale per block.
#include "convert.h"
#include "moe.h"

using namespace moe;

namespace {

constexpr float largest_f8 = 448;

// Quantizes a block of `rows` x `columns`, whose rows are `stride` elements apart, and returns its scale.
float quantize_block(const float* x, uint8_t* q, int64_t rows, int64_t columns, int64_t stride) {
  f32v top = zero();
  i32v nan = i32v{};
  for (int64_t r = 0; r < rows; r++) {
    each_vector(columns, [&](int64_t i, int count) {
      const f32v v = load_some(x + r * stride + i, count);
      nan |= v != v;
      top = fast_max(abs(v), top);
    });
  }
  float largest = max(top);
  if (any(nan)) largest = std::numeric_limits<float>::quiet_NaN();
  const float quotient = largest / largest_f8, scale = quotient == 0 ? 1 : quotient;
  const f32v divisor = splat(scale);
  for (int64_t r = 0; r < rows; r++) {
    each_vector(columns, [&](int64_t i, int count) {
      const u8v code = to_f8e4m3(load_some(x + r * stride + i, count) / divisor);
      std::memcpy(q + r * stride + i, &code, static_cast<size_t>(count));
    });
  }
  return scale;
}

}  // namespace

// q, scale, x, R, C, block rows, block columns
MOE_KERNEL(moe_quantize_f32) {
  uint8_t* q = args.ptr<uint8_t>();
  float* scale = args.ptr<float>();
  const float* x = args.ptr<const float>();
  const int64_t R = args.size(), C = args.size(), block_rows = args.size(), block_columns = args.size();
  if (R == 0 || C == 0) return;
  const int64_t down = (R + block_rows - 1) / block_rows, across = (C + block_columns - 1) / block_columns;
  parallel_for(down * across, 8192 / (block_rows * block_columns), [&](int64_t begin, int64_t end, int) {
    for (int64_t block = begin; block < end; block++) {
      const int64_t r = block / across * block_rows, c = block % across * block_columns;
      const int64_t rows = std::min(block_rows, R - r), columns = std::min(block_columns, C - c);
      scale[block] = quantize_block(x + r * C + c, q + r * C + c, rows, columns, C);
    }
  });
}
