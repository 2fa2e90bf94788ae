// Rotary position embedding of the last features of every head.
#include "moe.h"

using namespace moe;

namespace {

constexpr int64_t piece = 256;  // rotated features whose cosines and sines are expanded at a time

// Swaps the two lanes of each pair of neighbours.
MOE_INLINE f32v swap_pairs(f32v x) {
#if defined(__AVX512F__)
  return (f32v)_mm512_permute_ps((__m512)x, 0xb1);
#elif defined(__AVX2__)
  return (f32v)_mm256_permute_ps((__m256)x, 0xb1);
#elif defined(__x86_64__)
  return (f32v)_mm_shuffle_ps((__m128)x, (__m128)x, 0xb1);
#elif defined(__aarch64__)
  return (f32v)vrev64q_f32((float32x4_t)x);
#else
  f32v y;
  for (int i = 0; i < lanes; i++) y[i] = x[i ^ 1];
  return y;
#endif
}

struct Rope {
  float* y;
  const float *x, *cos, *sin, *plain;
  int64_t B, T, H, D, F, P, half;  // D, F, P: features per head of x, of the output before the rotated ones, and of plain
  bool per_batch, interleaved;
  float sign;  // of sin

  // (x[2i], x[2i + 1]) are a pair: y = x * (c, c) + (x[2i + 1], x[2i]) * (-s, s).
  void neighbours(const float* from, float* to, const float* c, const float* s) const {
    const int64_t E = F + 2 * half;
    alignas(64) float cosines[piece], sines[piece];
    for (int64_t first = 0; first < 2 * half; first += piece) {
      const int64_t n = std::min(piece, 2 * half - first);
      for (int64_t i = 0; i < n; i += 2) {
        cosines[i] = cosines[i + 1] = c[(first + i) / 2];
        sines[i + 1] = sign * s[(first + i) / 2];
        sines[i] = -sines[i + 1];
      }
      for (int64_t h = 0; h < H; h++) {
        const float* in = from + (h + 1) * D - 2 * half + first;
        float* out = to + h * E + F + first;
        each_vector(n, [&](int64_t i, int count) {
          const f32v v = load_some(in + i, count);
          const f32v turned = fma(v, load_some(cosines + i, count), swap_pairs(v) * load_some(sines + i, count));
          store_some(out + i, turned, count);
        });
      }
    }
  }

  // (x[i], x[i + half]) are a pair.
  void halves(const float* from, float* to, const float* c, const float* s) const {
    for (int64_t h = 0; h < H; h++) {
      const float* a = from + (h + 1) * D - 2 * half;
      float* out = to + h * (F + 2 * half) + F;
      each_vector(half, [&](int64_t i, int count) {
        const f32v cosine = load_some(c + i, count), sine = load_some(s + i, count) * splat(sign);
        const f32v p = load_some(a + i, count), q = load_some(a + half + i, count);
        store_some(out + i, fma(p, cosine, -(q * sine)), count);
        store_some(out + half + i, fma(q, cosine, p * sine), count);
      });
    }
  }

  void position(int64_t index) const {
    const int64_t table = (per_batch ? index : index % T) * half;
    const float* from = x + index * H * D;
    float* to = y + index * H * (F + 2 * half);
    for (int64_t h = 0; h < H; h++) {
      const float* in = plain + (index * H + h) * P;
      float* out = to + h * (F + 2 * half);
      each_vector(F, [&](int64_t i, int count) { store_some(out + i, load_some(in + i, count), count); });
    }
    if (interleaved) {
      neighbours(from, to, cos + table, sin + table);
    } else {
      halves(from, to, cos + table, sin + table);
    }
  }
};

}  // namespace

// y, x, cos, sin, plain, B, T, H, D, F, P, half, per_batch, interleaved, inverse
MOE_KERNEL(moe_rope_f32) {
  Rope rope;
  rope.y = args.ptr<float>();
  rope.x = args.ptr<const float>();
  rope.cos = args.ptr<const float>();
  rope.sin = args.ptr<const float>();
  rope.plain = args.ptr<const float>();
  rope.B = args.size();
  rope.T = args.size();
  rope.H = args.size();
  rope.D = args.size();
  rope.F = args.size();
  rope.P = args.size();
  rope.half = args.size();
  rope.per_batch = args.flag();
  rope.interleaved = args.flag();
  rope.sign = args.flag() ? -1.0f : 1.0f;
  parallel_for(rope.B * rope.T, 8192 / std::max<int64_t>(1, rope.H * (rope.F + 2 * rope.half)), [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; i++) rope.position(i);
  });
}
