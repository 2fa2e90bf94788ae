// Assembles keys and values of latent attention from the results of the up-projection and the shared RoPE key, in one
// pass, and computes their gradients.
// Legend: P positions, H heads, N features without RoPE, R features with RoPE (one key shared by all heads), V features
// of a value.
#include "four.cuh"

// Copies to to[at] and, with Width 4, also rounds to `rounded`, unless it is null.
template <int Width>
MOE_DEVICE void copyFeatures(float* to, bf16* rounded, int64_t at, const float* from) {
  if constexpr (Width == 4) {
    store4(to, rounded, at, load4(from, 0));
  } else {
    to[at] = *from;
  }
}

// Each thread copies `Width` features of k or v at a time. Neighbouring threads have neighbouring features of a head.
template <int Width>
MOE_DEVICE void keyValue(float* k, float* v, bf16* roundedK, bf16* roundedV, const float* kv, const float* ropeKey, int64_t rows, int H, int N, int R, int V) {
  const int perHead = (N + R + V) / Width;
  for (int64_t at = gridThread(); at < rows * perHead; at += gridThreads()) {
    const int64_t row = at / perHead;
    const int i = (int)(at % perHead) * Width;
    if (i < N) {
      copyFeatures<Width>(k, roundedK, row * (N + R) + i, kv + row * (N + V) + i);
    } else if (i < N + R) {
      copyFeatures<Width>(k, roundedK, row * (N + R) + i, ropeKey + row / H * R + (i - N));
    } else {
      copyFeatures<Width>(v, roundedV, row * V + (i - N - R), kv + row * (N + V) + (i - R));
    }
  }
}

// First the features of dkv, then the sums over heads.
template <int Width>
MOE_DEVICE void keyValueGradient(float* dkv, float* dropeKey, bf16* rounded, const float* dk, const float* dv, int64_t rows, int H, int N, int R, int V) {
  const int perHead = (N + V) / Width, perSum = R / Width;
  const int64_t plain = rows * perHead;
  for (int64_t at = gridThread(); at < plain + rows / H * perSum; at += gridThreads()) {
    if (at < plain) {
      const int64_t row = at / perHead;
      const int i = (int)(at % perHead) * Width;
      copyFeatures<Width>(dkv, rounded, row * (N + V) + i, i < N ? dk + row * (N + R) + i : dv + row * V + (i - N));
      continue;
    }
    const int64_t position = (at - plain) / perSum;
    const int i = (int)((at - plain) % perSum) * Width;
    const float* from = dk + position * H * (N + R) + N + i;
    float* to = dropeKey + position * R + i;
    if constexpr (Width == 4) {
      Four sum = {};
      for (int h = 0; h < H; h++) {
        const Four x = load4(from, (int64_t)h * (N + R));
        sum = four([&](int j) { return sum.v[j] + x.v[j]; });
      }
      store4(to, 0, sum);
    } else {
      float sum = 0.f;
      for (int h = 0; h < H; h++) sum += from[(int64_t)h * (N + R)];
      *to = sum;
    }
  }
}

// rows = P H. The rounded copies are those of k, v and dkv.
#define KEY_VALUE(name, Width)                                                                                                                                    \
  MOE_KERNEL((256), moe_mla_key_value_fwd_##name, (float* k, float* v, bf16* roundedK, bf16* roundedV, const float* kv, const float* ropeKey, int64_t rows, int H, int N, int R, int V)) { \
    keyValue<Width>(k, v, roundedK, roundedV, kv, ropeKey, rows, H, N, R, V);                                                                                     \
  }                                                                                                                                                               \
  MOE_KERNEL((256), moe_mla_key_value_bwd_##name, (float* dkv, float* dropeKey, bf16* rounded, const float* dk, const float* dv, int64_t rows, int H, int N, int R, int V)) { \
    keyValueGradient<Width>(dkv, dropeKey, rounded, dk, dv, rows, H, N, R, V);                                                                                    \
  }
KEY_VALUE(f32, 1)
// Requires that N, R and V are multiples of 4.
KEY_VALUE(f32_by4, 4)
