// Four neighbouring floats as one 16-byte access, and loops over them that handle ragged ends.
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

/// Elements i .. i+3 of `from`, with one load. from + i is aligned to 16 bytes.
template <class I>
MOE_DEVICE Four load4(const float* from, I i) {
  const float4 x = *reinterpret_cast<const float4*>(from + i);
  return {{x.x, x.y, x.z, x.w}};
}
/// Stores to global memory.
template <class I>
MOE_DEVICE void store4(float* to, I i, const Four& x) {
  storeWide(to + i, x.v[0], x.v[1], x.v[2], x.v[3]);
}
/// Stores to global memory, and also rounded to `rounded` unless that is null.
template <class I>
MOE_DEVICE void store4(float* to, bf16* rounded, I i, const Four& x) {
  store4(to, i, x);
  if (rounded) storeWide(rounded + i, packBf16(x.v[0], x.v[1]), packBf16(x.v[2], x.v[3]));
}
template <class I>
MOE_DEVICE void storeShared4(float* to, I i, const Four& x) {
  storeWideShared(to + i, x.v[0], x.v[1], x.v[2], x.v[3]);
}

/// True if elements i .. i+3 can be accessed at once (aligned, and all of them within 0 .. n-1).
template <class I>
MOE_DEVICE bool isWhole(const float* at, I i, I n) {
  return i >= 0 && i + 4 <= n && reinterpret_cast<uintptr_t>(at + i) % 16 == 0;
}

/// Elements i .. i+3 of an array of n, `filler` outside of it. Whole: the caller guarantees isWhole.
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

/// Elements i .. i+3 of a row of n bf16, zeros after its end. Whole: the caller guarantees that they exist and are
/// aligned to 8 bytes.
template <bool Whole = false, class I>
MOE_DEVICE Four load4(const bf16* row, I i, I n) {
  if (Whole || (i + 4 <= n && (uintptr_t)(row + i) % 8 == 0)) {
    const uint2 x = *(const uint2*)(row + i);
    return {{lowBf16(x.x), highBf16(x.x), lowBf16(x.y), highBf16(x.y)}};
  }
  return four([&](int j) { return i + j < n ? toFloat(row[i + j]) : 0.f; });
}
/// Rounds to bf16 and stores to global memory.
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

/// A compile-time boolean passed as an argument: `[](auto whole) { load4<whole.value>(...) }`.
template <bool Value>
struct Always {
  static constexpr bool value = Value;
};

/// Grid-stride loop: f(i, whole) for i = 0, 4, 8 .. below n, for tensors, which are aligned to 16 bytes.
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
