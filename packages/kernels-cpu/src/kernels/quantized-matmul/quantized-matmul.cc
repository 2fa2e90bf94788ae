// moe-isa: baseline avx2 avx512 avx512vnni avx512bf16 dotprod bf16
// Matrix products y = x W^T with weights stored in bf16, fp8, int8 or int4; one weight, or one per expert. A few rows of x use dot products: see dots.h. With
// more rows, tiles of the weight are decoded to f32 and multiplied by the ordinary matrix product, which can also read bf16 weights as they are stored.
#include <vector>

#include "../grouped-matmul/ranges.h"
#include "gemm.h"
#include "nibble-dots.h"
#if defined(__ARM_FEATURE_MATMUL_INT8)
#include "nibble-matrices.h"
#endif

using namespace moe;

namespace {

// Up to this many rows, dot products are used. With more, it is faster to decode the weights once and use the blocked matrix product.
constexpr int64_t few_rows = 8;
// Bytes of stored weights per task, about 2 us of reading (for int4: of computation); and elements of a decoded tile, which fits into L2.
constexpr int64_t task_bytes = 32 << 10, int4_task_bytes = 16 << 10;
constexpr int64_t tile_elements = 96 << 10;

struct Product : Stored {
  float* y;
  const float* x;
  int64_t rows, experts;
  bool bf16;
};

// Rows begin .. end - 1 of an expert's weight. A task multiplies them with all rows of x of that expert.
struct Piece {
  const Product* product;
  int64_t expert, begin, end;
};

// Fills in the fields that all kinds of dot products have in common.
template <class D>
D dots_of(const Product& p, int64_t expert, int64_t run) {
  D d{};
  d.row_bytes = p.row_bytes();
  d.q = p.q + expert * p.n * d.row_bytes;
  d.block_rows = p.block_rows;
  d.scale_columns = p.scale_columns();
  d.scale = p.scale ? p.scale + expert * p.scale_rows() * d.scale_columns : nullptr;
  d.run = run;
  return d;
}

// The dot products of a kind of format. `fit`: whether they support these block sizes. `pack`: packs a row of x into `words` 32-bit words. `multiply`:
// multiplies a piece with up to most_rows packed rows of x.
template <class W>
class Floats {
 public:
  explicit Floats(const Product& p) : p_(p), run_(W::scaled ? std::max<int64_t>(1, p.block_columns / group_size<W>) : 1) {}
  bool fit() const { return !W::scaled || p_.block_columns % group_size<W> == 0; }
  int64_t words() const { return (p_.k + group_size<W> - 1) / group_size<W> * group_size<W>; }
  void pack(const float* x, int32_t* to) const { pack_x<W>(x, p_.k, reinterpret_cast<float*>(to)); }
  void multiply(const int32_t* packed, int64_t row, int64_t rows, const Piece& piece) const {
    Dots d = dots_of<Dots>(p_, piece.expert, run_);
    for (int64_t m = 0; m < rows; ++m) {
      d.x[m] = reinterpret_cast<const float*>(packed + (row + m) * words());
      d.y[m] = p_.y + (row + m) * p_.n;
    }
    dots<W>(d, rows, piece.begin, piece.end);
  }

 private:
  const Product& p_;
  int64_t run_;
};

template <int halves>
class Integers {
 public:
  explicit Integers(const Product& p)
      : p_(p), run_(std::max<int64_t>(1, p.block_columns / byte_group)), blocks_((p.k + run_ * byte_group - 1) / (run_ * byte_group)) {}
  bool fit() const { return p_.block_columns % byte_group == 0 && run_ <= most_run; }
  // The packed integers, then the starts and the scale of each block.
  int64_t words() const { return numbers() + blocks_ * (halves * lanes + 1); }
  void pack(const float* x, int32_t* to) const {
    int32_t* const starts = to + numbers();
    pack_integer_x<halves>(x, p_.k, run_, to, reinterpret_cast<float*>(starts + blocks_ * halves * lanes), starts);
  }
  void multiply(const int32_t* packed, int64_t row, int64_t rows, const Piece& piece) const {
    IntegerDots d = dots_of<IntegerDots>(p_, piece.expert, run_);
    for (int64_t m = 0; m < rows; ++m) {
      d.x[m] = packed + (row + m) * words();
      d.starts[m] = d.x[m] + numbers();
      d.x_scales[m] = reinterpret_cast<const float*>(d.starts[m] + blocks_ * halves * lanes);
      d.y[m] = p_.y + (row + m) * p_.n;
    }
    integer_dots<halves>(d, rows, piece.begin, piece.end);
  }

