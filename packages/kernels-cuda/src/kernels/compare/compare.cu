// Comparisons with broadcasting, whose results are 0 or 1. Parameters: (y, a, b, n, rank, nest of a and b).
#include "broadcast.cuh"

#define COMPARE(name, T, relation)                                                                            \
  MOE_KERNEL((256), name, (uint8_t* y, const T* a, const T* b, int64_t n, int rank, Args<int64_t, 24> nest)) { \
    auto fn = [](T p, T q) -> uint8_t { return p relation q; };                                                \
    broadcast(y, n, rank, nest, fn, Operand<T, 0>{a}, Operand<T, 1>{b});                                       \
  }

COMPARE(moe_eq_f32, float, ==)
COMPARE(moe_lt_f32, float, <)
COMPARE(moe_le_f32, float, <=)
COMPARE(moe_eq_i32, int, ==)
COMPARE(moe_lt_i32, int, <)
COMPARE(moe_le_i32, int, <=)
