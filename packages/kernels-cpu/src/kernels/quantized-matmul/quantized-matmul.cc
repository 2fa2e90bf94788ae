// Products with weights stored in bf16, fp8, int8 or int4, one weight or one per expert. Few rows: see dots.h. More: a tile of the
// weight is decoded to f32 and multiplied like any other.
#include <vector>

#include "../grouped-matmul/ranges.h"
#include "dots.h"
#include "gemm.h"

using namespace moe;

namespace {

// Up to here weights are read for the dot products of all rows; beyond, decoding them once and blocking pays.
constexpr int64_t few_rows = 8;
// Bytes of stored weights in a task, about 2 us of reading; and elements of a decoded tile, which stays in L2.
constexpr int64_t task_bytes = 32 << 10;
constexpr int64_t tile_elements = 96 << 10;

struct Product {
  float* y;
  const float* x;
  const uint8_t* q;
  const float* scale;
  int64_t rows, experts, k, n;
  Format format;
  int64_t block_rows, block_columns;
  bool bf16;

  int64_t row_bytes() const { return format == Format::bf16 ? 2 * k : format == Format::int4 ? (k + 1) / 2 : k; }
  int64_t scale_columns() const { return block_columns ? (k + block_columns - 1) / block_columns : 0; }
  int64_t scale_rows() const { return (n + block_rows - 1) / block_rows; }
};

// x of all rows as the dot products want it.
struct Packed {
  const float* x;
  const float* starts;
  int64_t x_stride, starts_stride;
};

// A piece of the weight's rows and all that is multiplied with it.
struct Piece {
  int64_t expert, begin, end;
};

template <class W>
int64_t run_of(const Product& p) {
  if (!W::scaled) return 1;
  return std::max<int64_t>(1, p.block_columns / group_size<W>);
}

// Whether scales and vectors of the dot products fit each other.
template <class W>
bool fits(const Product& p) {
  if (!W::scaled || p.block_columns % group_size<W> == 0) return true;
  return std::is_same_v<W, Int4Weights> && p.block_columns == 32;
}

template <class W>
void dot_piece(const Product& p, const Packed& packed, const Ranges& ranges, const Piece& piece) {
  Dots d{};
  d.k = p.k;
  d.row_bytes = p.row_bytes();
  d.q = p.q + piece.expert * p.n * d.row_bytes;
  d.block_rows = p.block_rows;
  d.scale_columns = p.scale_columns();
  if (W::scaled) d.scale = p.scale + piece.expert * p.scale_rows() * d.scale_columns;
  d.run = run_of<W>(p);
  const int64_t last = ranges.begin(piece.expert) + ranges.size(piece.expert);
  for (int64_t row = ranges.begin(piece.expert); row < last; row += most_rows) {
    const int64_t rows = std::min(most_rows, last - row);
    for (int64_t m = 0; m < rows; ++m) {
      d.x[m] = packed.x + (row + m) * packed.x_stride;
      d.starts[m] = packed.starts + (row + m) * packed.starts_stride;
      d.y[m] = p.y + (row + m) * p.n;
    }
    if constexpr (!W::scaled) {
      dots<W, Scales::none>(d, rows, piece.begin, piece.end);
    } else if constexpr (std::is_same_v<W, Int4Weights>) {
      if (p.block_columns % group_size<W> != 0)
        dots<W, Scales::runs>(d, rows, piece.begin, piece.end);
      else
        dots<W, Scales::groups>(d, rows, piece.begin, piece.end);
    } else {
      dots<W, Scales::groups>(d, rows, piece.begin, piece.end);
    }
  }
}

void multiply_piece(const Product& p, const Ranges& ranges, const Piece& piece, float* tile) {
  const int64_t bytes = p.row_bytes();
  for (int64_t j = piece.begin; j < piece.end; ++j) {
    const float* scales =
        p.scale ? p.scale + (piece.expert * p.scale_rows() + j / p.block_rows) * p.scale_columns() : nullptr;
    decode_row(p.format, p.q + (piece.expert * p.n + j) * bytes, scales, p.k, p.block_columns, tile + (j - piece.begin) * p.k);
  }
  Gemm job{};
  job.m = ranges.size(piece.expert), job.n = piece.end - piece.begin, job.k = p.k;
  job.a = gemm_operand(p.x + ranges.begin(piece.expert) * p.k, job.m, p.k, false);
  job.b = gemm_operand(tile, job.n, p.k, false);
  job.c = p.y + ranges.begin(piece.expert) * p.n + piece.begin;
  job.ldc = p.n;
  gemm_here(job, p.bf16);
}

template <class W>
void run(const Product& p, const Ranges& ranges) {
  const bool dots_fit = fits<W>(p);
  const auto by_dots = [&](int64_t e) { return dots_fit && ranges.size(e) <= few_rows; };
  const int64_t dot_rows = std::max<int64_t>(8, task_bytes / std::max<int64_t>(1, p.row_bytes()) / 8 * 8);
  const int64_t tile_rows = std::max<int64_t>(16, std::min<int64_t>(512, tile_elements / std::max<int64_t>(1, p.k) / 16 * 16));
  std::vector<Piece> pieces;
  bool any_dots = false, any_tiles = false;
  for (int64_t e = 0; e < p.experts; ++e) {
    if (ranges.size(e) == 0) continue;
    const int64_t most = by_dots(e) ? dot_rows : tile_rows;
    (by_dots(e) ? any_dots : any_tiles) = true;
    const int64_t count = (p.n + most - 1) / most, blocks = (p.n + 7) / 8;
    for (int64_t i = 0; i < count; ++i)
      pieces.push_back({e, blocks * i / count * 8, std::min(p.n, blocks * (i + 1) / count * 8)});
  }
  const int64_t groups = any_dots ? (p.k + group_size<W> - 1) / group_size<W> : 0;
  const int64_t run = run_of<W>(p);
  Packed packed{};
  packed.x_stride = groups * group_size<W>;
  packed.starts_stride = W::zero == 0 ? 0 : (groups + run - 1) / run * lanes;
  const Scratch x_memory(static_cast<size_t>(p.rows * (packed.x_stride + packed.starts_stride)) * 4);
  float* const packed_x = x_memory.as<float>();
  float* const starts = packed_x + p.rows * packed.x_stride;
  packed.x = packed_x, packed.starts = starts;
  if (any_dots) {
    parallel_for(p.rows, std::max<int64_t>(1, 16384 / std::max<int64_t>(1, p.k)), [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i)
        pack_x<W>(p.x + i * p.k, p.k, run, packed_x + i * packed.x_stride, starts + i * packed.starts_stride);
    });
  }
  const int64_t tile_size = any_tiles ? (tile_rows + 8) * p.k : 0;
  const Scratch tiles(static_cast<size_t>(tile_size * max_threads()) * 4);
  parallel_tasks(static_cast<int64_t>(pieces.size()), [&](int64_t task, int worker) {
    const Piece& piece = pieces[static_cast<size_t>(task)];
    if (by_dots(piece.expert))
      dot_piece<W>(p, packed, ranges, piece);
    else
      multiply_piece(p, ranges, piece, tiles.as<float>() + worker * tile_size);
  });
}

}  // namespace

