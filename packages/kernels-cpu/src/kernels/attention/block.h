// Blocks of query rows, and the rows of keys and values: their addresses, their masks, and how they are packed for the products.
// Row r of key head g is query r / (H / G) of head g * (H / G) + r % (H / G).
#pragma once

#include "tile.h"

namespace moe {

constexpr int block_vectors = lanes < 8 ? 4 : 2;
constexpr int block_rows = block_vectors * lanes;

struct Attention {
  const float *q, *k, *v;
  const uint16_t* rows16;  // instead of k and v: the keys of one head as bf16 rows of Dk, whose first Dv features are the values; or nullptr
  const int32_t* lengths;  // nullptr: all keys
  const int32_t* starts;   // [B][T]: first key that a query sees; nullptr: 0
  const int32_t* pages;    // [B][S / page_keys], page numbers: key s of batch b is key s % page_keys of page pages[b][s / page_keys]; nullptr: not paged
  int64_t page_keys;
  float *out, *lse;        // lse: nullptr if not wanted
  int64_t B, T, S, H, G, Dk, Dv;
  int64_t k_stride, v_stride;  // floats from key to key of one head
  int64_t k_batch, v_batch;    // floats from batch to batch, 0 if paged
  int64_t k_head, v_head;      // floats from head to head
  bool causal;
  bool each_tile;  // blocks make (convert, pack) each tile of keys when they need it; otherwise tiles are made in advance, for all blocks of a head
  float scale;

  int64_t rows() const { return T * (H / G); }
  int64_t blocks() const { return (rows() + block_rows - 1) / block_rows; }
  int64_t limit(int64_t b) const { return lengths ? std::min<int64_t>(S, std::max(0, lengths[b])) : S; }
  int64_t longest() const {
    int64_t most = 0;
    for (int64_t b = 0; b < B; b++) most = std::max(most, limit(b));
    return most;
  }
  // Query t sees keys up to this one (exclusive).
  int64_t visible(int64_t limit, int64_t t) const {
    return causal ? std::min(limit, std::max<int64_t>(0, limit - T + t + 1)) : limit;
  }
  // Whether f32 keys are read where they are. Those of small pages are copied to a tile, because products with few keys are slow.
  template <class Op>
  bool in_place() const {
    return Op::pack == 1 && !rows16 && !(pages && page_keys < 8);
  }
  // Whether features fill whole vectors, so that they can run along the lanes.
  template <class Op>
  bool fills_lanes() const {
    return Dk % (lanes * Op::pack) == 0 && Dv % lanes == 0;
  }
  // A tile of keys, with its values and scores, must fit into L1 and L2.
  int64_t tile_keys() const { return Dk > 128 ? 48 : 96; }
};

// The rows of one block: their addresses and the keys that they see.
struct Block {
  alignas(64) int32_t first[block_rows], visible[block_rows];  // keys that a row sees: first .. visible - 1; both 0 if it sees none
  alignas(64) float max[block_rows], sum[block_rows], factor[block_rows];
  int64_t row[block_rows];       // offset in units of heads in [B, T, H, ...]
  int64_t lse_index[block_rows];  // in [B, H, T]
  int64_t b, g;                  // batch, key head
  int rows;                      // in use; the others repeat the last one
  int vectors() const { return rows <= lanes ? 1 : block_vectors; }
  // Rows before those of the last vector.
  int before() const { return (vectors() - 1) * lanes; }
  int64_t begin, keys;           // every key that any row sees is in begin .. keys - 1
  int64_t all_from, all_to;      // all rows see keys all_from .. all_to - 1

  void place(const Attention& a, int64_t b, int64_t g, int64_t block, int64_t limit) {
    const int64_t group = a.H / a.G, first = block * block_rows;
    this->b = b;
    this->g = g;
    rows = static_cast<int>(std::min<int64_t>(block_rows, a.rows() - first));
    int64_t t = first / group, h = g * group + first % group;
    begin = all_to = std::numeric_limits<int64_t>::max();
    keys = all_from = 0;
    for (int i = 0; i < block_rows; i++) {
      row[i] = (b * a.T + t) * a.H + h;
      lse_index[i] = (b * a.H + h) * a.T + t;
      const int64_t from = a.starts ? std::max(0, a.starts[b * a.T + t]) : 0, to = a.visible(limit, t), sees = from < to;
      this->first[i] = static_cast<int32_t>(sees * from);
      visible[i] = static_cast<int32_t>(sees * to);
      begin = std::min(begin, sees * from);
      keys = std::max(keys, sees * to);
      all_from = std::max(all_from, sees * from);
      all_to = std::min(all_to, sees * to);
      if (i + 1 < rows && ++h == (g + 1) * group) {
        h = g * group;
        t++;
      }
    }
  }
};

// Divides scratch memory into aligned buffers. To find the size, carve once without memory (`Carver(nullptr)`).
class Carver {
 public:
  explicit Carver(char* memory) : memory_(memory) {}
  float* floats(int64_t count) {
    char* piece = memory_ + used_;
    used_ += round_up(static_cast<size_t>(count) * 4, 64);
    // Buffers at the same offset in a page would compete for the same cache sets.
    if (used_ % 4096 == 0) used_ += 128;
    return reinterpret_cast<float*>(piece);
  }
  size_t used() const { return used_; }

