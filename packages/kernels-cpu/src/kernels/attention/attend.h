// Attention on blocks of query rows, with an online softmax (Milakov & Gimelshein 2018) over tiles of keys.
//
// Queries run along the vector lanes and keys along the rows. So maxima, sums and rescaling never cross lanes, keys and values are broadcast operands that
// are read in place (f32), and heads that share a key head fill the lanes if there are few queries. If the last rows of a block would leave most lanes of
// a vector empty, their features run along the lanes instead.
#pragma once

#include "block.h"

namespace moe {

constexpr float log2_e = 1.4426950408889634f;
constexpr int64_t most_keys = 96;
// The most rows whose features run along the lanes, and the number of keys whose scores are computed together; each row and key has an accumulator.
constexpr int few_rows = lanes / 4, few_keys = 4;

// Keys and values in the layout that the products read. F32Product reads f32 in place. Bf16Product reads bf16 keys in place, unless they are paged or Dk is
// odd. Everything else is copied, converted or packed first.
struct KeyTiles {
  const float *k, *v;
  int64_t k_stride, v_stride;  // per key; v of bf16: per pair of keys
};

template <class Op>
struct ForwardMemory {
  float *q, *q_rows, *scores, *weights, *out, *out_rows, *k, *v;
  ForwardMemory(Carver& carver, const Attention& a, int64_t keys) {
    if (a.each_tile) keys = a.tile_keys();
    q = carver.floats(a.Dk * block_rows);
    q_rows = carver.floats(a.Dk * few_rows);
    scores = carver.floats(most_keys * block_rows);
    weights = carver.floats(Op::pack == 2 ? most_keys / 2 * block_rows : 0);
    out = carver.floats(a.Dv * block_rows);
    out_rows = carver.floats(a.Dv * few_rows);
    const bool pairs_in_place = Op::pack == 2 && a.rows16 && a.Dk % 2 == 0 && !a.pages;
    k = carver.floats(a.in_place<Op>() || pairs_in_place ? 0 : keys * ((a.Dk + Op::pack - 1) / Op::pack));
    v = carver.floats(Op::pack == 2 ? (keys + 1) / 2 * a.Dv : 0);
  }
};

// Returns the tiles of n rows stored in bf16.
template <class Op>
static KeyTiles stored_tiles(const Attention& a, const KeyRows<uint16_t>& rows, int64_t n, ForwardMemory<Op>& memory) {
  if constexpr (Op::pack == 1) {
    for (int64_t s = 0; s < n; s++) {
      const uint16_t* row = rows[s];
      float* to = memory.k + s * a.Dk;
      int64_t d = 0;
      for (; d + lanes <= a.Dk; d += lanes) store(to + d, from_bf16(load(row + d)));
      for (; d < a.Dk; d++) to[d] = from_bits(splat(static_cast<int32_t>(row[d]) << 16))[0];
    }
    return {memory.k, memory.k, a.Dk, a.Dk};
  } else {
    const int64_t pairs = (a.Dk + 1) / 2;
    const float* keys = reinterpret_cast<const float*>(rows.from);
    if (a.pages || a.Dk % 2 == 1) {
      auto* to = reinterpret_cast<uint16_t*>(memory.k);
      for (int64_t s = 0; s < n; s++) {
        std::memcpy(to + s * pairs * 2, rows[s], static_cast<size_t>(a.Dk) * 2);
        if (a.Dk % 2 == 1) to[s * pairs * 2 + a.Dk] = 0;
      }
      keys = memory.k;
    }
    // Interleave the values of each two neighbouring keys as pairs.
    auto* values = reinterpret_cast<uint32_t*>(memory.v);
    for (int64_t s = 0; s < n; s += 2, values += a.Dv) {
      const bool both = s + 1 < n;
      const uint16_t *low = rows[s], *high = both ? rows[s + 1] : low;
      int64_t d = 0;
      for (; d + lanes <= a.Dv; d += lanes) {
        const u32v first = __builtin_convertvector(load(low + d), u32v);
        const u32v second = both ? __builtin_convertvector(load(high + d), u32v) << 16 : u32v{};
        store(reinterpret_cast<float*>(values) + d, (f32v)(first | second));
      }
      for (; d < a.Dv; d++) values[d] = low[d] | (both ? static_cast<uint32_t>(high[d]) << 16 : 0);
    }
    return {keys, memory.v, pairs, a.Dv};
  }
}

// Returns the tiles of keys begin .. end - 1 of key head g. Keys that are read in place must all be in one page.
template <class Op>
static KeyTiles key_tiles(const Attention& a, int64_t b, int64_t g, int64_t begin, int64_t end, ForwardMemory<Op>& memory) {
  const int64_t n = end - begin, k_at = b * a.k_batch + g * a.k_head, v_at = b * a.v_batch + g * a.v_head;
  if (a.rows16) return stored_tiles<Op>(a, rows_from(a, b, begin, a.rows16 + k_at, a.k_stride), n, memory);
  const KeyRows<float> k = rows_from(a, b, begin, a.k + k_at, a.k_stride), v = rows_from(a, b, begin, a.v + v_at, a.v_stride);
  if constexpr (Op::pack == 1) {
    if (a.in_place<Op>()) return {k[0], v[0], a.k_stride, a.v_stride};
    // Only latents have pages: their values are the first features of the keys.
    for (int64_t s = 0; s < n; s++) std::memcpy(memory.k + s * a.Dk, k[s], static_cast<size_t>(a.Dk) * 4);
    return {memory.k, memory.k, a.Dk, a.Dk};
  } else {
#if defined(MOE_BF16_PRODUCTS)
    pack_neighbours(k, n, a.Dk, memory.k);
    pack_pairs(v, n, a.Dv, memory.v, a.Dv);
#endif
    return {memory.k, memory.v, (a.Dk + 1) / 2, a.Dv};
  }
}

// Whether the block's last vector has so few rows that their features run along the lanes.
template <class Op>
static bool is_few(const Attention& a, const Block& block) {
  const int rows = block.rows - block.before();
  return rows > 0 && rows <= few_rows && a.fills_lanes<Op>();
}

// Packs the block's queries, times `sign`, in the layout that the products with keys read.
template <class Op>
static void pack_queries(const Attention& a, const Block& block, float sign, ForwardMemory<Op>& memory) {
  const bool few = is_few<Op>(a, block);
  if (!few || block.before() > 0) pack_columns<Op>(block, a.q, a.Dk, sign, memory.q);
  if (!few) return;
  const auto query = [&](const float* from) __attribute__((always_inline)) { return sign == 0 ? zero() : load(from) * splat(sign); };
  float* to = memory.q_rows;
  for (int i = block.before(); i < block.rows; i++) {
    const float* from = a.q + block.row[i] * a.Dk;
    for (int64_t d = 0; d < a.Dk; d += lanes * Op::pack, to += lanes) {
#if defined(__AVX512BF16__)
      if constexpr (Op::pack == 2) {
        store(to, pair_neighbours(query(from + d), query(from + d + lanes)));
        continue;
      }
#endif
      store(to, query(from + d));
    }
  }
}

// Computes the scores of n keys for `rows` <= few_rows queries, as [n][block_rows]. `depth` is a multiple of `lanes`.
template <class Op>
static void few_scores(int64_t n, const float* k, int64_t k_stride, const float* q, int rows, int64_t depth, float* scores) {
  const float* query[few_rows];
  for (int r = 0; r < few_rows; r++) query[r] = q + std::min(r, rows - 1) * depth;
  for (int64_t i = 0; i < n; i += few_keys) {
    const float* key[few_keys];
    for (int s = 0; s < few_keys; s++) key[s] = k + std::min(i + s, n - 1) * k_stride;
    f32v sums[lanes];
#pragma GCC unroll 16
    for (int j = 0; j < lanes; j++) sums[j] = zero();
    for (int64_t d = 0; d < depth; d += lanes) {
      f32v x[few_keys];
#pragma GCC unroll 4
      for (int s = 0; s < few_keys; s++) x[s] = load(key[s] + d);
#pragma GCC unroll 4
      for (int r = 0; r < few_rows; r++) {
        const f32v y = load(query[r] + d);
#pragma GCC unroll 4
        for (int s = 0; s < few_keys; s++) sums[s * few_rows + r] = Op::multiply_add(x[s], y, sums[s * few_rows + r]);
      }
    }
    transpose_square(sums);
#pragma GCC unroll 4
    for (int step = lanes / 2; step > 0; step /= 2) {
#pragma GCC unroll 8
      for (int j = 0; j < step; j++) sums[j] += sums[j + step];
    }
    alignas(64) float each[lanes], row[lanes] = {};
    store(each, sums[0]);
    for (int s = 0; s < few_keys && i + s < n; s++) {
      std::memcpy(row, each + s * few_rows, few_rows * 4);
      store(scores + (i + s) * block_rows, load(row));
    }
  }
}

// Attention of the block's rows to keys begin .. end - 1. If tiles were made in advance (`each_tile` is false), `tiles` starts at key `origin`, an even number
// of keys before `begin`. Writes sum of exp(score - max) * v to memory.out as [Dv][block_rows], and max and sum of each row to the block. max is in units
// of q . k, which `unit` converts to those of log2. `Few`: the features of the last vector's rows run along the lanes.
template <class Op, int Vectors, bool Few>
static void attend(const Attention& a, Block& block, int64_t origin, int64_t begin, int64_t end, float unit, const KeyTiles& tiles,
                   ForwardMemory<Op>& memory) {
  constexpr int Full = Vectors - Few, Before = Full * lanes;
  const int few = block.rows - Before;
  const f32v lowest = splat(-std::numeric_limits<float>::infinity());
  f32v max[Vectors], sum[Vectors];
  for (int j = 0; j < Vectors; j++) {
    max[j] = lowest;
    sum[j] = zero();
  }
  if (Full > 0) std::memset(memory.out, 0, static_cast<size_t>(a.Dv) * block_rows * 4);
  if (Few) std::memset(memory.out_rows, 0, static_cast<size_t>(a.Dv) * few_rows * 4);
  const int64_t step = a.tile_keys(), depth = (a.Dk + Op::pack - 1) / Op::pack;
  float* scores = memory.scores;
  const bool by_page = a.pages && a.in_place<Op>();
  for (int64_t at = begin; at < end; at += step) {
    const int64_t n = std::min(step, end - at);
    KeyTiles tile = tiles;
    if (!a.each_tile) {
      tile.k += (at - origin) * tiles.k_stride;
      tile.v += (at - origin) / Op::pack * tiles.v_stride;
    } else if (!by_page) {
      tile = key_tiles<Op>(a, block.b, block.g, at, at + n, memory);
    }
    // Calls product(i, count, run) for runs of consecutive keys: `count` keys from key i of the tile on. If keys are read in place from pages, a run ends
    // where its page does.
    const auto each_run = [&](auto product) __attribute__((always_inline)) {
      if (!by_page) return product(0, n, tile);
      for (int64_t i = 0, count; i < n; i += count) {
        count = std::min(n - i, a.page_keys - (at + i) % a.page_keys);
        product(i, count, key_tiles<Op>(a, block.b, block.g, at + i, at + i + count, memory));
      }
    };
    each_run([&](int64_t i, int64_t count, const KeyTiles& run) {
      small_product<Op, false, false>(count, Full, run.k, run.k_stride, memory.q, block_rows, depth, scores + i * block_rows, block_rows);
      if constexpr (Few) few_scores<Op>(count, run.k, run.k_stride, memory.q_rows, few, depth, scores + i * block_rows + Before);
    });
    const auto mask = [&](int64_t from, int64_t to) __attribute__((always_inline)) {
      for (int64_t i = from; i < to; i++) {
        const i32v key = splat(static_cast<int32_t>(at + i));
#pragma GCC unroll 4
        for (int j = 0; j < Vectors; j++) {
          float* p = scores + i * block_rows + j * lanes;
          store(p, select((load(block.first + j * lanes) <= key) & (key < load(block.visible + j * lanes)), load(p), lowest));
        }
      }
    };
    const int64_t inside = std::max<int64_t>(0, std::min(n, block.all_from - at)), outside = std::max(inside, block.all_to - at);
    mask(0, inside);
    mask(outside, n);
    f32v top[Vectors], shift[Vectors];
    for (int j = 0; j < Vectors; j++) top[j] = max[j];
    for (int64_t i = 0; i < n; i++) {
#pragma GCC unroll 4
      for (int j = 0; j < Vectors; j++) top[j] = fast_max(load(scores + i * block_rows + j * lanes), top[j]);
    }
    i32v grew = i32v{};
    for (int j = 0; j < Vectors; j++) {
      // A row that has not seen any key yet gets shift 0, because -infinity minus itself would be NaN.
      shift[j] = select(top[j] == lowest, zero(), top[j]) * splat(unit);
      const f32v shrink = exp2_small(max[j] * splat(unit) - shift[j]);
      store(block.factor + j * lanes, shrink);
      sum[j] *= shrink;
      grew |= top[j] != max[j];
      max[j] = top[j];
    }
    if (at > begin && any(grew)) {
      for (int i = 0; Few && i < few; i++) {
        float* row = memory.out_rows + i * a.Dv;
        for (int64_t d = 0; d < a.Dv; d += lanes) store(row + d, load(row + d) * splat(block.factor[Before + i]));
      }
      for (int64_t d = 0; Full > 0 && d < a.Dv; d++) {
#pragma GCC unroll 4
        for (int j = 0; j < Full; j++) {
          float* p = memory.out + d * block_rows + j * lanes;
          store(p, load(p) * load(block.factor + j * lanes));
        }
      }
    }
    // Adds weights times values of `count` keys (of pairs of keys with Bf16Product) to the output.
    const auto add = [&](const float* weights, const float* values, int64_t stride, int64_t count) __attribute__((always_inline)) {
      small_product<Op, true, true>(a.Dv, Full, values, stride, weights, block_rows, count, memory.out, block_rows);
      if (Few) small_product<Op, true, true>(few, a.Dv / lanes, weights + Before, block_rows, values, stride, count, memory.out_rows, a.Dv);
    };
    if constexpr (Op::pack == 1) {
      for (int64_t i = 0; i < n; i++) {
#pragma GCC unroll 4
        for (int j = 0; j < Vectors; j++) {
          float* p = scores + i * block_rows + j * lanes;
          const f32v weight = exp2_small(fma(load(p), splat(unit), -shift[j]));
          sum[j] += weight;
          store(p, weight);
        }
      }
      each_run([&](int64_t i, int64_t count, const KeyTiles& run) { add(scores + i * block_rows, run.v, run.v_stride, count); });
    } else {
#if defined(MOE_BF16_PRODUCTS)
      if (n % 2 == 1) {
        for (int j = 0; j < Vectors; j++) store(scores + n * block_rows + j * lanes, lowest);
      }
      for (int64_t i = 0; i < n; i += 2) {
#pragma GCC unroll 4
        for (int j = 0; j < Vectors; j++) {
          const float* p = scores + i * block_rows + j * lanes;
          const f32v first = exp2_small(fma(load(p), splat(unit), -shift[j]));
          const f32v second = exp2_small(fma(load(p + block_rows), splat(unit), -shift[j]));
          sum[j] += first + second;
          store(memory.weights + i / 2 * block_rows + j * lanes, pair_lanes(first, second));
        }
      }
      add(memory.weights, tile.v, tile.v_stride, (n + 1) / 2);
#endif
    }
  }
  for (int64_t d = 0; Few && d < a.Dv; d += lanes) {
    f32v x[lanes];
    for (int i = 0; i < lanes; i++) x[i] = i < few ? load(memory.out_rows + i * a.Dv + d) : zero();
    transpose_square(x);
    for (int i = 0; i < lanes; i++) store(memory.out + (d + i) * block_rows + Before, x[i]);
  }
  for (int j = 0; j < Vectors; j++) {
    store(block.max + j * lanes, max[j]);
    store(block.sum + j * lanes, sum[j]);
  }
}

template <class Op>
static void attend_block(const Attention& a, Block& block, int64_t origin, int64_t end, float unit, const KeyTiles& tiles,
                         ForwardMemory<Op>& memory) {
  const int64_t begin = std::max(origin, block.begin - (block.begin - origin) % 2);
  const auto with = [&](auto few) __attribute__((always_inline)) {
    if (block.vectors() == 1) return attend<Op, 1, few.value>(a, block, origin, begin, end, unit, tiles, memory);
    attend<Op, block_vectors, few.value>(a, block, origin, begin, end, unit, tiles, memory);
  };
  if (is_few<Op>(a, block)) return with(std::true_type());
  with(std::false_type());
}

// Divides the outputs of a block by the sums of their weights, and stores them and lse.
static inline void finish_block(const Attention& a, Block& block, float magnitude, const float* out) {
  for (int i = 0; i < block.rows; i++) {
    block.factor[i] = block.visible[i] == 0 ? 0 : 1 / block.sum[i];
    if (!a.lse) continue;
    const float lse = block.max[i] * magnitude + std::log(block.sum[i]);
    a.lse[block.lse_index[i]] = block.visible[i] == 0 ? -std::numeric_limits<float>::infinity() : lse;
  }
  unpack_columns(block, a.out, a.Dv, out, block.factor);
}

template <class Op>
static void attention_forward(Attention a) {
  if (a.B * a.T * a.H == 0) return;
  // With few rows each key is used only once, and rounding it to bf16 would take longer than multiplying it in f32.
  if constexpr (Op::pack == 2) {
    if (a.rows() <= few_rows && !a.rows16 && a.fills_lanes<F32Product>()) return attention_forward<F32Product>(a);
  }
  // The sign of the scale is applied to q, so that the largest product belongs to the largest score.
  const float magnitude = a.scale == 0 ? 1 : std::fabs(a.scale), sign = a.scale == 0 ? 0 : a.scale < 0 ? -1 : 1;
  const float unit = magnitude * log2_e;
  const int64_t heads = a.B * a.G, blocks = a.blocks();
  // With few rows and many keys, keys are split into chunks of fixed size. Chunks run in parallel; their results are combined in order.
  constexpr int64_t chunk = 384;
  // Tiles of pairs that only one block needs are made tile by tile, so that they stay in its caches. If bf16 is only widened to f32, tiles are made in advance:
  // reading f32 from memory overlaps with the products better than widening does.
  a.each_tile = a.in_place<Op>() || (Op::pack == 2 && blocks == 1);
  if (heads * blocks < 8 && a.S >= 2 * chunk) {
    const int64_t chunks = std::max<int64_t>(1, (a.longest() + chunk - 1) / chunk), units = heads * blocks;
    Carver sizes(nullptr);
    ForwardMemory<Op>(sizes, a, chunk);
    const size_t each = round_up(sizes.used(), 64), part = static_cast<size_t>(a.Dv + 2) * block_rows;
    const size_t parts_at = each * static_cast<size_t>(max_threads());
    Scratch scratch(parts_at + part * 4 * static_cast<size_t>(units * chunks));
    float* parts = scratch.as<float>(parts_at);
    parallel_tasks(heads * chunks, [&](int64_t task, int worker) {
      const int64_t head = task % heads, index = task / heads, b = head / a.G, g = head % a.G, limit = a.limit(b), begin = index * chunk;
      if (begin >= limit) return;
      Carver carver(scratch.as<char>(each * static_cast<size_t>(worker)));
      ForwardMemory<Op> memory(carver, a, chunk);
      const KeyTiles tiles = a.each_tile ? KeyTiles{} : key_tiles<Op>(a, b, g, begin, std::min(limit, begin + chunk), memory);
      Block block;
      for (int64_t i = 0; i < blocks; i++) {
        block.place(a, b, g, i, limit);
        const int64_t end = std::min(block.keys, begin + chunk);
        if (begin >= end) continue;
        pack_queries<Op>(a, block, sign, memory);
        memory.out = parts + part * static_cast<size_t>((head * blocks + i) * chunks + index);
        attend_block<Op>(a, block, begin, end, unit, tiles, memory);
        std::memcpy(memory.out + a.Dv * block_rows, block.max, sizeof block.max);
        std::memcpy(memory.out + (a.Dv + 1) * block_rows, block.sum, sizeof block.sum);
      }
    });
    parallel_tasks(units, [&](int64_t which, int) {
      const int64_t head = which / blocks, b = head / a.G, g = head % a.G;
      Block block;
      block.place(a, b, g, which % blocks, a.limit(b));
      float* first = parts + part * static_cast<size_t>(which * chunks);
      if (block.keys == 0) std::memset(first, 0, part * 4);
      const f32v lowest = splat(-std::numeric_limits<float>::infinity());
      const int64_t used = (block.keys + chunk - 1) / chunk;
      for (int lane = 0; lane < block.rows; lane += lanes) {
        f32v top = lowest, total = zero();
        for (int64_t i = 0; i < used; i++) top = fast_max(load(first + part * i + a.Dv * block_rows + lane), top);
        const f32v shift = select(top == lowest, zero(), top) * splat(unit);
        for (int64_t i = 0; i < used; i++) {
          float* from = first + part * i;
          const f32v factor = exp2_small(load(from + a.Dv * block_rows + lane) * splat(unit) - shift);
          total = fma(load(from + (a.Dv + 1) * block_rows + lane), factor, total);
          for (int64_t d = 0; d < a.Dv; d++) {
            const f32v x = load(from + d * block_rows + lane) * factor;
            store(first + d * block_rows + lane, i == 0 ? x : load(first + d * block_rows + lane) + x);
          }
        }
        store(block.max + lane, top);
        store(block.sum + lane, total);
      }
      finish_block(a, block, magnitude, first);
    });
    return;
  }
  // Tiles made in advance take scratch memory for all S keys that the pages have room for, however few are in use.
  if (a.pages) a.each_tile = true;
  // Rows are independent, so their division into tasks may depend on the number of threads.
  const int64_t wanted = 4 * int64_t{max_threads()};
  const int64_t parts = max_threads() == 1 || heads >= wanted ? 1 : std::min(blocks, (wanted + heads - 1) / heads);
  Carver sizes(nullptr);
  ForwardMemory<Op>(sizes, a, a.S);
  const size_t each = round_up(sizes.used(), 64);
  Scratch scratch(each * static_cast<size_t>(max_threads()));
  parallel_tasks(heads * parts, [&](int64_t task, int worker) {
    const int64_t head = task / parts, b = head / a.G, g = head % a.G;
    Carver carver(scratch.as<char>(each * static_cast<size_t>(worker)));
    ForwardMemory<Op> memory(carver, a, a.S);
    Block block;
    const KeyTiles tiles = a.each_tile ? KeyTiles{} : key_tiles<Op>(a, b, g, 0, a.limit(b), memory);
    for (int64_t index = task % parts; index < blocks; index += parts) {
      block.place(a, b, g, index, a.limit(b));
      pack_queries<Op>(a, block, sign, memory);
      attend_block<Op>(a, block, 0, block.keys, unit, tiles, memory);
      finish_block(a, block, magnitude, memory.out);
    }
  });
}

}  // namespace moe