 private:
  int64_t numbers() const { return blocks_ * run_ * parts * vectors<halves> * lanes; }

  const Product& p_;
  int64_t run_, blocks_;
};

template <int digits>
class Nibbles {
 public:
  explicit Nibbles(const Product& p) : p_(p) {}
  bool fit() const { return in_runs() || p_.block_columns % nibble_group == 0; }
  int64_t words() const { return (p_.k + nibble_group - 1) / nibble_group * static_cast<int64_t>(sizeof(X) / 4); }
  void pack(const float* x, int32_t* to) const { pack_nibble_x<digits>(x, p_.k, reinterpret_cast<X*>(to)); }
  void multiply(const int32_t* packed, int64_t row, int64_t rows, const Piece& piece) const {
    auto d = dots_of<NibbleDots<X>>(p_, piece.expert, std::max<int64_t>(1, p_.block_columns / nibble_group));
    for (int64_t m = 0; m < rows; ++m) {
      d.x[m] = reinterpret_cast<const X*>(packed + (row + m) * words());
      d.y[m] = p_.y + (row + m) * p_.n;
    }
    if (in_runs())
      nibble_dots<digits, Scales::runs>(d, rows, piece.begin, piece.end);
    else
      nibble_dots<digits, Scales::blocks>(d, rows, piece.begin, piece.end);
  }

 private:
#if defined(__ARM_FEATURE_MATMUL_INT8)
  using X = NibbleMatrixX<digits>;
#else
  using X = NibbleX<digits>;
#endif
  bool in_runs() const { return p_.block_columns == 32; }

