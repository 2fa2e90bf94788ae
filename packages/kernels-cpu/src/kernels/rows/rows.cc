// Gather, scatter-add and replace rows by index. An index that is out of range reads zeros or writes nothing.
#include "moe.h"

using namespace moe;

namespace {

// Divides the work on a [rows, width] result by columns if rows are wide, otherwise by rows. Calls body(first_row, end_row, first_column, end_column).
// The body alone determines the order in which a row is written, so the result does not depend on the division.
template <class F>
void by_destination(int64_t rows, int64_t width, int64_t work, F&& body) {
  constexpr int64_t least_work = 32768;
  constexpr int64_t least_columns = 64;
  if (work < least_work || max_threads() == 1) return body(int64_t{0}, rows, int64_t{0}, width);
  if (width >= 2 * least_columns) {
    parallel_for(width, least_columns, [&](int64_t begin, int64_t end, int) { body(int64_t{0}, rows, begin, end); }, 16);
  } else {
    parallel_for(rows, 64, [&](int64_t begin, int64_t end, int) { body(begin, end, int64_t{0}, width); });
  }
}

template <class T>
T plus(T a, T b) {
  if constexpr (sizeof(T) == 4 && !std::is_floating_point_v<T>) {
    return static_cast<T>(static_cast<uint32_t>(a) + static_cast<uint32_t>(b));
  } else {
    return a + b;
  }
}

// (y [rows, width], index [n], source [n, width], n, rows, width)
template <class T>
void scatter_add(Args& args) {
  T* y = args.ptr<T>();
  const int32_t* index = args.ptr<const int32_t>();
  const T* source = args.ptr<const T>();
  const int64_t n = args.size(), rows = args.size(), width = args.size();
  by_destination(rows, width, (n + rows) * width, [&](int64_t row, int64_t end_row, int64_t column, int64_t end_column) {
    const int64_t count = end_column - column;
    for (int64_t r = row; r < end_row; r++) std::fill_n(y + r * width + column, count, T{});
    for (int64_t i = 0; i < n; i++) {
      if (index[i] < row || index[i] >= end_row) continue;
      T* to = y + index[i] * width + column;
      const T* from = source + i * width + column;
      for (int64_t j = 0; j < count; j++) to[j] = plus(to[j], from[j]);
    }
  });
}

// (y [n, width], x [rows, width], index [n], n, rows, width)
template <class T>
void take(Args& args) {
  T* y = args.ptr<T>();
  const T* x = args.ptr<const T>();
  const int32_t* index = args.ptr<const int32_t>();
  const int64_t n = args.size(), rows = args.size(), width = args.size();
  parallel_for(n, std::max<int64_t>(1, 32768 / std::max<int64_t>(1, width)), [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; i++) {
      const bool inside = index[i] >= 0 && index[i] < rows;
      if (width == 1) {
        y[i] = inside ? x[index[i]] : T{};
      } else if (inside) {
        std::memcpy(y + i * width, x + index[i] * width, static_cast<size_t>(width) * sizeof(T));
      } else {
        std::memset(y + i * width, 0, static_cast<size_t>(width) * sizeof(T));
      }
    }
  });
}

// In place: (x [rows, width], index [n], source [n, width], n, rows, width). The last of equal indices wins.
template <class T>
void set(Args& args) {
  T* x = args.ptr<T>();
  const int32_t* index = args.ptr<const int32_t>();
  const T* source = args.ptr<const T>();
  const int64_t n = args.size(), rows = args.size(), width = args.size();
  by_destination(rows, width, n * width, [&](int64_t row, int64_t end_row, int64_t column, int64_t end_column) {
    for (int64_t i = 0; i < n; i++) {
      if (index[i] < row || index[i] >= end_row) continue;
      std::copy_n(source + i * width + column, end_column - column, x + index[i] * width + column);
    }
  });
}

}  // namespace

MOE_KERNEL(moe_take_rows_b32) { take<uint32_t>(args); }
MOE_KERNEL(moe_take_rows_b16) { take<uint16_t>(args); }
MOE_KERNEL(moe_take_rows_b8) { take<uint8_t>(args); }
MOE_KERNEL(moe_scatter_add_rows_f32) { scatter_add<float>(args); }
MOE_KERNEL(moe_scatter_add_rows_i32) { scatter_add<int32_t>(args); }
MOE_KERNEL(moe_set_rows_b32) { set<uint32_t>(args); }
MOE_KERNEL(moe_set_rows_b16) { set<uint16_t>(args); }
MOE_KERNEL(moe_set_rows_b8) { set<uint8_t>(args); }
