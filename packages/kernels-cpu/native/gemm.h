// Matrix products with any transposition, one or many at a time: C = A * B or C += A * B, with f32 in memory, multiplied in f32 or bf16.
//
// Every element of C is one chain of multiply-adds along k, split into passes whose length depends on k only, not on the tiling or the
// number of threads. So the bits only depend on shapes.
#pragma once

#include <cstddef>
#include <cstdint>

namespace moe {

// Bits of a bf16.
using Bf16 = std::uint16_t;

// Element (lane, k) is at data[lane * lane_stride + k * k_stride]; at least one of the strides is 1. The lanes of A are the rows of C, those
// of B its columns.
template <class T>
struct Operand {
  const T* data;
  std::ptrdiff_t lane_stride;
  std::ptrdiff_t k_stride;
};
using GemmOperand = Operand<float>;

struct Gemm {
  GemmOperand a;
  GemmOperand b;
  float* c;
  std::ptrdiff_t ldc;
  int64_t m, n, k;
  bool accumulate = false;
  // C will not be read soon: bypass the caches when writing it, if possible.
  bool stream = false;
  // B in bf16, in the same layout as `b`, or nullptr. Products in bf16 read this copy, and use `b` only for its strides.
  const Bf16* rounded_b = nullptr;
  // All columns of a larger B, packed by gemm_pack_b, or nullptr. Then `b` is not read; this product uses n columns from
  // `packed_from` (a multiple of gemm_column_block()) of the `packed_n` packed ones.
  const float* packed_b = nullptr;
  int64_t packed_from = 0;
  int64_t packed_n = 0;
};

// a [m, k] row-major, or its transpose [k, m].
template <class T>
static inline Operand<T> gemm_operand(const T* data, int64_t lanes, int64_t k, bool k_major) {
  if (k_major) return {data, 1, static_cast<std::ptrdiff_t>(lanes)};
  return {data, static_cast<std::ptrdiff_t>(k), 1};
}

// Runs all products on all threads. Their outputs may not overlap.
void gemm(const Gemm* jobs, int64_t count, bool bf16);

// Runs one product on this thread, for use inside a task.
void gemm_here(const Gemm& job, bool bf16);

// Whether `bf16` makes a difference in this variant.
bool gemm_has_bf16();

// Number of floats of a packed B, and the packing; `rounded` as in Gemm.
int64_t gemm_column_block();
size_t gemm_packed_b_size(int64_t n, int64_t k, bool bf16);
void gemm_pack_b(const GemmOperand& b, const Bf16* rounded, int64_t n, int64_t k, bool bf16, float* to);

}  // namespace moe
