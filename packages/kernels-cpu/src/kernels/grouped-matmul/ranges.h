// The row range of each expert. Invalid offsets are clamped: ranges are always in order and within 0 .. rows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace moe {
namespace {

struct Ranges {
  std::vector<int64_t> ends;
  Ranges(const int32_t* offsets, int64_t experts, int64_t rows) : ends(static_cast<size_t>(experts + 1)) {
    int64_t last = 0;
    for (int64_t e = 0; e <= experts; ++e)
      last = ends[static_cast<size_t>(e)] = std::max(last, std::min<int64_t>(offsets[e], rows));
  }
  int64_t begin(int64_t e) const { return ends[static_cast<size_t>(e)]; }
  int64_t size(int64_t e) const { return ends[static_cast<size_t>(e) + 1] - ends[static_cast<size_t>(e)]; }
};

inline void clear_rows(float* y, int64_t from, int64_t to, int64_t width) {
  if (to > from) std::fill(y + from * width, y + to * width, 0.0f);
}

}  // namespace
}  // namespace moe
