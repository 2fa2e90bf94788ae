// One AdamW step of one tensor, in place.
#include "moe.h"

using namespace moe;

namespace {

MOE_INLINE f32v widened(f32v x) { return x; }
MOE_INLINE f32v widened(u16v x) { return from_bf16(x); }
MOE_INLINE void store_moment(float* to, f32v x, int count) { store_some(to, x, count); }
MOE_INLINE void store_moment(uint16_t* to, f32v x, int count) { store_some(to, to_bf16(x), count); }

// param, its bf16 copy or 0, m, v, grad, gradScale, n, lr, beta1, beta2, eps, weightDecay, step
template <class Moment>
void adamw(Args& args) {
  float* param = args.ptr<float>();
  uint16_t* rounded = args.ptr<uint16_t>();
  Moment* m = args.ptr<Moment>();
  Moment* v = args.ptr<Moment>();
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
          const f32v first = fma(widened(load_some(m + i, count)), b1, g * c1);
          const f32v second = fma(widened(load_some(v + i, count)), b2, g * g * c2);
          const f32v update = first * rate / (sqrt(second * correction) + least);
          store_moment(m + i, first, count);
          store_moment(v + i, second, count);
          const f32v next = fma(load_some(param + i, count), keep, -update);
          store_some(param + i, next, count);
          if (rounded) store_some(rounded + i, to_bf16(next), count);
        });
      },
      64);
}

}  // namespace

// Named after the dtype in which the moments are stored.
MOE_KERNEL(moe_adamw_step_f32) { adamw<float>(args); }
MOE_KERNEL(moe_adamw_step_bf16) { adamw<uint16_t>(args); }
