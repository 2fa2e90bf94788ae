// One AdamW step of one tensor, in place. Elementwise, four elements per thread at a time.
#include "four.cuh"

struct AdamwAttributes {
  float keep;  // 1 - lr * decay
  float beta1, oneMinusBeta1, beta2, oneMinusBeta2;
  float rate;        // lr / (1 - beta1^t)
  float correction;  // 1 / (1 - beta2^t)
  float eps;
};

template <class Moment>
MOE_DEVICE void adamw(float* param, Moment* m, Moment* v, const float* grad, const float* gradScale, const AdamwAttributes* attributes, int64_t n) {
  const AdamwAttributes a = *attributes;
  const float scale = *gradScale;
  eachFour(n, [&](int64_t i, auto whole) {
    const Four p = load4<whole.value>(param, i, n), d = load4<whole.value>(grad, i, n);
    Four first = load4<whole.value>(m, i, n), second = load4<whole.value>(v, i, n);
    const Four next = four([&](int k) {
      const float g = d.v[k] * scale;
      first.v[k] = first.v[k] * a.beta1 + g * a.oneMinusBeta1;
      second.v[k] = second.v[k] * a.beta2 + g * g * a.oneMinusBeta2;
      return p.v[k] * a.keep - first.v[k] * a.rate / (sqrtf(second.v[k] * a.correction) + a.eps);
    });
    store4<whole.value>(param, i, n, next);
    store4<whole.value>(m, i, n, first);
    store4<whole.value>(v, i, n, second);
  });
}

// Named after the dtype of the moments.
MOE_KERNEL((256), moe_adamw_step_f32,
           (float* param, float* m, float* v, const float* grad, const float* gradScale, const AdamwAttributes* attributes,
            int64_t n)) {
  adamw(param, m, v, grad, gradScale, attributes, n);
}
MOE_KERNEL((256), moe_adamw_step_bf16,
           (float* param, bf16* m, bf16* v, const float* grad, const float* gradScale, const AdamwAttributes* attributes,
            int64_t n)) {
  adamw(param, m, v, grad, gradScale, attributes, n);
}
