// Elementwise operations on one operand.
#include "moe.h"

using namespace moe;

namespace {

// About 10 us of work for the cheap operations.
constexpr int64_t grain = 16384;

template <class F>
void each_f32(Args& args, int64_t at_least, F&& fn) {
  float* y = args.ptr<float>();
  const float* x = args.ptr<const float>();
  const int64_t n = args.size();
  parallel_for(
      n, at_least,
      [&](int64_t begin, int64_t end, int) {
        each_vector(end - begin, [&](int64_t i, int count) {
          store_some(y + begin + i, fn(load_some(x + begin + i, count)), count);
        });
      },
      64);
}

template <class F>
void each_i32(Args& args, F&& fn) {
  int32_t* y = args.ptr<int32_t>();
  const int32_t* x = args.ptr<const int32_t>();
  const int64_t n = args.size();
  parallel_for(
      n, grain,
      [&](int64_t begin, int64_t end, int) {
        for (int64_t i = begin; i < end; i++) y[i] = fn(x[i]);
      },
      64);
}

f32v sign(f32v x) {
  const f32v one = from_bits((bits(x) & static_cast<int32_t>(0x80000000)) | bits(splat(1.0f)));
  return select(x == zero(), zero(), select(x != x, x, one));
}

}  // namespace

// Arguments of all kernels: (y, x, n).
MOE_KERNEL(moe_neg_f32) { each_f32(args, grain, [](f32v x) { return -x; }); }
MOE_KERNEL(moe_abs_f32) { each_f32(args, grain, [](f32v x) { return abs(x); }); }
MOE_KERNEL(moe_sign_f32) { each_f32(args, grain, [](f32v x) { return sign(x); }); }
MOE_KERNEL(moe_exp_f32) { each_f32(args, grain / 2, [](f32v x) { return exp(x); }); }
MOE_KERNEL(moe_log_f32) { each_f32(args, grain / 2, [](f32v x) { return log(x); }); }
MOE_KERNEL(moe_sqrt_f32) { each_f32(args, grain, [](f32v x) { return sqrt(x); }); }
MOE_KERNEL(moe_rsqrt_f32) { each_f32(args, grain, [](f32v x) { return splat(1.0f) / sqrt(x); }); }
MOE_KERNEL(moe_sin_f32) { each_f32(args, grain / 4, [](f32v x) { return sin(x); }); }
MOE_KERNEL(moe_cos_f32) { each_f32(args, grain / 4, [](f32v x) { return cos(x); }); }
MOE_KERNEL(moe_tanh_f32) { each_f32(args, grain / 4, [](f32v x) { return tanh(x); }); }
MOE_KERNEL(moe_sigmoid_f32) { each_f32(args, grain / 4, [](f32v x) { return sigmoid(x); }); }
MOE_KERNEL(moe_floor_f32) { each_f32(args, grain, [](f32v x) { return floor(x); }); }

MOE_KERNEL(moe_neg_i32) {
  each_i32(args, [](int32_t x) { return static_cast<int32_t>(0u - static_cast<uint32_t>(x)); });
}
MOE_KERNEL(moe_abs_i32) {
  each_i32(args, [](int32_t x) { return x < 0 ? static_cast<int32_t>(0u - static_cast<uint32_t>(x)) : x; });
}
MOE_KERNEL(moe_sign_i32) {
  each_i32(args, [](int32_t x) { return (x > 0) - (x < 0); });
}
