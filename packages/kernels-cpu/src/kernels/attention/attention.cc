// moe-isa: baseline avx2 avx512 avx512bf16 bf16
// Attention that never stores the score matrix; its backward pass recomputes the scores (Dao 2023, FlashAttention-2).
#include "attend.h"

using namespace moe;

namespace {

struct Gradient {
  const float *out, *lse, *dout;
  float *dq, *dk, *dv;
};

template <class Op>
struct BackwardMemory {
  float *q_columns, *dout_columns, *dq_columns, *q_rows, *dout_rows, *p, *ds, *dk, *dv;
  float *k_neighbours, *v_neighbours, *k_pairs, *p_half, *ds_half, *ds_pairs;  // bf16 only
  BackwardMemory(Carver& carver, const Attention& a, int64_t Dk_padded, int64_t Dv_padded) {
    constexpr bool half = Op::pack == 2;
    q_columns = carver.floats(a.Dk * block_rows);
    dout_columns = carver.floats(a.Dv * block_rows);
    dq_columns = carver.floats(a.Dk * block_rows);
    q_rows = carver.floats(Dk_padded * block_rows);
    dout_rows = carver.floats(Dv_padded * block_rows);
    p = carver.floats(most_keys * block_rows);
    ds = carver.floats(most_keys * block_rows);
    dk = carver.floats(a.S * Dk_padded);
    dv = carver.floats(a.S * Dv_padded);
    k_neighbours = carver.floats(half ? a.S * ((a.Dk + 1) / 2) : 0);
    v_neighbours = carver.floats(half ? a.S * ((a.Dv + 1) / 2) : 0);
    k_pairs = carver.floats(half ? (a.S + 1) / 2 * a.Dk : 0);
    p_half = carver.floats(half ? most_keys * block_rows / 2 : 0);
    ds_half = carver.floats(half ? most_keys * block_rows / 2 : 0);
    ds_pairs = carver.floats(half ? most_keys * block_rows / 2 : 0);
  }
};

// Packs rows of D elements as [block_rows / pack][padded]. Pairs consist of two neighbouring rows.
template <class Op>
void pack_rows(const Block& block, const float* base, int64_t D, int64_t padded, float* to) {
  for (int i = 0; i < block_rows; i += Op::pack, to += padded) {
    const float* first = i < block.rows ? base + block.row[i] * D : nullptr;
    [[maybe_unused]] const float* second = i + 1 < block.rows ? base + block.row[std::min(i + 1, block_rows - 1)] * D : nullptr;
    each_vector(D, [&](int64_t j, int count) {
      f32v x = first ? load_some(first + j, count) : zero();
#if defined(MOE_BF16_PRODUCTS)
      if constexpr (Op::pack == 2) x = pair_lanes(x, second ? load_some(second + j, count) : zero());
#endif
      store(to + j, x);
    });
  }
}

// The backward pass of one key head. No other task adds to its dk and dv.
template <class Op>
void backward_head(const Attention& a, const Gradient& gradient, int64_t b, int64_t g, BackwardMemory<Op>& memory) {
  constexpr int V = block_vectors;
  const int64_t limit = a.limit(b), step = a.tile_keys();
  const int64_t Dk_padded = static_cast<int64_t>(round_up(a.Dk, lanes)), Dv_padded = static_cast<int64_t>(round_up(a.Dv, lanes));
  const int64_t Dk_depth = (a.Dk + Op::pack - 1) / Op::pack, Dv_depth = (a.Dv + Op::pack - 1) / Op::pack;
  const float *k = a.k + b * a.k_batch + g * a.k_head, *v = a.v + b * a.v_batch + g * a.v_head, *k_deep = k;
  int64_t k_stride = a.k_stride, v_stride = a.v_stride, k_deep_stride = a.k_stride;
#if defined(MOE_BF16_PRODUCTS)
  if constexpr (Op::pack == 2) {
    pack_neighbours({k, k_stride}, limit, a.Dk, memory.k_neighbours);
    pack_neighbours({v, v_stride}, limit, a.Dv, memory.v_neighbours);
    pack_pairs({k, k_stride}, limit, a.Dk, memory.k_pairs, a.Dk);
    k = memory.k_neighbours;
    v = memory.v_neighbours;
    k_deep = memory.k_pairs;
    k_stride = Dk_depth;
    v_stride = Dv_depth;
    k_deep_stride = a.Dk;
  }
#endif
  std::memset(memory.dk, 0, static_cast<size_t>(a.S * Dk_padded) * 4);
  std::memset(memory.dv, 0, static_cast<size_t>(a.S * Dv_padded) * 4);
  const f32v unit = splat(a.scale * log2_e);
  float *P = memory.p, *DS = memory.ds;
  Block block;
  for (int64_t index = 0; index < a.blocks(); index++) {
    block.place(a, b, g, index, limit);
    pack_columns<Op>(block, a.q, a.Dk, 1, memory.q_columns);
    pack_columns<Op>(block, gradient.dout, a.Dv, 1, memory.dout_columns);
    pack_rows<Op>(block, a.q, a.Dk, Dk_padded, memory.q_rows);
    pack_rows<Op>(block, gradient.dout, a.Dv, Dv_padded, memory.dout_rows);
    for (int i = 0; i < block_rows; i++) {
      block.max[i] = block.sum[i] = 0;
      block.factor[i] = a.scale;
      if (i >= block.rows) {
        block.first[i] = block.visible[i] = 0;
        continue;
      }
      const float lse = gradient.lse[block.lse_index[i]];
      block.max[i] = block.visible[i] == 0 ? 0 : lse * log2_e;
      const float *o = gradient.out + block.row[i] * a.Dv, *d = gradient.dout + block.row[i] * a.Dv;
      f32v total = zero();
      each_vector(a.Dv, [&](int64_t j, int count) { total = fma(load_some(o + j, count), load_some(d + j, count), total); });
      block.sum[i] = sum(total);
    }
    std::memset(memory.dq_columns, 0, static_cast<size_t>(a.Dk) * block_rows * 4);
    f32v lse[V], delta[V];
    i32v first[V], visible[V];
    for (int j = 0; j < V; j++) {
      lse[j] = load(block.max + j * lanes);
      delta[j] = load(block.sum + j * lanes);
      first[j] = load(block.first + j * lanes);
      visible[j] = load(block.visible + j * lanes);
    }
    // Pairs of keys start at even keys.
    for (int64_t at = block.begin & ~int64_t{1}; at < block.keys; at += step) {
      const int64_t n = std::min(step, block.keys - at);
      small_product<Op, false, false>(n, V, k + at * k_stride, k_stride, memory.q_columns, block_rows, Dk_depth, P, block_rows);
      small_product<Op, false, false>(n, V, v + at * v_stride, v_stride, memory.dout_columns, block_rows, Dv_depth, DS, block_rows);
      const bool masked = at < block.all_from || at + n > block.all_to || block.rows < block_rows;
      const auto cell = [&](int64_t i, int j, f32v& p, f32v& ds) __attribute__((always_inline)) {
        p = exp2_small(fma(load(P + i * block_rows + j * lanes), unit, -lse[j]));
        ds = p * (load(DS + i * block_rows + j * lanes) - delta[j]);
        if (masked) {
          const i32v key = splat(static_cast<int32_t>(at + i)), seen = (first[j] <= key) & (key < visible[j]);
          p = from_bits(seen & bits(p));
          ds = from_bits(seen & bits(ds));
        }
      };
      float *dk = memory.dk + at * Dk_padded, *dv = memory.dv + at * Dv_padded;
      if constexpr (Op::pack == 1) {
        for (int64_t i = 0; i < n; i++) {
#pragma GCC unroll 4
          for (int j = 0; j < V; j++) {
            f32v p, ds;
            cell(i, j, p, ds);
            store(P + i * block_rows + j * lanes, p);
            store(DS + i * block_rows + j * lanes, ds);
          }
        }
        small_product<Op, false, true>(n, Dv_padded / lanes, P, block_rows, memory.dout_rows, Dv_padded, block_rows, dv, Dv_padded);
        small_product<Op, false, true>(n, Dk_padded / lanes, DS, block_rows, memory.q_rows, Dk_padded, block_rows, dk, Dk_padded);
        small_product<Op, true, true>(a.Dk, V, k_deep + at * k_deep_stride, k_deep_stride, DS, block_rows, n, memory.dq_columns, block_rows);
      } else {
#if defined(MOE_BF16_PRODUCTS)
        constexpr int64_t row = block_rows / 2;
        for (int64_t i = 0; i < n; i += 2) {
          f32v p[2][V], ds[2][V];
          for (int j = 0; j < V; j++) {
            cell(i, j, p[0][j], ds[0][j]);
            p[1][j] = ds[1][j] = zero();
            if (i + 1 < n) cell(i + 1, j, p[1][j], ds[1][j]);
            store(memory.ds_pairs + i / 2 * block_rows + j * lanes, pair_lanes(ds[0][j], ds[1][j]));
          }
          for (int r = 0; r < 2; r++) {
            for (int j = 0; j < V; j += 2) {
              store(memory.p_half + (i + r) * row + j / 2 * lanes, pair_neighbours(p[r][j], p[r][j + 1]));
              store(memory.ds_half + (i + r) * row + j / 2 * lanes, pair_neighbours(ds[r][j], ds[r][j + 1]));
            }
          }
        }
        small_product<Op, false, true>(n, Dv_padded / lanes, memory.p_half, row, memory.dout_rows, Dv_padded, row, dv, Dv_padded);
        small_product<Op, false, true>(n, Dk_padded / lanes, memory.ds_half, row, memory.q_rows, Dk_padded, row, dk, Dk_padded);
        small_product<Op, true, true>(a.Dk, V, k_deep + at / 2 * k_deep_stride, k_deep_stride, memory.ds_pairs, block_rows, (n + 1) / 2,
                                      memory.dq_columns, block_rows);
#endif
      }
    }
    unpack_columns(block, gradient.dq, a.Dk, memory.dq_columns, block.factor);
  }
  const f32v scale = splat(a.scale);
  for (int64_t s = 0; s < a.S; s++) {
    float* dk = gradient.dk + ((b * a.S + s) * a.G + g) * a.Dk;
    float* dv = gradient.dv + ((b * a.S + s) * a.G + g) * a.Dv;
    each_vector(a.Dk, [&](int64_t j, int count) { store_some(dk + j, load(memory.dk + s * Dk_padded + j) * scale, count); });
    each_vector(a.Dv, [&](int64_t j, int count) { store_some(dv + j, load(memory.dv + s * Dv_padded + j), count); });
  }
}

template <class Op>
void attention_backward(const Attention& a, const Gradient& gradient) {
  const int64_t Dk_padded = static_cast<int64_t>(round_up(a.Dk, lanes)), Dv_padded = static_cast<int64_t>(round_up(a.Dv, lanes));
  Carver sizes(nullptr);
  BackwardMemory<Op>(sizes, a, Dk_padded, Dv_padded);
  const size_t each = round_up(sizes.used(), 64);
  const int64_t heads = a.B * a.G;
  Scratch scratch(each * static_cast<size_t>(std::max<int64_t>(1, std::min<int64_t>(max_threads(), heads))));
  parallel_tasks(heads, [&](int64_t head, int worker) {
    Carver carver(scratch.as<char>(each * static_cast<size_t>(worker)));
    BackwardMemory<Op> memory(carver, a, Dk_padded, Dv_padded);
    backward_head<Op>(a, gradient, head / a.G, head % a.G, memory);
  });
}

// lengths (0: none), starts (0: none), B, T, S, H, G, Dk, Dv, causal, scale
void read_sizes(Args& args, Attention& a) {
  a.lengths = args.ptr<const int32_t>();
  a.starts = args.ptr<const int32_t>();
  a.B = args.size();
  a.T = args.size();
  a.S = args.size();
  a.H = args.size();
  a.G = args.size();
  a.Dk = args.size();
  a.Dv = args.size();
  a.causal = args.flag();
  a.scale = args.f32();
  a.k_head = a.Dk;
  a.v_head = a.Dv;
  a.k_stride = a.G * a.Dk;
  a.v_stride = a.G * a.Dv;
  a.k_batch = a.S * a.k_stride;
  a.v_batch = a.S * a.v_stride;
}

template <class Op>
void forward(Args& args) {
  Attention a{};
  a.out = args.ptr<float>();
  a.lse = args.ptr<float>();
  a.q = args.ptr<const float>();
  a.k = args.ptr<const float>();
  a.v = args.ptr<const float>();
  read_sizes(args, a);
  attention_forward<Op>(a);
}

template <class Op>
void backward(Args& args) {
  Attention a{};
  Gradient gradient{};
  gradient.dq = args.ptr<float>();
  gradient.dk = args.ptr<float>();
  gradient.dv = args.ptr<float>();
  a.q = args.ptr<const float>();
  a.k = args.ptr<const float>();
  a.v = args.ptr<const float>();
  gradient.out = args.ptr<const float>();
  gradient.lse = args.ptr<const float>();
  gradient.dout = args.ptr<const float>();
  read_sizes(args, a);
  attention_backward<Op>(a, gradient);
}

}  // namespace

#if defined(MOE_BF16_PRODUCTS)
using Half = Bf16Product;
#else
using Half = F32Product;
#endif

MOE_KERNEL(moe_attention_fwd_f32) { forward<F32Product>(args); }
MOE_KERNEL(moe_attention_fwd_bf16) { forward<Half>(args); }
MOE_KERNEL(moe_attention_bwd_f32) { backward<F32Product>(args); }
MOE_KERNEL(moe_attention_bwd_bf16) { backward<Half>(args); }
