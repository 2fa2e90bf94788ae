// Cross-entropy of logits with class indices.
#include "cross-entropy-rows.h"

using namespace moe;

// (loss [rows], lse [rows], logits [rows, classes], targets, rows, classes, ignore_index)
MOE_KERNEL(moe_cross_entropy_fwd_f32) {
  float* loss = args.ptr<float>();
  float* lse = args.ptr<float>();
  const float* logits = args.ptr<const float>();
  const int32_t* targets = args.ptr<const int32_t>();
  const int64_t rows = args.size(), classes = args.size();
  const int32_t ignore_index = args.i32();
  parallel_for(rows, 8192 / (classes + 1) + 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      const float* row = logits + i * classes;
      RowSum sum;
      add_logits(sum, row, classes);
      lse[i] = log_sum_exp(sum);
      loss[i] = counts(targets[i], classes, ignore_index) ? lse[i] - row[targets[i]] : 0;
    }
  });
}

// (dlogits [rows, classes], logits, targets, lse, dloss, rows, classes, ignore_index)
MOE_KERNEL(moe_cross_entropy_bwd_f32) {
  float* dlogits = args.ptr<float>();
  const float* logits = args.ptr<const float>();
  const int32_t* targets = args.ptr<const int32_t>();
  const float* lse = args.ptr<const float>();
  const float* dloss = args.ptr<const float>();
  const int64_t rows = args.size(), classes = args.size();
  const int32_t ignore_index = args.i32();
  parallel_for(rows, 8192 / (classes + 1) + 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      float* to = dlogits + i * classes;
      if (counts(targets[i], classes, ignore_index))
        logit_gradient(to, logits + i * classes, classes, lse[i], targets[i], dloss[i]);
      else
        std::memset(to, 0, static_cast<size_t>(classes) * 4);
    }
  });
}
