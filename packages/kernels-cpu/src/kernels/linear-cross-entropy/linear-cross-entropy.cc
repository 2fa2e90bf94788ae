// Cross-entropy of the logits x weight^T, which are computed block by block and never stored as a whole.
#include <vector>

#include "../cross-entropy/cross-entropy-rows.h"
#include "gemm.h"

using namespace moe;

namespace {

// A worker's block of logits stays in its L2 cache.
constexpr int64_t block_rows = 112, block_classes = 1024;
// The backward pass stores dlogits of many rows and some classes: 8 MiB, in the shared cache.
constexpr int64_t gradient_elements = int64_t{2} << 20;

Gemm logits_of(const float* x, int64_t rows, int64_t dim, const float* packed, int64_t from, int64_t count, int64_t classes,
               float* to, int64_t stride) {
  Gemm job;
  job.a = gemm_operand(x, rows, dim, false);
  job.b = {nullptr, 0, 0};
  job.c = to;
  job.ldc = static_cast<std::ptrdiff_t>(stride);
  job.m = rows, job.n = count, job.k = dim;
  job.packed_b = packed;
  job.packed_from = from;
  job.packed_n = classes;
  return job;
}

}  // namespace

// (loss [rows], lse [rows], x [rows, dim], weight [classes, dim], weight in bf16 or 0, targets, rows, classes, dim, ignore_index, bf16)
MOE_KERNEL(moe_linear_cross_entropy_fwd_f32) {
  float* loss = args.ptr<float>();
  float* lse = args.ptr<float>();
  const float* x = args.ptr<const float>();
  const float* weight = args.ptr<const float>();
  const Bf16* rounded = args.ptr<const Bf16>();
  const int32_t* targets = args.ptr<const int32_t>();
  const int64_t rows = args.size(), classes = args.size(), dim = args.size();
  const int32_t ignore_index = args.i32();
  const bool bf16 = args.flag();
  const Scratch packed(gemm_packed_b_size(classes, dim, bf16) * 4 + 64);
  gemm_pack_b(gemm_operand(weight, classes, dim, false), rounded, classes, dim, bf16, packed.as<float>());
  const int64_t tasks = (rows + block_rows - 1) / block_rows;
  parallel_tasks(tasks, [&](int64_t task, int) {
    const int64_t begin = rows * task / tasks, count = rows * (task + 1) / tasks - begin;
    const Scratch scratch(static_cast<size_t>(block_rows * block_classes) * 4);
    float* logits = scratch.as<float>();
    RowSum sums[block_rows];
    float picked[block_rows] = {};
    for (int64_t from = 0; from < classes; from += block_classes) {
      const int64_t width = std::min(block_classes, classes - from);
      gemm_here(logits_of(x + begin * dim, count, dim, packed.as<float>(), from, width, classes, logits, width), bf16);
      for (int64_t i = 0; i < count; ++i) {
        add_logits(sums[i], logits + i * width, width);
        const int64_t hit = targets[begin + i] - from;
        if (hit >= 0 && hit < width) picked[i] = logits[i * width + hit];
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      lse[begin + i] = log_sum_exp(sums[i]);
      loss[begin + i] = counts(targets[begin + i], classes, ignore_index) ? lse[begin + i] - picked[i] : 0;
    }
  });
}

// (dx [rows, dim], dweight [classes, dim], x, weight, weight in bf16 or 0, targets, lse, dloss, rows, classes, dim, ignore_index, bf16)
//
// Rows whose target is ignored are removed first. The outer loop runs over blocks of classes, the inner one over blocks of rows: dweight of a block of
// classes is complete after one outer iteration, while dx accumulates over all of them.
MOE_KERNEL(moe_linear_cross_entropy_bwd_f32) {
  float* dx = args.ptr<float>();
  float* dweight = args.ptr<float>();
  const float* all_x = args.ptr<const float>();
  const float* weight = args.ptr<const float>();
  const Bf16* rounded = args.ptr<const Bf16>();
  const int32_t* targets = args.ptr<const int32_t>();
  const float* lse = args.ptr<const float>();
  const float* dloss = args.ptr<const float>();
  const int64_t all_rows = args.size(), classes = args.size(), dim = args.size();
  const int32_t ignore_index = args.i32();
  const bool bf16 = args.flag();

  std::vector<int64_t> row_of;
  row_of.reserve(static_cast<size_t>(all_rows));
  for (int64_t i = 0; i < all_rows; ++i)
    if (counts(targets[i], classes, ignore_index)) row_of.push_back(i);
  const int64_t rows = static_cast<int64_t>(row_of.size());
  if (rows == 0 || dim == 0) {
    std::memset(dx, 0, static_cast<size_t>(all_rows * dim) * 4);
    std::memset(dweight, 0, static_cast<size_t>(classes * dim) * 4);
    return;
  }
  const bool gathered = rows < all_rows;
  const Scratch room(gathered ? static_cast<size_t>(2 * rows * dim) * 4 : 64);
  const float* x = all_x;
  float* dx_rows = dx;
  const size_t row_bytes = static_cast<size_t>(dim) * 4;
  if (gathered) {
    for (int64_t i = 0; i < rows; ++i)
      std::memcpy(room.as<float>() + i * dim, all_x + row_of[static_cast<size_t>(i)] * dim, row_bytes);
    x = room.as<float>();
    dx_rows = room.as<float>() + rows * dim;
  }

  const int64_t most_rows = std::min<int64_t>(rows, 4096);
  const int64_t multiple = gemm_column_block();
  const int64_t most_classes = std::min<int64_t>(
      classes, std::max<int64_t>(512, gradient_elements / most_rows / multiple * multiple));
  const Scratch gradients(static_cast<size_t>(most_rows * most_classes) * 4);
  const Scratch packed(gemm_packed_b_size(most_classes, dim, bf16) * 4 + 64);
  float* dlogits = gradients.as<float>();
  for (int64_t from = 0; from < classes; from += most_classes) {
    const int64_t width = std::min(most_classes, classes - from);
    const Bf16* rounded_block = rounded ? rounded + from * dim : nullptr;
    gemm_pack_b(gemm_operand(weight + from * dim, width, dim, false), rounded_block, width, dim, bf16, packed.as<float>());
    for (int64_t first = 0; first < rows; first += most_rows) {
      const int64_t size = std::min(most_rows, rows - first);
      const int64_t tasks = (size + block_rows - 1) / block_rows;
      parallel_tasks(tasks, [&](int64_t task, int) {
        const int64_t begin = size * task / tasks, count = size * (task + 1) / tasks - begin;
        float* block = dlogits + begin * width;
        gemm_here(logits_of(x + (first + begin) * dim, count, dim, packed.as<float>(), 0, width, width, block, width), bf16);
        for (int64_t i = 0; i < count; ++i) {
          const int64_t row = row_of[static_cast<size_t>(first + begin + i)];
          logit_gradient(block + i * width, block + i * width, width, lse[row], targets[row] - from, dloss[row]);
        }
      });
      Gemm jobs[2];
      jobs[0].a = gemm_operand(dlogits, size, width, false);
      jobs[0].b = gemm_operand(weight + from * dim, dim, width, true);
      jobs[0].rounded_b = rounded_block;
      jobs[0].c = dx_rows + first * dim;
      jobs[0].m = size, jobs[0].n = dim, jobs[0].k = width;
      jobs[0].accumulate = from > 0;
      jobs[1].a = gemm_operand(dlogits, width, size, true);
      jobs[1].b = gemm_operand(x + first * dim, dim, size, true);
      jobs[1].c = dweight + from * dim;
      jobs[1].m = width, jobs[1].n = dim, jobs[1].k = size;
      jobs[1].accumulate = first > 0;
      jobs[0].ldc = jobs[1].ldc = static_cast<std::ptrdiff_t>(dim);
      gemm(jobs, 2, bf16);
    }
  }
  if (gathered) {
    std::memset(dx, 0, static_cast<size_t>(all_rows) * row_bytes);
    for (int64_t i = 0; i < rows; ++i) std::memcpy(dx + row_of[static_cast<size_t>(i)] * dim, dx_rows + i * dim, row_bytes);
  }
}
