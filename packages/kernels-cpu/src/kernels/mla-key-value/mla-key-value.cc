// Makes the keys and values of latent attention from the output of the up-projection and the shared rope key, in one pass; and the gradient of that.
#include "moe.h"

using namespace moe;

namespace {

MOE_INLINE void copy(float* to, const float* from, int64_t n) {
  each_vector(n, [&](int64_t i, int count) { store_some(to + i, load_some(from + i, count), count); });
}

}  // namespace

// k [P, H, N + R], v [P, H, V], kv [P, H, N + V], rope_key [P, R], P, H, N, R, V
MOE_KERNEL(moe_mla_key_value_fwd_f32) {
  float* k = args.ptr<float>();
  float* v = args.ptr<float>();
  const float* kv = args.ptr<const float>();
  const float* rope_key = args.ptr<const float>();
  const int64_t P = args.size(), H = args.size(), N = args.size(), R = args.size(), V = args.size();
  parallel_for(P, 8192 / std::max<int64_t>(1, H * (N + R + V)), [&](int64_t begin, int64_t end, int) {
    for (int64_t row = begin * H; row < end * H; row++) {
      copy(k + row * (N + R), kv + row * (N + V), N);
      copy(k + row * (N + R) + N, rope_key + row / H * R, R);
      copy(v + row * V, kv + row * (N + V) + N, V);
    }
  });
}

// dkv [P, H, N + V], drope_key [P, R], dk [P, H, N + R], dv [P, H, V], P, H, N, R, V
MOE_KERNEL(moe_mla_key_value_bwd_f32) {
  float* dkv = args.ptr<float>();
  float* drope_key = args.ptr<float>();
  const float* dk = args.ptr<const float>();
  const float* dv = args.ptr<const float>();
  const int64_t P = args.size(), H = args.size(), N = args.size(), R = args.size(), V = args.size();
  parallel_for(P, 8192 / std::max<int64_t>(1, H * (N + R + V)), [&](int64_t begin, int64_t end, int) {
    for (int64_t p = begin; p < end; p++) {
      for (int64_t row = p * H; row < (p + 1) * H; row++) {
        copy(dkv + row * (N + V), dk + row * (N + R), N);
        copy(dkv + row * (N + V) + N, dv + row * V, V);
      }
      const float* from = dk + p * H * (N + R) + N;
      each_vector(R, [&](int64_t i, int count) {
        f32v sum = splat(0.0f);
        for (int64_t h = 0; h < H; h++) sum += load_some(from + h * (N + R) + i, count);
        store_some(drope_key + p * R + i, sum, count);
      });
    }
  });
}