// (y [rows, n], x [rows, k], q, scale or 0, offsets or 0, rows, experts, k, n, format, block rows, block columns, bf16)
MOE_KERNEL(moe_quantized_matmul_f32) {
  Product p{};
  p.y = args.ptr<float>();
  p.x = args.ptr<const float>();
  p.q = args.ptr<const uint8_t>();
  p.scale = args.ptr<const float>();
  const int32_t* offsets = args.ptr<const int32_t>();
  p.rows = args.size(), p.experts = args.size(), p.k = args.size(), p.n = args.size();
  p.format = static_cast<Format>(args.i32());
  p.block_rows = args.size(), p.block_columns = args.size();
  p.bf16 = args.flag();
  const int32_t all[2] = {0, static_cast<int32_t>(p.rows)};
  const Ranges ranges(offsets ? offsets : all, p.experts, p.rows);
  clear_rows(p.y, 0, ranges.begin(0), p.n);
  clear_rows(p.y, ranges.begin(p.experts), p.rows, p.n);
  if (p.k == 0) return clear_rows(p.y, 0, p.rows, p.n);
  switch (p.format) {
    case Format::bf16: return run<Bf16Weights>(p, ranges);
    case Format::fp8: return run<Fp8Weights>(p, ranges);
    case Format::int8: return run<Int8Weights>(p, ranges);
    case Format::int4: return run<Int4Weights>(p, ranges);
  }
}
