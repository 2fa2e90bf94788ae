// exp, log, sin, cos, tanh, sigmoid on vectors, 1 to 2 units in the last place, with the special values of IEEE 754.
// Coefficients: Cephes (S. Moshier), single precision.
#pragma once

#include <cmath>
#include <limits>

#include "simd.h"

namespace moe {

// x * 2^n for n in about -252 .. 252, including denormal results.
MOE_INLINE f32v scale_by_power(f32v x, i32v n) {
#if defined(__AVX512F__)
  return (f32v)_mm512_scalef_ps((__m512)x, (__m512)to_f32(n));
#else
  const i32v half = n >> 1;
  return x * from_bits((half + 127) << 23) * from_bits((n - half + 127) << 23);
#endif
}

MOE_INLINE f32v exp(f32v x) {
  // Kept in range for the exponent arithmetic; the upper bound gives infinity by itself. Zeros are not computed, because results that
  // underflow take a hundred times as long on Intel, and masks are full of exp(-Infinity). NaN passes through both.
  const f32v high = splat(89.0f);
  const i32v vanishes = x < splat(-104.0f);
  f32v clamped = from_bits(~vanishes & bits(x));
  clamped = select(clamped > high, high, clamped);
  const f32v n = round_small(clamped * splat(1.44269504088896341f));
  f32v r = fnma(n, splat(0.693359375f), clamped);
  r = fnma(n, splat(-2.12194440e-4f), r);
  f32v p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, r * r, r) + splat(1.0f);
  const f32v safe = select(n == n, n, zero());
  return from_bits(~vanishes & bits(scale_by_power(p, to_i32(safe))));
}

// exp for x <= 0; results below 2^-126 may become 0 (softmax, attention). NaN gives NaN or 0.
MOE_INLINE f32v exp_nonpositive(f32v x) {
  const f32v low = splat(-87.3f);
  const i32v tiny = x < low;
  const f32v clamped = fast_max(low, x);
  const f32v n = round_small(clamped * splat(1.44269504088896341f));
  f32v r = fnma(n, splat(0.693359375f), clamped);
  r = fnma(n, splat(-2.12194440e-4f), r);
  f32v p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, r * r, r) + splat(1.0f);
#if defined(__AVX512F__)
  const f32v y = (f32v)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  const f32v y = from_bits(bits(p) + (to_i32(n) << 23));
#endif
  return from_bits(~tiny & bits(y));
}

MOE_INLINE f32v log(f32v x) {
  const float infinity = std::numeric_limits<float>::infinity();
  // Scale denormals into range first.
  const i32v tiny = x < splat(1.17549435e-38f);
  const f32v scaled = select(tiny, x * splat(8388608.0f), x);
  i32v exponent = ((bits(scaled) >> 23) & 0xff) - 126;
  exponent = exponent - (tiny & 23);
  f32v m = from_bits((bits(scaled) & 0x007fffff) | 0x3f000000);  // 0.5 .. 1
  const i32v small = m < splat(0.707106781186547524f);
  f32v e = to_f32(exponent + small);  // one less where small (-1)
  m = m + from_bits(small & bits(m)) - splat(1.0f);
  const f32v z = m * m;
  f32v p = splat(7.0376836292e-2f);
  p = fma(p, m, splat(-1.1514610310e-1f));
  p = fma(p, m, splat(1.1676998740e-1f));
  p = fma(p, m, splat(-1.2420140846e-1f));
  p = fma(p, m, splat(1.4249322787e-1f));
  p = fma(p, m, splat(-1.6668057665e-1f));
  p = fma(p, m, splat(2.0000714765e-1f));
  p = fma(p, m, splat(-2.4999993993e-1f));
  p = fma(p, m, splat(3.3333331174e-1f));
  f32v y = p * m * z;
  y = fma(e, splat(-2.12194440e-4f), y);
  y = fnma(splat(0.5f), z, y);
  y = fma(e, splat(0.693359375f), m + y);
  y = select(x == splat(infinity), x, y);
  y = select(x == zero(), splat(-infinity), y);
  y = select(x < zero(), splat(std::numeric_limits<float>::quiet_NaN()), y);
  return select(x != x, x, y);
}

MOE_INLINE f32v sigmoid(f32v x) { return splat(1.0f) / (splat(1.0f) + exp(-x)); }

