// Index scores of sparse attention: weighted sums over heads of ReLU(q . k). The products are computed block by block and never stored as
// a whole.
#include "gemm.h"
#include "moe.h"

using namespace moe;

namespace {

// A block of products [block_rows, block_keys], the rows of whole queries, stays in a worker's L2 cache.
constexpr int64_t block_rows = 128, block_keys = 512;
// The backward pass stores gradients of the products of many rows and some keys: 8 MiB, in the shared cache.
constexpr int64_t gradient_rows = 4096, gradient_elements = int64_t{2} << 20;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct IndexScores {
  const float *q, *weights, *keys;
  const int32_t* limits;  // [B][T]: number of keys that a query sees; nullptr: all
  int64_t B, T, J, D, S;
  bool bf16;

  // Number of keys that query t of sequence b sees.
  int64_t limit(int64_t b, int64_t t) const { return limits ? std::max<int64_t>(0, std::min<int64_t>(S, limits[b * T + t])) : S; }
  // The most that any of the queries t .. t + n - 1 sees.
  int64_t limit(int64_t b, int64_t t, int64_t n) const {
    if (!limits) return S;
    int64_t most = 0;
    for (int64_t i = t; i < t + n; i++) most = std::max(most, limit(b, i));
    return most;
  }
  const float* query(int64_t b, int64_t t) const { return q + (b * T + t) * J * D; }
  const float* weight(int64_t b, int64_t t) const { return weights + (b * T + t) * J; }
  const float* key(int64_t b, int64_t s) const { return keys + (b * S + s) * D; }
  GemmOperand rows_of_keys(int64_t b, int64_t s, int64_t n) const { return gemm_operand(key(b, s), n, D, false); }

  // Products of queries t .. t + queries - 1 and n keys.
  Gemm products(int64_t b, int64_t t, int64_t queries, int64_t n, float* to) const {
    Gemm job;
    job.a = gemm_operand(query(b, t), queries * J, D, false);
    job.c = to;
    job.ldc = static_cast<std::ptrdiff_t>(n);
    job.m = queries * J, job.n = n, job.k = D;
    return job;
  }
};

// NaN stays NaN.
MOE_INLINE f32v rectified(f32v x) { return select(x <= zero(), zero(), x); }

// scores[s] = the sum over heads of weights[j] * rectified(products[j][s]), products [heads, n].
void sum_heads(float* scores, const float* products, const float* weights, int64_t heads, int64_t n) {
  constexpr int64_t wide = 4 * lanes;
  int64_t s = 0;
  for (; s + wide <= n; s += wide) {
    f32v sums[4] = {};
    for (int64_t j = 0; j < heads; j++) {
      const f32v w = splat(weights[j]);
#pragma GCC unroll 4
      for (int v = 0; v < 4; v++) sums[v] = fma(w, rectified(load(products + j * n + s + v * lanes)), sums[v]);
    }
    for (int v = 0; v < 4; v++) store(scores + s + v * lanes, sums[v]);
  }
  each_vector(n - s, [&](int64_t at, int count) {
    f32v sum = zero();
    for (int64_t j = 0; j < heads; j++) sum = fma(splat(weights[j]), rectified(load_some(products + j * n + s + at, count)), sum);
    store_some(scores + s + at, sum, count);
  });
}

// Replaces products [n] of a head by their gradients, and returns the gradient of the head's weight.
float head_gradient(float* products, const float* dscores, float weight, int64_t n) {
  f32v dweight = zero();
  each_vector(n, [&](int64_t s, int count) {
    const f32v x = load_some(products + s, count), d = load_some(dscores + s, count);
    dweight = fma(d, rectified(x), dweight);
    store_some(products + s, select(x <= zero(), zero(), d * splat(weight)), count);
  });
  return sum(dweight);
}

}  // namespace

// scores [B, T, S], q [B, T, J, D], weights [B, T, J], keys [B, S, D], limits [B, T] or 0, B, T, J, D, S, bf16
MOE_KERNEL(moe_index_scores_fwd_f32) {
  float* scores = args.ptr<float>();
  IndexScores x{};
  x.q = args.ptr<const float>();
  x.weights = args.ptr<const float>();
  x.keys = args.ptr<const float>();
  x.limits = args.ptr<const int32_t>();
  x.B = args.size(), x.T = args.size(), x.J = args.size(), x.D = args.size(), x.S = args.size();
  x.bf16 = args.flag();
  const int64_t queries = std::max<int64_t>(1, block_rows / std::max<int64_t>(1, x.J));
  const int64_t down = ceil_div(x.T, queries), across = ceil_div(x.S, block_keys);
  // Keys that several blocks of queries read are packed once.
  const bool packs = down > 1;
  const Scratch memory(packs ? gemm_packed_b_size(x.S, x.D, x.bf16) * 4 + 64 : 64);
  float* packed = memory.as<float>();
  for (int64_t b = 0; b < x.B; b++) {
    if (packs) gemm_pack_b(x.rows_of_keys(b, 0, x.S), nullptr, x.S, x.D, x.bf16, packed);
    parallel_tasks(down * across, [&](int64_t task, int) {
      const int64_t from = task / down * block_keys, t = task % down * queries;
      const int64_t count = std::min(queries, x.T - t), width = std::min(block_keys, x.S - from);
      const int64_t seen = std::max<int64_t>(0, std::min(width, x.limit(b, t, count) - from));
      const Scratch scratch(static_cast<size_t>(count * x.J * seen) * 4 + 64);
      float* products = scratch.as<float>();
      if (seen > 0) {
        Gemm job = x.products(b, t, count, seen, products);
        job.b = x.rows_of_keys(b, from, seen);
        if (packs) job.packed_b = packed, job.packed_from = from, job.packed_n = x.S;
        gemm_here(job, x.bf16);
      }
      for (int64_t i = 0; i < count; i++) {
        float* row = scores + (b * x.T + t + i) * x.S + from;
        const int64_t own = std::max<int64_t>(0, std::min(seen, x.limit(b, t + i) - from));
        sum_heads(row, products + i * x.J * seen, x.weight(b, t + i), x.J, seen);
        std::fill(row + own, row + width, -std::numeric_limits<float>::infinity());
      }
    });
  }
}

