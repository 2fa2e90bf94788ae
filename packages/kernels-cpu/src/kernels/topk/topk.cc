// The k largest of each row, largest first, ties to the lowest index, NaN as -infinity:
// (values [rows, k], indices [rows, k], x [rows, n], rows, n, k).
#include "largest.h"
#include "moe.h"

using namespace moe;

namespace {

constexpr int64_t most_selected = 4 * lanes * lanes, most_inserted = 128;

// For rows that stay in L1: searches for the largest k times. Scanning a few vectors is faster than a mispredicted branch.
void by_selection(int32_t* best, const float* x, int64_t n, int64_t k) {
  alignas(64) int32_t keys[most_selected];
  const int64_t whole = n / lanes * lanes, padded = whole < n ? whole + lanes : whole;
  for (int64_t i = 0; i < whole; i += lanes) store(keys + i, key_of(load(x + i)));
  if (whole < n) {
    store(keys + whole, splat(excluded));
    for (int64_t i = whole; i < n; i++) keys[i] = key_of(x[i]);
  }
  for (int64_t i = 0; i < k; i++) best[i] = static_cast<int32_t>(take_largest(keys, padded));
}

float without_nan(float x) { return x != x ? lowest : x; }

// Keeps the largest elements so far sorted; elements that are not larger are skipped a vector at a time.
void by_insertion(int32_t* best, const float* x, int64_t n, int64_t k) {
  float keys[most_inserted];
  int64_t filled = 0;
  const auto offer = [&](int64_t i) {
    const float key = without_nan(x[i]);
    if (filled == k && !(key > keys[k - 1])) return;
    int64_t at = filled < k ? filled++ : k - 1;
    for (; at > 0 && key > keys[at - 1]; at--) {
      keys[at] = keys[at - 1];
      best[at] = best[at - 1];
    }
    keys[at] = key;
    best[at] = static_cast<int32_t>(i);
  };
  int64_t i = 0;
  for (; i < k; i++) offer(i);
  for (; i + lanes <= n; i += lanes) {
    for (uint32_t better = set_lanes(load(x + i) > splat(keys[k - 1])); better != 0; better &= better - 1) offer(i + __builtin_ctz(better));
  }
  for (; i < n; i++) offer(i);
}

void by_sorting(int32_t* best, const float* x, int64_t n, int64_t k) {
  Scratch memory(static_cast<size_t>(n) * sizeof(int32_t));
  int32_t* order = memory.as<int32_t>();
  for (int64_t i = 0; i < n; i++) order[i] = static_cast<int32_t>(i);
  const auto before = [&](int32_t a, int32_t b) {
    const float p = without_nan(x[a]), q = without_nan(x[b]);
    return p != q ? p > q : a < b;
  };
  if (k < n) std::nth_element(order, order + k, order + n, before);
  std::sort(order, order + k, before);
  std::copy(order, order + k, best);
}

}  // namespace

MOE_KERNEL(moe_topk_f32) {
  float* values = args.ptr<float>();
  int32_t* indices = args.ptr<int32_t>();
  const float* x = args.ptr<const float>();
  const int64_t rows = args.size(), n = args.size(), k = args.size();
  parallel_for(rows, std::max<int64_t>(1, 4096 / n), [&](int64_t begin, int64_t end, int) {
    for (int64_t row = begin; row < end; row++) {
      const float* from = x + row * n;
      int32_t* best = indices + row * k;
      const auto choose = k > most_inserted ? by_sorting : n <= most_selected ? by_selection : by_insertion;
      choose(best, from, n, k);
      for (int64_t i = 0; i < k; i++) values[row * k + i] = from[best[i]];
    }
  });
}
