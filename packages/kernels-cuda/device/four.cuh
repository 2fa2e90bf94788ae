// Four neighbouring floats as one access of 16 bytes, and loops that deal them out.
#pragma once
#include "wide.cuh"

struct Four {
  float v[4];
};

/// {f(0), f(1), f(2), f(3)}
template <class F>
MOE_DEVICE Four four(F&& f) {
  return {{f(0), f(1), f(2), f(3)}};
}

/// Elements i .. i+3 of `from`, at once: from + i is a multiple of 16 bytes.
template <class I>
MOE_DEVICE Four load4(const float* from, I i) {
  const float4 x = *reinterpret_cast<const float4*>(from + i);
  return {{x.x, x.y, x.z, x.w}};
}
/// To global memory.
template <class I>
MOE_DEVICE void store4(float* to, I i, const Four& x) {
  storeWide(to + i, x.v[0], x.v[1], x.v[2], x.v[3]);
}
/// The same, and rounded to `rounded` unless that is null.
template <class I>
MOE_DEVICE void store4(float* to, bf16* rounded, I i, const Four& x) {
  store4(to, i, x);
  if (rounded) storeWide(rounded + i, packBf16(x.v[0], x.v[1]), packBf16(x.v[2], x.v[3]));
}
template <class I>
MOE_DEVICE void storeShared4(float* to, I i, const Four& x) {
  storeWideShared(to + i, x.v[0], x.v[1], x.v[2], x.v[3]);
}

/// True when elements i .. i+3 can be accessed at once and lie within 0 .. n-1.
template <class I>
MOE_DEVICE bool isWhole(const float* at, I i, I n) {
  return i >= 0 && i + 4 <= n && reinterpret_cast<uintptr_t>(at + i) % 16 == 0;
}

/// Elements i .. i+3 of 0 .. n-1, `filler` where there is none. `Whole` promises isWhole.
template <bool Whole, class I>
MOE_DEVICE Four load4(const float* from, I i, I n, float filler = 0.f) {
  if constexpr (Whole) {
    return load4(from, i);
  } else {
    if (isWhole(from, i, n)) return load4(from, i);
    return four([&](int k) { return i + k >= 0 && i + k < n ? from[i + k] : filler; });
  }
}
template <bool Whole, class I>
MOE_DEVICE void store4(float* to, I i, I n, const Four& x) {
  if constexpr (Whole) {
    store4(to, i, x);
  } else {
    if (isWhole(to, i, n)) return store4(to, i, x);
    for (int k = 0; k < 4; k++) {
      if (i + k >= 0 && i + k < n) to[i + k] = x.v[k];
    }
  }
}

/// Elements i .. i+3 of a row in bf16, of which n exist. `Whole` promises that these do, and are a multiple of 8 bytes.
template <bool Whole = false, class I>
MOE_DEVICE Four load4(const bf16* row, I i, I n) {
  if (Whole || (i + 4 <= n && (uintptr_t)(row + i) % 8 == 0)) {
    const uint2 x = *(const uint2*)(row + i);
    return {{lowBf16(x.x), highBf16(x.x), lowBf16(x.y), highBf16(x.y)}};
  }
  return four([&](int j) { return i + j < n ? toFloat(row[i + j]) : 0.f; });
}
/// Rounded, to global memory.
template <bool Whole = false, class I>
MOE_DEVICE void store4(bf16* to, I i, I n, const Four& x) {
  if constexpr (Whole) {
    storeWide(to + i, packBf16(x.v[0], x.v[1]), packBf16(x.v[2], x.v[3]));
  } else {
    if (i + 4 <= n && (uintptr_t)(to + i) % 8 == 0) return store4<true>(to, i, n, x);
    for (int k = 0; k < 4; k++) {
      if (i + k < n) to[i + k] = toBf16(x.v[k]);
    }
  }
}

/// A compile-time truth, as an argument: `[](auto whole) { load4<whole.value>(...) }`.
template <bool Value>
struct Always {
  static constexpr bool value = Value;
};

/// f(i, whole) for i = 0, 4, 8 .. below n, over all threads of the grid: tensors, which start at a multiple of 16 bytes.
template <class F>
MOE_DEVICE void eachFour(int64_t n, F&& f) {
  for (int64_t i = 4 * gridThread(); i < n; i += 4 * gridThreads()) {
    if (i + 4 <= n) {
      f(i, Always<true>{});
    } else {
      f(i, Always<false>{});
    }
  }
}
