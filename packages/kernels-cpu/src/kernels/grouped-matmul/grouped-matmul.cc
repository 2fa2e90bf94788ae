// moe-isa: baseline
// One matrix product per expert over ragged row ranges, and the gradient of the experts' weights.
#include <vector>

#include "gemm.h"
#include "moe.h"
#include "ranges.h"

using namespace moe;

namespace {

constexpr int64_t large_gradient = int64_t{4} << 20;  // elements

}  // namespace

// (y [rows, n], x [rows, k], weight [experts, n, k] or [experts, k, n], weight in bf16 or 0, offsets, rows, experts, k, n, transpose_w, bf16)
MOE_KERNEL(moe_grouped_matmul_fwd_f32) {
  float* y = args.ptr<float>();
  const float* x = args.ptr<const float>();
  const float* weight = args.ptr<const float>();
  const Bf16* rounded_weight = args.ptr<const Bf16>();
  const int32_t* offsets = args.ptr<const int32_t>();
  const int64_t rows = args.size(), experts = args.size(), k = args.size(), n = args.size();
  const bool transpose_w = args.flag(), bf16 = args.flag();
  const Ranges ranges(offsets, experts, rows);
  clear_rows(y, 0, ranges.begin(0), n);
  clear_rows(y, ranges.begin(experts), rows, n);
  std::vector<Gemm> jobs(static_cast<size_t>(experts));
  for (int64_t e = 0; e < experts; ++e) {
    Gemm& job = jobs[static_cast<size_t>(e)];
    job.a = gemm_operand(x + ranges.begin(e) * k, ranges.size(e), k, false);
    job.b = gemm_operand(weight + e * n * k, n, k, !transpose_w);
    if (rounded_weight) job.rounded_b = rounded_weight + e * n * k;
    job.c = y + ranges.begin(e) * n;
    job.ldc = n;
    job.m = ranges.size(e), job.n = n, job.k = k;
  }
  gemm(jobs.data(), experts, bf16);
}

// (dweight [experts, n, k], x [rows, k], dy [rows, n], offsets, rows, experts, k, n, bf16)
MOE_KERNEL(moe_grouped_matmul_bwd_f32) {
  float* dweight = args.ptr<float>();
  const float* x = args.ptr<const float>();
  const float* dy = args.ptr<const float>();
  const int32_t* offsets = args.ptr<const int32_t>();
  const int64_t rows = args.size(), experts = args.size(), k = args.size(), n = args.size();
  const bool bf16 = args.flag();
  const Ranges ranges(offsets, experts, rows);
  // Gradients of this size are evicted from the caches before they are read.
  const bool stream = experts * n * k >= large_gradient;
  std::vector<Gemm> jobs(static_cast<size_t>(experts));
  for (int64_t e = 0; e < experts; ++e) {
    Gemm& job = jobs[static_cast<size_t>(e)];
    const int64_t first = ranges.begin(e), size = ranges.size(e);
    job.a = {dy + first * n, 1, static_cast<std::ptrdiff_t>(n)};
    job.b = {x + first * k, 1, static_cast<std::ptrdiff_t>(k)};
    job.c = dweight + e * n * k;
    job.ldc = k;
    job.m = n, job.n = k, job.k = size;
    job.stream = stream;
  }
  gemm(jobs.data(), experts, bf16);
}
