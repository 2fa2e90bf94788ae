// Finds the largest elements by integer keys that order like the floats: NaN counts as -Infinity, zeros are equal, and excluded elements are
// below -Infinity. Included once per instruction set.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>

#include "simd.h"

namespace moe {
namespace {

constexpr int32_t excluded = std::numeric_limits<int32_t>::min();
constexpr float lowest = -std::numeric_limits<float>::infinity();

MOE_INLINE i32v key_of(f32v x) {
  const f32v plain = select(x != x, splat(lowest), x) + splat(0.0f);  // -0 + 0 = 0
  return bits(plain) ^ ((bits(plain) >> 31) & 0x7fffffff);
}
inline int32_t key_of(float x) {
  const float plain = (x != x ? lowest : x) + 0.0f;
  int32_t b;
  std::memcpy(&b, &plain, 4);
  return b ^ ((b >> 31) & 0x7fffffff);
}
inline float value_of(int32_t key) {
  const int32_t b = key ^ ((key >> 31) & 0x7fffffff);
  float x;
  std::memcpy(&x, &b, 4);
  return x;
}

MOE_INLINE i32v larger(i32v a, i32v b) {
#if defined(__AVX512F__)
  return (i32v)_mm512_max_epi32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (i32v)_mm256_max_epi32((__m256i)a, (__m256i)b);
#else
  return select(a > b, a, b);
#endif
}
MOE_INLINE int32_t largest(i32v x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_epi32((__m512i)x);
#else
  int32_t best = x[0];
  for (int i = 1; i < lanes; i++) best = std::max(best, x[i]);
  return best;
#endif
}
// Index of the first lane whose mask is set; there must be one.
MOE_INLINE int first_lane(i32v mask) { return __builtin_ctz(set_lanes(mask)); }

// `x` with one lane excluded.
MOE_INLINE i32v without(i32v x, int lane) {
  i32v numbers;
  for (int i = 0; i < lanes; i++) numbers[i] = i;
  return select(numbers == lane, splat(excluded), x);
}

// Returns the index of the largest of `keys` (a multiple of `lanes`, the rest excluded), the first if several are equal, and excludes it.
MOE_INLINE int64_t take_largest(int32_t* keys, int64_t padded) {
  i32v top = load(keys);
  for (int64_t i = lanes; i < padded; i += lanes) top = larger(top, load(keys + i));
  const i32v best = splat(largest(top));
  for (int64_t i = 0; i < padded; i += lanes) {
    const i32v here = load(keys + i), hit = here == best;
    if (!any(hit)) continue;
    const int lane = first_lane(hit);
    store(keys + i, without(here, lane));  // a whole vector, so that the next load is forwarded from the store buffer
    return i + lane;
  }
  return 0;
}

}  // namespace
}  // namespace moe
