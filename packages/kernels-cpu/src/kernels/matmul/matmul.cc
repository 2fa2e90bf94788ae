// moe-isa: baseline
// One matrix product, or a batch of them.
#include <vector>

#include "gemm.h"
#include "moe.h"

using namespace moe;

// (c [batch, m, n], a, b, b in bf16 or 0, batch, m, n, k, transpose_a, transpose_b, bf16)
MOE_KERNEL(moe_matmul_f32) {
  float* c = args.ptr<float>();
  const float* a = args.ptr<const float>();
  const float* b = args.ptr<const float>();
  const Bf16* rounded_b = args.ptr<const Bf16>();
  const int64_t batch = args.size(), m = args.size(), n = args.size(), k = args.size();
  const bool transpose_a = args.flag(), transpose_b = args.flag(), bf16 = args.flag();
  std::vector<Gemm> jobs(static_cast<size_t>(batch));
  for (int64_t i = 0; i < batch; ++i) {
    Gemm& job = jobs[static_cast<size_t>(i)];
    job.a = gemm_operand(a + i * m * k, m, k, transpose_a);
    job.b = gemm_operand(b + i * n * k, n, k, !transpose_b);
    if (rounded_b) job.rounded_b = rounded_b + i * n * k;
    job.c = c + i * m * n;
    job.ldc = n;
    job.m = m, job.n = n, job.k = k;
  }
  gemm(jobs.data(), batch, bf16);
}
