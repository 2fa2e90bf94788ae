// Rotary position embedding (RoPE) of the last features of every head.
#include "four.cuh"

// Rotates features i .. i+3 of the rotated part of a head. c and s are rows of the tables, and `sign` is the sign of
// sin: (a, b) becomes (a cos - b sin, b cos + a sin).
MOE_DEVICE Four turned4(const float* x, const float* c, const float* s, int i, int half, bool interleaved, float sign) {
  const Four own = load4(x, i);
  if (interleaved) {
    const float2 cosines = *reinterpret_cast<const float2*>(c + i / 2), sines = *reinterpret_cast<const float2*>(s + i / 2);
    const float s0 = sines.x * sign, s1 = sines.y * sign;
    return {{own.v[0] * cosines.x - own.v[1] * s0, own.v[1] * cosines.x + own.v[0] * s0,
             own.v[2] * cosines.y - own.v[3] * s1, own.v[3] * cosines.y + own.v[2] * s1}};
  }
  const bool isFirst = i < half;
  const int pair = isFirst ? i : i - half;
  const Four other = load4(x, isFirst ? i + half : pair), cosines = load4(c, pair), sines = load4(s, pair);
  const float direction = isFirst ? -sign : sign;
  return four([&](int k) { return own.v[k] * cosines.v[k] + other.v[k] * (sines.v[k] * direction); });
}

// Rotates feature i.
MOE_DEVICE float turned(const float* x, const float* c, const float* s, int i, int half, bool interleaved, float sign) {
  const bool isFirst = interleaved ? i % 2 == 0 : i < half;
  const int pair = interleaved ? i / 2 : isFirst ? i : i - half, step = interleaved ? 1 : half;
  return x[i] * c[pair] + x[isFirst ? i + step : i - step] * (s[pair] * (isFirst ? -sign : sign));
}

// x [B, T, H, D], y [B, T, H, F + 2 half], tables cos, sin [T, half] or [B, T, half]. The first F features of each head
// of y are copied from `plain`, where heads are P apart. With Width 4, y is also rounded to `rounded` in bf16, unless
// it is null. A vector is Width features of one head of y. A block processes one of the B * T positions, or several if
// they are small; along the grid's y, blocks share the vectors of a position.
template <int Width>
MOE_DEVICE void rope(float* y, bf16* rounded, const float* x, const float* cos, const float* sin, const float* plain,
                     int positions, int T, int H, int D, int F, int P, int half, bool perBatch, bool interleaved, float sign) {
  const int perHead = (F + 2 * half) / Width, vectors = H * perHead, threads = (int)blockDim.x;
  const int together = vectors < threads ? threads / vectors : 1, share = threads / together;
  const int position = (int)blockIdx.x * together + (int)threadIdx.x / share;
  if ((int)threadIdx.x >= together * share || position >= positions) return;
  const int64_t row = (int64_t)(perBatch ? position : position % T) * half;
  const float *c = cos + row, *s = sin + row;
  for (int v = (int)blockIdx.y * share + (int)threadIdx.x % share; v < vectors; v += (int)gridDim.y * share) {
    const int i = v % perHead * Width - F;
    const int64_t head = (int64_t)position * H + v / perHead, at = ((int64_t)position * vectors + v) * Width;
    const float *given = plain + head * P + F, *own = x + (head + 1) * D - 2 * half;
    if constexpr (Width == 4) {
      store4(y, rounded, at, i < 0 ? load4(given, i) : turned4(own, c, s, i, half, interleaved, sign));
    } else {
      y[at] = i < 0 ? given[i] : turned(own, c, s, i, half, interleaved, sign);
    }
  }
}

#define ROPE(name, Width)                                                                                              \
  MOE_KERNEL((256), name,                                                                                              \
             (float* y, bf16* rounded, const float* x, const float* cos, const float* sin, const float* plain,         \
              int positions, int T, int H, int D, int F, int P, int half, int perBatch, int interleaved, int inverse)) { \
    rope<Width>(y, rounded, x, cos, sin, plain, positions, T, H, D, F, P, half, perBatch != 0, interleaved != 0,       \
                inverse ? -1.f : 1.f);                                                                                 \
  }

ROPE(moe_rope_f32, 1)
// Requires that D, F, P, half * 2 and, unless interleaved, half are multiples of 4.
ROPE(moe_rope_f32_by4, 4)