// dq, dweights, dkeys, q, weights, keys, dscores [B, T, S], limits or 0, B, T, J, D, S, bf16
MOE_KERNEL(moe_index_scores_bwd_f32) {
  float* dq = args.ptr<float>();
  float* dweights = args.ptr<float>();
  float* dkeys = args.ptr<float>();
  IndexScores x{};
  x.q = args.ptr<const float>();
  x.weights = args.ptr<const float>();
  x.keys = args.ptr<const float>();
  const float* dscores = args.ptr<const float>();
  x.limits = args.ptr<const int32_t>();
  x.B = args.size(), x.T = args.size(), x.J = args.size(), x.D = args.size(), x.S = args.size();
  x.bf16 = args.flag();
  const int64_t per_query = x.J * x.D;
  std::memset(dq, 0, static_cast<size_t>(x.B * x.T * per_query) * 4);
  std::memset(dweights, 0, static_cast<size_t>(x.B * x.T * x.J) * 4);
  std::memset(dkeys, 0, static_cast<size_t>(x.B * x.S * x.D) * 4);
  if (x.J == 0) return;
  const int64_t most_queries = std::min(x.T, std::max<int64_t>(1, gradient_rows / x.J));
  const int64_t multiple = gemm_column_block();
  const int64_t most_keys =
      std::min(x.S, std::max(block_keys, gradient_elements / std::max<int64_t>(1, most_queries * x.J) / multiple * multiple));
  const Scratch gradients(static_cast<size_t>(most_queries * x.J * most_keys) * 4 + 64);
  const Scratch packed(gemm_packed_b_size(most_keys, x.D, x.bf16) * 4 + 64);
  float* dproducts = gradients.as<float>();
  const int64_t queries = std::max<int64_t>(1, block_rows / x.J);
  for (int64_t b = 0; b < x.B; b++) {
    for (int64_t from = 0; from < x.S; from += most_keys) {
      gemm_pack_b(x.rows_of_keys(b, from, std::min(most_keys, x.S - from)), nullptr, std::min(most_keys, x.S - from), x.D, x.bf16,
                  packed.as<float>());
      for (int64_t first = 0; first < x.T; first += most_queries) {
        const int64_t size = std::min(most_queries, x.T - first);
        const int64_t width = std::min(std::min(most_keys, x.S - from), x.limit(b, first, size) - from);
        if (width <= 0) continue;
        parallel_tasks(ceil_div(size, queries), [&](int64_t task, int) {
          const int64_t t = first + task * queries, count = std::min(queries, first + size - t);
          float* block = dproducts + (t - first) * x.J * width;
          Gemm job = x.products(b, t, count, width, block);
          job.packed_b = packed.as<float>();
          job.packed_n = std::min(most_keys, x.S - from);
          gemm_here(job, x.bf16);
          for (int64_t i = t; i < t + count; i++) {
            const int64_t own = std::max<int64_t>(0, std::min(width, x.limit(b, i) - from));
            for (int64_t j = 0; j < x.J; j++, block += width) {
              dweights[(b * x.T + i) * x.J + j] +=
                  head_gradient(block, dscores + (b * x.T + i) * x.S + from, x.weight(b, i)[j], own);
              std::memset(block + own, 0, static_cast<size_t>(width - own) * 4);
            }
          }
        });
        Gemm jobs[2];
        jobs[0].a = gemm_operand(dproducts, size * x.J, width, false);
        jobs[0].b = gemm_operand(x.key(b, from), x.D, width, true);
        jobs[0].c = dq + (b * x.T + first) * per_query;
        jobs[0].m = size * x.J, jobs[0].n = x.D, jobs[0].k = width;
        jobs[1].a = gemm_operand(dproducts, width, size * x.J, true);
        jobs[1].b = gemm_operand(x.query(b, first), x.D, size * x.J, true);
        jobs[1].c = dkeys + (b * x.S + from) * x.D;
        jobs[1].m = width, jobs[1].n = x.D, jobs[1].k = size * x.J;
        for (Gemm& job : jobs) job.accumulate = true, job.ldc = static_cast<std::ptrdiff_t>(x.D);
        gemm(jobs, 2, x.bf16);
      }
    }
  }
}
