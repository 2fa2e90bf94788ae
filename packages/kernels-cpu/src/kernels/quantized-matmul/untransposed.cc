// moe-isa: baseline avx2 avx512 avx512bf16
// Matrix products with stored weights that are not transposed, y = x W; one weight, or one per expert. The backward pass of y = x W^T uses them. Strips of the
// weight's columns are decoded to f32 and multiplied by the ordinary matrix product, which can also read bf16 weights as they are stored.
#include <vector>

#include "../grouped-matmul/ranges.h"
#include "formats.h"
#include "gemm.h"

using namespace moe;

namespace {

// Elements of a decoded strip, which fits into L2; and the step of its width: 64 columns are a cache line of 8-bit weights, half a line of int4.
constexpr int64_t strip_elements = 96 << 10, strip_step = 64;

struct Strip {
  int64_t expert, begin, end;
};

}  // namespace

// (y [rows, k], x [rows, n], offsets or 0, rows, experts, q, scale or 0, n, k, format, block rows, block columns, bf16)
MOE_KERNEL(moe_quantized_matmul_untransposed_f32) {
  float* y = args.ptr<float>();
  const float* x = args.ptr<const float>();
  const int32_t* offsets = args.ptr<const int32_t>();
  const int64_t rows = args.size(), experts = args.size();
  Stored w{};
  w.q = args.ptr<const uint8_t>(), w.scale = args.ptr<const float>();
  w.n = args.size(), w.k = args.size();
  w.format = static_cast<Format>(args.i32());
  w.block_rows = args.size(), w.block_columns = args.size();
  const bool bf16 = args.flag();

  const int32_t all[2] = {0, static_cast<int32_t>(rows)};
  const Ranges ranges(offsets ? offsets : all, experts, rows);
  clear_rows(y, 0, ranges.begin(0), w.k);
  clear_rows(y, ranges.begin(experts), rows, w.k);
  const auto product = [&](const Strip& strip) {
    Gemm job{};
    job.m = ranges.size(strip.expert), job.n = strip.end - strip.begin, job.k = w.n;
    job.a = gemm_operand(x + ranges.begin(strip.expert) * w.n, job.m, w.n, false);
    job.c = y + ranges.begin(strip.expert) * w.k + strip.begin;
    job.ldc = w.k;
    return job;
  };

  const bool as_stored = w.format == Format::bf16 && bf16 && gemm_has_bf16();
  const int64_t widest = std::max<int64_t>(1, strip_elements / std::max<int64_t>(1, w.n) / strip_step) * strip_step;
  const int64_t steps = (w.k + strip_step - 1) / strip_step, strips_each = (w.k + widest - 1) / widest;
  std::vector<Gemm> whole;
  std::vector<Strip> strips;
  for (int64_t e = 0; e < experts; ++e) {
    if (ranges.size(e) == 0) continue;
    if (as_stored) {
      whole.push_back(product({e, 0, w.k}));
      whole.back().b = gemm_operand<float>(nullptr, w.k, w.n, true);
      whole.back().rounded_b = reinterpret_cast<const Bf16*>(w.q) + e * w.n * w.k;
      continue;
    }
    for (int64_t i = 0; i < strips_each; ++i)
      strips.push_back({e, steps * i / strips_each * strip_step, std::min(w.k, steps * (i + 1) / strips_each * strip_step)});
  }
  const int64_t strip_size = strips.empty() ? 0 : w.n * std::min(w.k, widest + strip_step);
  const Scratch decoded(static_cast<size_t>(strip_size * max_threads()) * 4);
  parallel_tasks(static_cast<int64_t>(strips.size()), [&](int64_t task, int worker) {
    const Strip& strip = strips[static_cast<size_t>(task)];
    float* const to = decoded.as<float>() + worker * strip_size;
    Gemm job = product(strip);
    for (int64_t row = 0; row < w.n; ++row) w.decode(strip.expert, row, strip.begin, strip.end, to + row * job.n);
    job.b = gemm_operand<float>(to, job.n, w.n, true);
    gemm_here(job, bf16);
  });
  gemm(whole.data(), static_cast<int64_t>(whole.size()), bf16);
}
