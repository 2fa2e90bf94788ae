// One AdamW step of one tensor, in place.
#include "moe.h"

using namespace moe;

// param, its copy in bf16 or 0, m, v, grad, gradScale, n, lr, beta1, beta2, eps, weightDecay, step
MOE_KERNEL(moe_adamw_step_f32) {
  float* param = args.ptr<float>();
  uint16_t* rounded = args.ptr<uint16_t>();
  float* m = args.ptr<float>();
  float* v = args.ptr<float>();
  const float* grad = args.ptr<const float>();
  const f32v scale = splat(*args.ptr<const float>());
  const int64_t n = args.size();
  const double lr = args.f64(), beta1 = args.f64(), beta2 = args.f64(), eps = args.f64(), decay = args.f64(), step = args.f64();
  const auto constant = [](double x) { return splat(static_cast<float>(x)); };
  const f32v keep = constant(1 - lr * decay), b1 = constant(beta1), c1 = constant(1 - beta1), b2 = constant(beta2), c2 = constant(1 - beta2);
  const f32v rate = constant(lr / (1 - std::pow(beta1, step))), correction = constant(1 / (1 - std::pow(beta2, step))), least = constant(eps);
  parallel_for(
      n, 16384,
      [&](int64_t begin, int64_t end, int) {
        each_vector(end - begin, [&](int64_t at, int count) {
          const int64_t i = begin + at;
          const f32v g = load_some(grad + i, count) * scale;
          const f32v first = fma(load_some(m + i, count), b1, g * c1);
          const f32v second = fma(load_some(v + i, count), b2, g * g * c2);
          const f32v update = first * rate / (sqrt(second * correction) + least);
          store_some(m + i, first, count);
          store_some(v + i, second, count);
          const f32v next = fma(load_some(param + i, count), keep, -update);
          store_some(param + i, next, count);
          if (rounded) store_some(rounded + i, to_bf16(next), count);
        });
      },
      64);
}
