// Moves elements: copies of boxes with strides on both sides, and transposes. One kernel per element size.
#include "broadcast.h"
#include "moe.h"

using namespace moe;

namespace {

// memcpy for runs that are too short to be worth a call.
template <class T>
__attribute__((always_inline)) inline void copy_run(T* to, const T* from, int64_t n) {
  constexpr int64_t step = lanes * 4 / static_cast<int64_t>(sizeof(T));
  if (n < step) {
    for (int64_t i = 0; i < n; i++) to[i] = from[i];
  } else if (n <= 16 * step) {
    // Whole vectors; the last one ends where the run ends and may overlap the one before.
    for (int64_t i = 0; i < n - step; i += step) std::memcpy(to + i, from + i, lanes * 4);
    std::memcpy(to + n - step, from + n - step, lanes * 4);
  } else {
    std::memcpy(to, from, static_cast<size_t>(n) * sizeof(T));
  }
}

// Copies contiguous runs: plain loops over the two innermost axes, a loop nest over the others.
template <class T>
void copy_runs(T* y, const T* x, const Nest<2>& nest) {
  const int64_t n = nest.inner(), rows = nest.total / n;
  const int next = nest.rank - 2;
  const int64_t next_y = nest.strides[0][next], next_x = nest.strides[1][next];
  parallel_for(rows, std::max<int64_t>(1, 65536 / static_cast<int64_t>(sizeof(T)) / n), [&](int64_t begin, int64_t end, int) {
    while (begin < end) {
      int64_t rest = begin / nest.sizes[next], at_y = 0, at_x = 0;
      const int64_t index = begin % nest.sizes[next];
      for (int axis = next - 1; axis >= 0; axis--) {
        const int64_t i = rest % nest.sizes[axis];
        rest /= nest.sizes[axis];
        at_y += i * nest.strides[0][axis];
        at_x += i * nest.strides[1][axis];
      }
      const int64_t count = std::min(end - begin, nest.sizes[next] - index);
      T* to = y + at_y + index * next_y;
      const T* from = x + at_x + index * next_x;
      for (int64_t i = 0; i < count; i++) copy_run(to + i * next_y, from + i * next_x, n);
      begin += count;
    }
  });
}

// (y, x, nest of y and x): y[nest] = x[nest].
template <class T>
void copy_box(Args& args) {
  T* y = args.ptr<T>();
  const T* x = args.ptr<const T>();
  const Nest<2> nest(args);
  if (nest.total == 0) return;
  const int64_t step_y = nest.inner_stride(0), step_x = nest.inner_stride(1);
  if (step_y == 1 && step_x == 1 && nest.rank > 1 && nest.total / nest.inner() >= 64) return copy_runs(y, x, nest);
  each_row(nest, 65536 / static_cast<int64_t>(sizeof(T)), [&](int64_t, const int64_t* at, int64_t n) {
    T* to = y + at[0];
    const T* from = x + at[1];
    if (step_y == 1 && step_x == 1) {
      copy_run(to, from, n);
    } else if (step_y == 1 && step_x == 0) {
      std::fill_n(to, n, *from);
    } else {
      for (int64_t i = 0; i < n; i++) to[i * step_y] = from[i * step_x];
    }
  });
}

// --- transposes: y[p * stride_y + q] = x[q * stride_x + p] for p < P, q < Q ---

constexpr int64_t tile = 64;

// Squares of 16 x 16 elements are copied through `square`, so that every cache line of x is read only once and every line of y written only once. With
// strides of a power of two, the lines of a whole tile would map to the same few cache sets.
constexpr int64_t micro = 16;

#if defined(__AVX2__)
void transpose_8x8(float* to, const float* x, int64_t stride_x) {
  __m256 r[8], t[8];
  for (int i = 0; i < 8; i++) r[i] = _mm256_loadu_ps(x + i * stride_x);
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int i = 0; i < 4; i++) {
    _mm256_storeu_ps(to + i * micro, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
    _mm256_storeu_ps(to + (i + 4) * micro, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
  }
}
#endif

void transpose_micro(uint32_t* y, int64_t stride_y, const uint32_t* x, int64_t stride_x) {
  alignas(64) uint32_t square[micro * micro];
#if defined(__AVX2__)
  float* to = reinterpret_cast<float*>(square);
  const float* from = reinterpret_cast<const float*>(x);
  for (int64_t q = 0; q < micro; q += 8) {
    for (int64_t p = 0; p < micro; p += 8) transpose_8x8(to + p * micro + q, from + q * stride_x + p, stride_x);
  }
#elif defined(__x86_64__)
  float* to = reinterpret_cast<float*>(square);
  const float* from = reinterpret_cast<const float*>(x);
  for (int64_t q = 0; q < micro; q += 4) {
    for (int64_t p = 0; p < micro; p += 4) {
      __m128 r[4];
      for (int i = 0; i < 4; i++) r[i] = _mm_loadu_ps(from + (q + i) * stride_x + p);
      _MM_TRANSPOSE4_PS(r[0], r[1], r[2], r[3]);
      for (int i = 0; i < 4; i++) _mm_storeu_ps(to + (p + i) * micro + q, r[i]);
    }
  }
#else
  for (int64_t q = 0; q < micro; q++) {
    for (int64_t p = 0; p < micro; p++) square[p * micro + q] = x[q * stride_x + p];
  }
#endif
  for (int64_t p = 0; p < micro; p++) std::memcpy(y + p * stride_y, square + p * micro, micro * 4);
}

template <class T>
void transpose_tile(T* y, int64_t stride_y, const T* x, int64_t stride_x, int64_t sizes_p, int64_t sizes_q) {
  int64_t whole_p = 0, whole_q = 0;
  if constexpr (sizeof(T) == 4) {
    whole_p = sizes_p / micro * micro;
    whole_q = sizes_q / micro * micro;
    for (int64_t p = 0; p < whole_p; p += micro) {
      for (int64_t q = 0; q < whole_q; q += micro) transpose_micro(y + p * stride_y + q, stride_y, x + q * stride_x + p, stride_x);
    }
  }
  for (int64_t p = 0; p < sizes_p; p++) {
    for (int64_t q = p < whole_p ? whole_q : 0; q < sizes_q; q++) y[p * stride_y + q] = x[q * stride_x + p];
  }
}

// (y, x, P, Q, stride_y, stride_x, nest of y and x over the other axes)
template <class T>
void transpose(Args& args) {
  T* y = args.ptr<T>();
  const T* x = args.ptr<const T>();
  const int64_t size_p = args.size(), size_q = args.size(), stride_y = args.size(), stride_x = args.size();
  const Nest<2> nest(args);
  if (nest.total * size_p * size_q == 0) return;
  const int64_t tiles_p = (size_p + tile - 1) / tile, tiles_q = (size_q + tile - 1) / tile;
  const int64_t in_tile = std::min(tile, size_p) * std::min(tile, size_q);
  parallel_for(nest.total * tiles_p * tiles_q, std::max<int64_t>(1, 16384 / in_tile), [&](int64_t begin, int64_t end, int) {
    for (int64_t task = begin; task < end; task++) {
      const int64_t q = task % tiles_q * tile, p = task / tiles_q % tiles_p * tile;
      int64_t rest = task / tiles_q / tiles_p, at_y = 0, at_x = 0;
      for (int axis = nest.rank - 1; axis >= 0; axis--) {
        const int64_t i = rest % nest.sizes[axis];
        rest /= nest.sizes[axis];
        at_y += i * nest.strides[0][axis];
        at_x += i * nest.strides[1][axis];
      }
      transpose_tile(y + at_y + p * stride_y + q, stride_y, x + at_x + q * stride_x + p, stride_x, std::min(tile, size_p - p),
                     std::min(tile, size_q - q));
    }
  });
}

}  // namespace

MOE_KERNEL(moe_copy_box_b32) { copy_box<uint32_t>(args); }
MOE_KERNEL(moe_copy_box_b16) { copy_box<uint16_t>(args); }
MOE_KERNEL(moe_copy_box_b8) { copy_box<uint8_t>(args); }
MOE_KERNEL(moe_transpose_b32) { transpose<uint32_t>(args); }
MOE_KERNEL(moe_transpose_b16) { transpose<uint16_t>(args); }
MOE_KERNEL(moe_transpose_b8) { transpose<uint8_t>(args); }
