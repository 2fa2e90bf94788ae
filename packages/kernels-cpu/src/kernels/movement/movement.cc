// Elements to other places, by element size: boxes with strides on both sides, and transposes.
#include "broadcast.h"
#include "moe.h"

using namespace moe;

namespace {

// (y, x, nest of y and x): y[nest] = x[nest].
template <class T>
void copy_box(Args& args) {
  T* y = args.ptr<T>();
  const T* x = args.ptr<const T>();
  const Nest<2> nest(args);
  const int64_t step_y = nest.inner_stride(0), step_x = nest.inner_stride(1);
  each_row(nest, 65536 / static_cast<int64_t>(sizeof(T)), [&](int64_t, const int64_t* at, int64_t n) {
    T* to = y + at[0];
    const T* from = x + at[1];
    if (step_y == 1 && step_x == 1) {
      if (n < 32) {
        for (int64_t i = 0; i < n; i++) to[i] = from[i];
      } else {
        std::memcpy(to, from, static_cast<size_t>(n) * sizeof(T));
      }
    } else if (step_y == 1 && step_x == 0) {
      std::fill_n(to, n, *from);
    } else {
      for (int64_t i = 0; i < n; i++) to[i * step_y] = from[i * step_x];
    }
  });
}

// --- transposes: y[p * stride_y + q] = x[q * stride_x + p] for p < P, q < Q ---

constexpr int64_t tile = 64;

#if defined(__AVX2__)
constexpr int64_t micro = 8;
void transpose_micro(uint32_t* y, int64_t stride_y, const uint32_t* x, int64_t stride_x) {
  __m256 r[8], t[8];
  for (int i = 0; i < 8; i++) r[i] = _mm256_loadu_ps(reinterpret_cast<const float*>(x + i * stride_x));
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
    _mm256_storeu_ps(reinterpret_cast<float*>(y + i * stride_y), _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
    _mm256_storeu_ps(reinterpret_cast<float*>(y + (i + 4) * stride_y), _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
  }
}
#elif defined(__x86_64__)
constexpr int64_t micro = 4;
void transpose_micro(uint32_t* y, int64_t stride_y, const uint32_t* x, int64_t stride_x) {
  __m128 r[4];
  for (int i = 0; i < 4; i++) r[i] = _mm_loadu_ps(reinterpret_cast<const float*>(x + i * stride_x));
  _MM_TRANSPOSE4_PS(r[0], r[1], r[2], r[3]);
  for (int i = 0; i < 4; i++) _mm_storeu_ps(reinterpret_cast<float*>(y + i * stride_y), r[i]);
}
#else
constexpr int64_t micro = 4;
void transpose_micro(uint32_t* y, int64_t stride_y, const uint32_t* x, int64_t stride_x) {
  for (int i = 0; i < 4; i++) {
    for (int j = 0; j < 4; j++) y[i * stride_y + j] = x[j * stride_x + i];
  }
}
#endif

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