  const Product& p_;
};

// The product of an expert's rows of x with a piece of its weight, decoded to f32 in `tile`.
Gemm product_of(const Ranges& ranges, const Piece& piece, const float* tile) {
  const Product& p = *piece.product;
  Gemm job{};
  job.m = ranges.size(piece.expert), job.n = piece.end - piece.begin, job.k = p.k;
  job.a = gemm_operand(p.x + ranges.begin(piece.expert) * p.k, job.m, p.k, false);
  job.b = gemm_operand(tile, job.n, p.k, false);
  job.c = p.y + ranges.begin(piece.expert) * p.n + piece.begin;
  job.ldc = p.n;
  return job;
}

void multiply_piece(const Ranges& ranges, const Piece& piece, float* tile) {
  const Product& p = *piece.product;
  for (int64_t j = piece.begin; j < piece.end; ++j) p.decode(piece.expert, j, 0, p.k, tile + (j - piece.begin) * p.k);
  gemm_here(product_of(ranges, piece, tile), p.bf16);
}

// Multiplies the same x with several weights, which may differ in their number of rows but not in their columns or format.
template <class Engine>
void run(const std::vector<Product>& products, const Ranges& ranges) {
  const Product& p = products[0];
  const Engine engine(p);
  const bool fit = engine.fit();
  const auto by_dots = [&](int64_t e) { return fit && ranges.size(e) <= few_rows; };
  const int64_t most_bytes = p.format == Format::int4 ? int4_task_bytes : task_bytes;
  const int64_t dot_rows = std::max<int64_t>(8, most_bytes / std::max<int64_t>(1, p.row_bytes()) / 8 * 8);
  const int64_t tile_rows = std::max<int64_t>(16, std::min<int64_t>(512, tile_elements / std::max<int64_t>(1, p.k) / 16 * 16));
  // The matrix product reads bf16 weights without decoding if the CPU has bf16 instructions.
  const bool as_stored = p.format == Format::bf16 && p.bf16 && gemm_has_bf16();
  std::vector<Gemm> whole;
  std::vector<Piece> pieces;
  bool any_dots = false, any_tiles = false;
  for (const Product& product : products) {
    for (int64_t e = 0; e < p.experts; ++e) {
      if (ranges.size(e) == 0) continue;
      if (as_stored && !by_dots(e)) {
        whole.push_back(product_of(ranges, {&product, e, 0, product.n}, nullptr));
        whole.back().rounded_b = reinterpret_cast<const Bf16*>(product.q) + e * product.n * p.k;
        continue;
      }
      const int64_t most = by_dots(e) ? dot_rows : tile_rows;
      (by_dots(e) ? any_dots : any_tiles) = true;
      const int64_t count = (product.n + most - 1) / most, blocks = (product.n + 7) / 8;
      for (int64_t i = 0; i < count; ++i)
        pieces.push_back({&product, e, blocks * i / count * 8, std::min(product.n, blocks * (i + 1) / count * 8)});
    }
  }
  const int64_t words = any_dots ? engine.words() : 0;
  const Scratch x_memory(static_cast<size_t>(p.rows * words) * 4);
  int32_t* const packed = x_memory.as<int32_t>();
  if (any_dots) {
    parallel_for(p.rows, std::max<int64_t>(1, 2048 / std::max<int64_t>(1, p.k)), [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) engine.pack(p.x + i * p.k, packed + i * words);
    });
  }
  const int64_t tile_size = any_tiles ? (tile_rows + 8) * p.k : 0;
  const Scratch tiles(static_cast<size_t>(tile_size * max_threads()) * 4);
  parallel_tasks(static_cast<int64_t>(pieces.size()), [&](int64_t task, int worker) {
    const Piece& piece = pieces[static_cast<size_t>(task)];
    if (!by_dots(piece.expert)) return multiply_piece(ranges, piece, tiles.as<float>() + worker * tile_size);
    const Engine own(*piece.product);
    const int64_t last = ranges.begin(piece.expert) + ranges.size(piece.expert);
    for (int64_t row = ranges.begin(piece.expert); row < last; row += most_rows)
      own.multiply(packed, row, std::min(most_rows, last - row), piece);
  });
  gemm(whole.data(), static_cast<int64_t>(whole.size()), p.bf16);
}

}  // namespace

// (x [rows, k], offsets or 0, rows, experts, k, format, block rows, block columns, bf16, products, then of each: y [rows, n], q, scale or 0, n)
MOE_KERNEL(moe_quantized_matmul_f32) {
  Product p{};
  p.x = args.ptr<const float>();
  const int32_t* offsets = args.ptr<const int32_t>();
  p.rows = args.size(), p.experts = args.size(), p.k = args.size();
  p.format = static_cast<Format>(args.i32());
  p.block_rows = args.size(), p.block_columns = args.size();
  p.bf16 = args.flag();
  const int32_t all[2] = {0, static_cast<int32_t>(p.rows)};
  const Ranges ranges(offsets ? offsets : all, p.experts, p.rows);
  std::vector<Product> products(static_cast<size_t>(args.size()), p);
  for (Product& product : products) {
    product.y = args.ptr<float>();
    product.q = args.ptr<const uint8_t>();
    product.scale = args.ptr<const float>();
    product.n = args.size();
    clear_rows(product.y, 0, p.k == 0 ? p.rows : ranges.begin(0), product.n);
    clear_rows(product.y, ranges.begin(p.experts), p.rows, product.n);
  }
  if (p.k == 0) return;
  switch (p.format) {
    case Format::bf16: return run<Floats<Bf16Weights>>(products, ranges);
    case Format::fp8: return run<Floats<Fp8Weights>>(products, ranges);
    case Format::int8: return p.bf16 ? run<Integers<1>>(products, ranges) : run<Integers<2>>(products, ranges);
    case Format::int4: return p.bf16 ? run<Nibbles<2>>(products, ranges) : run<Nibbles<3>>(products, ranges);
  }
}
