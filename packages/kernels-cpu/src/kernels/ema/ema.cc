// Updates the exponential moving average of a tensor in place.
#include "moe.h"

using namespace moe;

// average, value, n, decay, step
MOE_KERNEL(moe_ema_step_f32) {
  float* average = args.ptr<float>();
  const float* value = args.ptr<const float>();
  const int64_t n = args.size();
  const double decay = args.f64(), step = args.f64();
  const f32v rate = splat(static_cast<float>((1 - decay) / (1 - std::pow(decay, step))));
  parallel_for(
      n, 16384,
      [&](int64_t begin, int64_t end, int) {
        each_vector(end - begin, [&](int64_t at, int count) {
          const int64_t i = begin + at;
          const f32v before = load_some(average + i, count);
          store_some(average + i, fma(load_some(value + i, count) - before, rate, before), count);
        });
      },
      64);
}
