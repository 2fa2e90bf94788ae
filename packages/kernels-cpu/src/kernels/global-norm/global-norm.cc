// Square root of the sum of squares of many tensors, summed in double precision. The result is a float, and optionally three floats whose sum is the double.
#include "moe.h"

using namespace moe;

namespace {

// The launcher passes long lists in several calls; this is the sum between calls.
thread_local double total_so_far = 0;

constexpr int64_t chunk = 16384;

double sum_of_squares(const float* x, int64_t n) {
  double sums[16] = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    for (int j = 0; j < 16; j++) sums[j] += static_cast<double>(x[i + j]) * static_cast<double>(x[i + j]);
  }
  for (int j = 0; i < n; i++, j++) sums[j] += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  for (int width = 8; width > 0; width /= 2) {
    for (int j = 0; j < width; j++) sums[j] += sums[j + width];
  }
  return sums[0];
}

}  // namespace

// norm, its floats, first, last, count, then count times (address, n)
MOE_KERNEL(moe_global_norm_f32) {
  float* norm = args.ptr<float>();
  const int floats = args.i32();
  const bool first = args.flag(), last = args.flag();
  const int count = args.i32();
  const float* tensors[64];
  int64_t sizes[64], starts[65] = {};
  for (int i = 0; i < count; i++) {
    tensors[i] = args.ptr<const float>();
    sizes[i] = args.size();
    starts[i + 1] = starts[i] + (sizes[i] + chunk - 1) / chunk;
  }
  const int64_t tasks = starts[count];
  Scratch scratch(static_cast<size_t>(tasks) * 8 + 8);
  double* sums = scratch.as<double>();
  // A few chunks per task, so that the cost of starting a task is negligible.
  parallel_for(tasks, 4, [&](int64_t begin, int64_t end, int) {
    int i = static_cast<int>(std::upper_bound(starts, starts + count + 1, begin) - starts) - 1;
    for (int64_t task = begin; task < end; task++) {
      while (task >= starts[i + 1]) i++;
      const int64_t at = (task - starts[i]) * chunk;
      sums[task] = sum_of_squares(tensors[i] + at, std::min(chunk, sizes[i] - at));
    }
  });
  double total = first ? 0 : total_so_far;
  for (int64_t task = 0; task < tasks; task++) total += sums[task];
  total_so_far = total;
  if (!last) return;
  double rest = std::sqrt(total);
  for (int i = 0; i < floats; i++) {
    norm[i] = static_cast<float>(rest);
    rest -= static_cast<double>(norm[i]);
  }
}
