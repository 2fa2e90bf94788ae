// Cumulative sums along the middle axis of [outer, count, inner]: (y, x, outer, count, inner). f32 is summed in double precision.
#include "moe.h"

using namespace moe;

namespace {

constexpr int64_t strip = 64;
constexpr int64_t together = 8;

// Processes `count` rows of n elements together, so that their chains of additions overlap.
template <class T, class Total, int64_t count>
void along_rows(T* y, const T* x, int64_t n) {
  Total total[count] = {};
  for (int64_t i = 0; i < n; i++) {
    for (int64_t r = 0; r < count; r++) y[r * n + i] = static_cast<T>(total[r] += static_cast<Total>(x[r * n + i]));
  }
}

template <class T, class Total>
void cumsum(Args& args) {
  T* y = args.ptr<T>();
  const T* x = args.ptr<const T>();
  const int64_t outer = args.size(), n = args.size(), inner = args.size();
  if (inner == 1) {
    const int64_t groups = (outer + together - 1) / together;
    return parallel_for(groups, std::max<int64_t>(1, 1024 / std::max<int64_t>(1, n)), [&](int64_t begin, int64_t end, int) {
      for (int64_t row = begin * together; row < std::min(outer, end * together);) {
        if (row + together <= outer) {
          along_rows<T, Total, together>(y + row * n, x + row * n, n);
          row += together;
        } else {
          along_rows<T, Total, 1>(y + row * n, x + row * n, n);
          row++;
        }
      }
    });
  }
  const int64_t strips = (inner + strip - 1) / strip;
  const int64_t grain = std::max<int64_t>(1, 8192 / std::max<int64_t>(1, n * std::min(inner, strip)));
  parallel_for(outer * strips, grain, [&](int64_t begin, int64_t end, int) {
    for (int64_t task = begin; task < end; task++) {
      const int64_t column = task % strips * strip;
      const int64_t width = std::min(strip, inner - column);
      const int64_t first = task / strips * n * inner + column;
      Total total[strip] = {};
      for (int64_t r = 0; r < n; r++) {
        const int64_t at = first + r * inner;
        for (int64_t i = 0; i < width; i++) y[at + i] = static_cast<T>(total[i] += static_cast<Total>(x[at + i]));
      }
    }
  });
}

}  // namespace

MOE_KERNEL(moe_cumsum_f32) { cumsum<float, double>(args); }
MOE_KERNEL(moe_cumsum_i32) { cumsum<int32_t, uint32_t>(args); }