 private:
  char* memory_;
  size_t used_ = 0;
};

// Packs rows of D elements, times `factor`, as [ceil(D / pack)][block_rows]; lanes without a row are zero.
template <class Op>
static void pack_columns(const Block& block, const float* base, int64_t D, float factor, float* to) {
  const int64_t elements = (D + Op::pack - 1) / Op::pack;
  for (int lane = 0; lane < block_rows; lane += lanes) {
    const float* rows[lanes];
    for (int i = 0; i < lanes; i++) rows[i] = lane + i < block.rows ? base + block.row[lane + i] * D : nullptr;
    for (int64_t j = 0; j < elements; j += lanes) {
      f32v x[lanes];
      const int64_t d = j * Op::pack;
      const int first = static_cast<int>(std::min<int64_t>(lanes, D - d));
      [[maybe_unused]] const int second = static_cast<int>(std::max<int64_t>(0, std::min<int64_t>(lanes, D - d - lanes)));
      const auto row = [&](int i) __attribute__((always_inline)) {
#if defined(MOE_BF16_PRODUCTS)
        if constexpr (Op::pack == 2) return pair_neighbours(load_partial(rows[i] + d, first), load_partial(rows[i] + d + lanes, second));
#endif
        return load_some(rows[i] + d, first);
      };
      if (lane + lanes <= block.rows) {
#pragma GCC unroll 16
        for (int i = 0; i < lanes; i++) x[i] = row(i);
      } else {
        for (int i = 0; i < lanes; i++) x[i] = lane + i < block.rows ? row(i) : zero();
      }
      transpose_square(x);
      const int count = static_cast<int>(std::min<int64_t>(lanes, elements - j));
      for (int i = 0; i < count; i++) store(to + (j + i) * block_rows + lane, x[i]);
    }
  }
  if (factor == 1) return;
  // Besides 1, only 0 and -1 occur. They commute with rounding to bf16: -1 flips the sign bit, 0 gives zero.
  for (int64_t i = 0; i < elements * block_rows; i += lanes) {
    const f32v x = load(to + i);
    const int32_t signs = Op::pack == 1 ? static_cast<int32_t>(0x80000000) : static_cast<int32_t>(0x80008000);
    store(to + i, factor == 0 ? zero() : from_bits(bits(x) ^ splat(signs)));
  }
}

// The inverse of pack_columns for f32: writes [D][block_rows], times a factor for each lane, to rows of D elements.
static inline void unpack_columns(const Block& block, float* base, int64_t D, const float* from, const float* factor) {
  for (int lane = 0; lane < block.rows; lane += lanes) {
    const f32v f = load(factor + lane);
    const int rows = std::min(lanes, block.rows - lane);
    for (int64_t j = 0; j < D; j += lanes) {
      f32v x[lanes];
      const int count = static_cast<int>(std::min<int64_t>(lanes, D - j));
      const float* source = from + j * block_rows + lane;
      if (count == lanes) {
#pragma GCC unroll 16
        for (int i = 0; i < lanes; i++) x[i] = load(source + i * block_rows) * f;
      } else {
        for (int i = 0; i < lanes; i++) x[i] = i < count ? load(source + i * block_rows) * f : zero();
      }
      transpose_square(x);
      for (int i = 0; i < rows; i++) store_some(base + block.row[lane + i] * D + j, x[i], count);
    }
  }
}

// The rows of keys, or of values, in the order of their positions, from key `begin` of a batch on if they are paged.
template <class T>
struct KeyRows {
  const T* from;
  int64_t stride;
  const int32_t* pages = nullptr;  // as in Attention, for one batch
  int64_t page_keys = 1, begin = 0;

  const T* operator[](int64_t i) const {
    if (!pages) return from + i * stride;
    const int64_t s = begin + i;
    return from + (pages[s / page_keys] * page_keys + s % page_keys) * stride;
  }
};

template <class T>
static KeyRows<T> rows_from(const Attention& a, int64_t b, int64_t begin, const T* from, int64_t stride) {
  if (!a.pages) return {from + begin * stride, stride};
  return {from, stride, a.pages + b * (a.S / a.page_keys), a.page_keys, begin};
}

#if defined(MOE_BF16_PRODUCTS)
// Rounds [n][D] f32 to [n][ceil(D / 2)] pairs of bf16 that are adjacent along D.
static inline void pack_neighbours(const KeyRows<float>& rows, int64_t n, int64_t D, float* to) {
  constexpr int64_t step = 2 * lanes;
  const int64_t pairs = (D + 1) / 2, whole = D / step * step;
  for (int64_t s = 0; s < n; s++, to += pairs) {
    const float* from = rows[s];
    for (int64_t d = 0; d < whole; d += step) store(to + d / 2, pair_neighbours(load(from + d), load(from + d + lanes)));
    if (whole == D) continue;
    const int left = static_cast<int>(D - whole);
    const f32v first = load_partial(from + whole, std::min(lanes, left));
    const f32v second = left > lanes ? load_partial(from + whole + lanes, left - lanes) : zero();
    store_partial(to + whole / 2, pair_neighbours(first, second), (left + 1) / 2);
  }
}
// Rounds [n][D] f32 to [ceil(n / 2)][ld] pairs of bf16 that are adjacent along n. D <= ld. Rows are padded to whole vectors, but to ld elements at most.
static inline void pack_pairs(const KeyRows<float>& rows, int64_t n, int64_t D, float* to, int64_t ld) {
  for (int64_t s = 0; s < n; s += 2, to += ld) {
    const float *first = rows[s], *second = s + 1 < n ? rows[s + 1] : nullptr;
    for (int64_t d = 0; d < D; d += lanes) {
      const int count = static_cast<int>(std::min<int64_t>(lanes, D - d));
      const f32v low = load_some(first + d, count), high = second ? load_some(second + d, count) : zero();
      store_some(to + d, pair_lanes(low, high), static_cast<int>(std::min<int64_t>(lanes, ld - d)));
    }
  }
}
#endif

}  // namespace moe
