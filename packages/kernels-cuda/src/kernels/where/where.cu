// Elementwise selection with broadcasting: (y, condition, a, b, n, rank, nest of condition, a and b).
#include "broadcast.cuh"

MOE_KERNEL((256), moe_where_b32,
           (uint32_t* y, const uint8_t* condition, const uint32_t* a, const uint32_t* b, int64_t n, int rank,
            Args<int64_t, 32> nest)) {
  auto choose = [](uint8_t c, uint32_t p, uint32_t q) -> uint32_t { return c != 0 ? p : q; };
  broadcast(y, n, rank, nest, choose, Operand<uint8_t, 0>{condition}, Operand<uint32_t, 1>{a}, Operand<uint32_t, 2>{b});
}
