// Loop nests over broadcast operands. The launcher has merged axes (@moe/core/strides), so the nest is short: usually one or two axes.
#pragma once

#include <algorithm>
#include <cstdint>

#include "abi.h"
#include "parallel.h"

namespace moe {

constexpr int most_axes = 8;

// Sizes of a row-major result and the strides of K operands in it. Read as: rank, sizes, then the strides of each operand.
template <int K>
struct Nest {
  int rank;
  int64_t total = 1;
  int64_t sizes[most_axes];
  int64_t strides[K][most_axes];

  explicit Nest(Args& args) : rank(args.i32()) {
    if (rank < 1 || rank > most_axes) throw Error("%d axes are left after merging, at most %d can be handled", rank, most_axes);
    for (int i = 0; i < rank; i++) total *= sizes[i] = args.size();
    for (auto& stride : strides) {
      for (int i = 0; i < rank; i++) stride[i] = args.size();
    }
  }
  int64_t inner() const { return sizes[rank - 1]; }
  int64_t inner_stride(int operand) const { return strides[operand][rank - 1]; }
};

// Calls body(flat, offsets, count) for `count` results from position `flat` on, within one innermost row; operand k starts at
// offsets[k]. Only for bodies whose elements do not depend on how rows are split.
template <int K, class F>
static void each_row(const Nest<K>& nest, int64_t grain, F&& body) {
  parallel_for(
      nest.total, grain,
      [&](int64_t begin, int64_t end, int) {
        const int last = nest.rank - 1;
        int64_t index[most_axes], offsets[K] = {};
        int64_t rest = begin;
        for (int axis = last; axis >= 0; axis--) {
          index[axis] = rest % nest.sizes[axis];
          rest /= nest.sizes[axis];
          for (int k = 0; k < K; k++) offsets[k] += index[axis] * nest.strides[k][axis];
        }
        for (int64_t flat = begin; flat < end;) {
          const int64_t count = std::min(end - flat, nest.sizes[last] - index[last]);
          body(flat, static_cast<const int64_t*>(offsets), count);
          flat += count;
          if (flat >= end) break;
          // Move to the start of the next row.
          for (int k = 0; k < K; k++) offsets[k] -= index[last] * nest.strides[k][last];
          index[last] = 0;
          for (int axis = last - 1; axis >= 0; axis--) {
            for (int k = 0; k < K; k++) offsets[k] += nest.strides[k][axis];
            if (++index[axis] < nest.sizes[axis]) break;
            for (int k = 0; k < K; k++) offsets[k] -= nest.sizes[axis] * nest.strides[k][axis];
            index[axis] = 0;
          }
        }
      },
      64);
}

}  // namespace moe
