// gate * sigmoid(gate) * up and its gradient.
#include "four.cuh"

MOE_KERNEL((256), moe_swiglu_fwd_f32, (float* y, const float* gate, const float* up, int64_t n)) {
  eachFour(n, [&](int64_t i, auto whole) {
    const Four g = load4<whole.value>(gate, i, n), u = load4<whole.value>(up, i, n);
    store4<whole.value>(y, i, n, four([&](int k) { return g.v[k] * sigmoid(g.v[k]) * u.v[k]; }));
  });
}

MOE_KERNEL((256), moe_swiglu_bwd_f32,
           (float* dgate, float* dup, const float* gate, const float* up, const float* dy, int64_t n)) {
  eachFour(n, [&](int64_t i, auto whole) {
    const Four g = load4<whole.value>(gate, i, n), u = load4<whole.value>(up, i, n), d = load4<whole.value>(dy, i, n);
    const Four s = four([&](int k) { return sigmoid(g.v[k]); });
    // d silu(g) / dg = s (1 + g (1 - s))
    store4<whole.value>(dgate, i, n,
                        four([&](int k) { return d.v[k] * u.v[k] * (s.v[k] * (1.f + g.v[k] * (1.f - s.v[k]))); }));
    store4<whole.value>(dup, i, n, four([&](int k) { return d.v[k] * g.v[k] * s.v[k]; }));
  });
}
