// gate * sigmoid(gate) * up and its gradient.
#include "moe.h"

using namespace moe;

// y, gate, up, n
MOE_KERNEL(moe_swiglu_fwd_f32) {
  float* y = args.ptr<float>();
  const float* gate = args.ptr<const float>();
  const float* up = args.ptr<const float>();
  parallel_for(
      args.size(), 8192,
      [&](int64_t begin, int64_t end, int) {
        each_vector(end - begin, [&](int64_t at, int count) {
          const int64_t i = begin + at;
          const f32v g = load_some(gate + i, count);
          store_some(y + i, g * sigmoid(g) * load_some(up + i, count), count);
        });
      },
      64);
}

// dgate, dup, gate, up, dy, n
MOE_KERNEL(moe_swiglu_bwd_f32) {
  float* dgate = args.ptr<float>();
  float* dup = args.ptr<float>();
  const float* gate = args.ptr<const float>();
  const float* up = args.ptr<const float>();
  const float* dy = args.ptr<const float>();
  parallel_for(
      args.size(), 8192,
      [&](int64_t begin, int64_t end, int) {
        each_vector(end - begin, [&](int64_t at, int count) {
          const int64_t i = begin + at;
          const f32v g = load_some(gate + i, count), d = load_some(dy + i, count), s = sigmoid(g);
          // d silu(g) / dg = s (1 + g (1 - s))
          store_some(dgate + i, d * load_some(up + i, count) * (s * fma(g, splat(1.0f) - s, splat(1.0f))), count);
          store_some(dup + i, d * g * s, count);
        });
      },
      64);
}
