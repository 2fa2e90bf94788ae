// One step of an exponential moving average (EMA) of one tensor, in place.
#include "four.cuh"

MOE_KERNEL((256), moe_ema_step_f32, (float* average, const float* value, const float* rate, int64_t n)) {
  const float r = *rate;
  eachFour(n, [&](int64_t i, auto whole) {
    const Four before = load4<whole.value>(average, i, n), x = load4<whole.value>(value, i, n);
    store4<whole.value>(average, i, n, four([&](int k) { return before.v[k] + (x.v[k] - before.v[k]) * r; }));
  });
}
