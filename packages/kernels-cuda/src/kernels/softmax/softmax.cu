// Softmax over rows and its gradient. Kernels end in _t<threads per row>.
#include "row.cuh"

// y = softmax(x). Zeros for a row of only -Infinity; NaN everywhere if a row contains NaN or +Infinity.
template <int Threads, int Held, bool Whole>
MOE_DEVICE void softmax(float* y, const float* x, int n) {
  const float low = -infinity();
  const int first = firstColumn<Threads>(x);
  const Row<Threads, Held, Whole> row(x, first, n, low);
  float top = low;
  eachVector<Threads, Held>(first, n, [&](int i, int j) {
    const Four v = row.at(i, j);
    top = maxOrNan(maxOrNan(top, maxOrNan(v.v[0], v.v[1])), maxOrNan(v.v[2], v.v[3]));
  });
  top = blockMax<Threads>(top);
  const float shift = top == low ? 0.f : top;
  float total = 0.f;
  eachVector<Threads, Held>(first, n, [&](int i, int j) {
    const Four v = row.at(i, j);
    total += (expf(v.v[0] - shift) + expf(v.v[1] - shift)) + (expf(v.v[2] - shift) + expf(v.v[3] - shift));
  });
  total = blockSum<Threads>(total);
  const float factor = 1.f / (total < 1e-37f ? 1e-37f : total);
  eachVector<Threads, Held>(first, n, [&](int i, int j) {
    const Four v = row.at(i, j);
    store4<Whole>(y, i, n, four([&](int k) { return expf(v.v[k] - shift) * factor; }));
  });
}

// dx = y * (dy - sum(y * dy))
template <int Threads, int Held, bool Whole>
MOE_DEVICE void softmaxGradient(float* dx, const float* y, const float* dy, int n) {
  const int first = firstColumn<Threads>(y);
  const Row<Threads, Held, Whole> yRow(y, first, n), dyRow(dy, first, n);
  float dot = 0.f;
  eachVector<Threads, Held>(first, n, [&](int i, int j) {
    const Four a = yRow.at(i, j), b = dyRow.at(i, j);
    for (int k = 0; k < 4; k++) dot += a.v[k] * b.v[k];
  });
  dot = blockSum<Threads>(dot);
  eachVector<Threads, Held>(first, n, [&](int i, int j) {
    const Four a = yRow.at(i, j), b = dyRow.at(i, j);
    store4<Whole>(dx, i, n, four([&](int k) { return a.v[k] * (b.v[k] - dot); }));
  });
}

#define SOFTMAX(Threads, bounds)                                                                                         \
  MOE_KERNEL(bounds, moe_softmax_fwd_f32_t##Threads, (float* y, const float* x, int64_t rows, int n)) {                  \
    const int64_t row = rowOfGroup<Threads>();                                                                           \
    if (row >= rows) return;                                                                                             \
    const int64_t at = row * n;                                                                                          \
    if (n % 4 == 0) {                                                                                                    \
      softmax<Threads, 8, true>(y + at, x + at, n);                                                                      \
    } else {                                                                                                             \
      softmax<Threads, 0, false>(y + at, x + at, n);                                                                     \
    }                                                                                                                    \
  }                                                                                                                      \
  MOE_KERNEL(bounds, moe_softmax_bwd_f32_t##Threads, (float* dx, const float* y, const float* dy, int64_t rows, int n)) { \
    const int64_t row = rowOfGroup<Threads>();                                                                           \
    if (row >= rows) return;                                                                                             \
    const int64_t at = row * n;                                                                                          \
    if (n % 4 == 0) {                                                                                                    \
      softmaxGradient<Threads, 8, true>(dx + at, y + at, dy + at, n);                                                    \
    } else {                                                                                                             \
      softmaxGradient<Threads, 0, false>(dx + at, y + at, dy + at, n);                                                   \
    }                                                                                                                    \
  }

// With 256 threads per row, a row is a whole block's, so either all of its threads return or none.
SOFTMAX(32, (128))
SOFTMAX(256, (256, 2))