MOE_INLINE f32v tanh(f32v x) {
  const f32v a = abs(x);
  const f32v z = x * x;
  f32v p = splat(-5.70498872745e-3f);
  p = fma(p, z, splat(2.06390887954e-2f));
  p = fma(p, z, splat(-5.37397155531e-2f));
  p = fma(p, z, splat(1.33314422036e-1f));
  p = fma(p, z, splat(-3.33332819422e-1f));
  const f32v near = fma(p * z, x, x);
  const f32v far = splat(1.0f) - splat(2.0f) / (exp(a + a) + splat(1.0f));
  const f32v signed_far = from_bits(bits(far) | (bits(x) & static_cast<int32_t>(0x80000000)));
  return select(a < splat(0.625f), near, select(x != x, x, signed_far));
}

namespace detail {

// sin(x + quarter_turns * pi/2) for |x| >= 8192 or NaN. Not every C library reduces such an x accurately, which needs as many digits of 2/pi as x
// is large (M. Payne and R. Hanek, 1983).
static inline float sine_of_large(float x, int quarter_turns) {
  using uint128 = unsigned __int128;
  if (!(__builtin_fabsf(x) <= std::numeric_limits<float>::max())) return x - x;
  static constexpr uint32_t two_over_pi[] = {0, 0xA2F9836E, 0x4E441529, 0xFC2757D1, 0xF534DDC0, 0xDB629599, 0x3C439041, 0xFE5163AB};
  uint32_t word;
  std::memcpy(&word, &x, 4);
  const uint32_t mantissa = (word & 0x7fffff) | 0x800000;
  // |x| = mantissa * 2^shift. The 96 relevant bits of 2/pi start with the first one that does not give a multiple of four quarter turns.
  const int shift = static_cast<int>(word >> 23 & 0xff) - 150;
  const int first = 32 + shift - 2;
  const uint32_t* words = two_over_pi + first / 32;
  const uint128 some = uint128{words[0]} << 96 | uint128{words[1]} << 64 | uint128{words[2]} << 32 | words[3];
  const uint128 turns = (some << (first % 32) >> 32) * mantissa << 32;  // in quarters, the point behind the two highest bits
  int quarter = static_cast<int>((turns + (uint128{1} << 125)) >> 126);
  double r = static_cast<double>(static_cast<__int128>(turns - (static_cast<uint128>(quarter) << 126))) * 0x1p-126 * 1.5707963267948966;
  if (x < 0) r = -r, quarter = -quarter;
  quarter += quarter_turns;
  const double y = quarter & 1 ? std::cos(r) : std::sin(r);
  return static_cast<float>(quarter & 2 ? -y : y);
}

// sin(x + quarter_turns * pi/2)
MOE_INLINE f32v sine(f32v x, int quarter_turns) {
  const f32v n = round_small(x * splat(0.636619772367581343f));
  // pi/2 in four parts of few bits: n * part is exact (n below 2^13) or rounded once by the fused step.
  f32v r = fnma(n, splat(1.5703125f), x);
  r = fnma(n, splat(4.837512969970703125e-4f), r);
  r = fnma(n, splat(7.54953362047672271728515625e-8f), r);
  r = fnma(n, splat(2.5633441515945915691e-12f), r);
  const i32v quarter = to_i32(select(abs(n) < splat(8192.0f), n, zero())) + quarter_turns;
  const f32v z = r * r;
  f32v s = splat(-1.9515295891e-4f);
  s = fma(s, z, splat(8.3321608736e-3f));
  s = fma(s, z, splat(-1.6666654611e-1f));
  s = fma(s * z, r, r);
  f32v c = splat(2.443315711809948e-5f);
  c = fma(c, z, splat(-1.388731625493765e-3f));
  c = fma(c, z, splat(4.166664568298827e-2f));
  c = fma(c * z, z, fnma(splat(0.5f), z, splat(1.0f)));
  f32v y = select((quarter & 1) != 0, c, s);
  y = from_bits(bits(y) ^ ((quarter & 2) << 30));
  const i32v large = ~(abs(x) < splat(8192.0f));
  if (__builtin_expect(any(large), 0)) {
    for (int i = 0; i < lanes; i++) {
      if (large[i]) y[i] = sine_of_large(x[i], quarter_turns);
    }
  }
  return y;
}

}  // namespace detail

MOE_INLINE f32v sin(f32v x) { return detail::sine(x, 0); }
MOE_INLINE f32v cos(f32v x) { return detail::sine(x, 1); }

}  // namespace moe
