// Selects the experts of each token; and the gradient of their weights.
#include "../softmax/row-sums.h"
#include "largest.h"

using namespace moe;

namespace {

// Finds the two largest of n >= 1 keys; the second is `excluded` if there is only one.
MOE_INLINE void two_largest(const int32_t* keys, int64_t n, int32_t& first, int32_t& second) {
  if (n <= 8) {
    first = keys[0];
    second = excluded;
    for (int64_t i = 1; i < n; i++) {
      second = std::max(second, std::min(first, keys[i]));
      first = std::max(first, keys[i]);
    }
    return;
  }
  i32v best = splat(excluded), next = best;
  for (int64_t i = 0; i < n; i += lanes) {
    const i32v x = load_some(keys + i, static_cast<int>(std::min<int64_t>(lanes, n - i)), excluded);
    next = larger(next, select(x < best, x, best));
    best = larger(best, x);
  }
  first = largest(best);
  const int lane = first_lane(best == splat(first));
  const i32v rest = without(best, lane);
  second = std::max(largest(rest), static_cast<int32_t>(next[lane]));
}

struct Router {
  int64_t N, E, K, groups, top_groups;
  bool softmax, top2, normalize;
  float scale;

  explicit Router(Args& args) {
    N = args.size();
    E = args.size();
    K = args.size();
    groups = args.size();
    top_groups = args.size();
    softmax = args.flag();
    top2 = args.flag();
    normalize = args.flag();
    scale = args.f32();
  }
  int64_t padded(int64_t n) const { return static_cast<int64_t>(round_up(static_cast<size_t>(n), 16)); }

  // The key by which a group is ranked: the sum of its two largest biased scores, or its largest one. In the latter case any NaN ranks it last, as the
  // maximum would be NaN.
  int32_t group_key(const int32_t* keys, const float* choice, int64_t n) const {
    int32_t first, second;
    two_largest(keys, n, first, second);
    if (top2) return n == 1 ? first : key_of(value_of(first) + value_of(second));
    for (int64_t i = 0; i < n; i++) {
      if (choice[i] != choice[i]) return key_of(lowest);
    }
    return first;
  }

  // `choice` [padded E] floats, `keys` [padded E], `group_keys` [padded groups]
  void row(const float* logits, const float* bias, float* weights, int32_t* indices, float* scores, float* choice, int32_t* keys,
           int32_t* group_keys) const {
    if (softmax) {
      row_softmax(E, logits, scores);
    } else {
      each_vector(E, [&](int64_t i, int count) { store_some(scores + i, sigmoid(load_some(logits + i, count)), count); });
    }
    each_vector(E, [&](int64_t i, int count) {
      const f32v c = load_some(scores + i, count) + load_some(bias + i, count);
      store_some(choice + i, c, count);
      store_some(keys + i, key_of(c), count);
    });
    if (top_groups < groups) {
      const int64_t size = E / groups;
      for (int64_t g = 0; g < groups; g++) group_keys[g] = group_key(keys + g * size, choice + g * size, size);
      // Mark selected groups with the largest key. No other group can have it, because as a float it is a NaN.
      constexpr int32_t kept = std::numeric_limits<int32_t>::max();
      int64_t chosen[64];
      if (top_groups <= 64) {
        for (int64_t i = 0; i < top_groups; i++) chosen[i] = take_largest(group_keys, padded(groups));
        for (int64_t i = 0; i < top_groups; i++) group_keys[chosen[i]] = kept;
      } else {
        for (int64_t i = 0; i < top_groups; i++) {
          int64_t best = -1;
          for (int64_t g = 0; g < groups; g++) {
            if (group_keys[g] != kept && (best < 0 || group_keys[g] > group_keys[best])) best = g;
          }
          group_keys[best] = kept;
        }
      }
      for (int64_t g = 0; g < groups; g++) {
        if (group_keys[g] == kept) continue;
        for (int64_t i = g * size; i < (g + 1) * size; i++) keys[i] = excluded;
      }
    }
    float total = 0;
    for (int64_t k = 0; k < K; k++) {
      const int64_t e = take_largest(keys, padded(E));
      indices[k] = static_cast<int32_t>(e);
      weights[k] = scores[e];
      total += scores[e];
    }
    const float divisor = normalize ? total + 1e-20f : 1;
    for (int64_t k = 0; k < K; k++) weights[k] = weights[k] / divisor * scale;
  }
};

}  // namespace

// weights, indices, scores, logits, bias, N, E, K, groups, topGroups, softmax, top2, normalize, scale
MOE_KERNEL(moe_router_topk_fwd_f32) {
  float* weights = args.ptr<float>();
  int32_t* indices = args.ptr<int32_t>();
  float* scores = args.ptr<float>();
  const float* logits = args.ptr<const float>();
  const float* bias = args.ptr<const float>();
  const Router router(args);
  const int64_t E = router.E, K = router.K, padded = router.padded(E), padded_groups = router.padded(router.groups);
  const size_t each = static_cast<size_t>(2 * padded + padded_groups) * 4;
  Scratch scratch(each * static_cast<size_t>(max_threads()));
  parallel_for(router.N, 4096 / (E * (2 + K / 4) + 16), [&](int64_t begin, int64_t end, int worker) {
    float* choice = scratch.as<float>(each * static_cast<size_t>(worker));
    int32_t* keys = reinterpret_cast<int32_t*>(choice + padded);
    int32_t* group_keys = keys + padded;
    std::fill(keys, keys + padded + padded_groups, excluded);
    for (int64_t n = begin; n < end; n++) {
      router.row(logits + n * E, bias, weights + n * K, indices + n * K, scores + n * E, choice, keys, group_keys);
    }
  });
}

// dlogits, scores, indices, dweights, dscores, then as above
MOE_KERNEL(moe_router_topk_bwd_f32) {
  float* dlogits = args.ptr<float>();
  const float* scores = args.ptr<const float>();
  const int32_t* indices = args.ptr<const int32_t>();
  const float* dweights = args.ptr<const float>();
  const float* dscores = args.ptr<const float>();
  const Router router(args);
  const int64_t E = router.E, K = router.K;
  parallel_for(router.N, 8192 / std::max<int64_t>(1, E + 4 * K), [&](int64_t begin, int64_t end, int) {
    for (int64_t n = begin; n < end; n++) {
      const float *s = scores + n * E, *dw = dweights + n * K;
      const int32_t* index = indices + n * K;
      float* d = dlogits + n * E;
      std::memcpy(d, dscores + n * E, static_cast<size_t>(E) * 4);
      float total = 1e-20f, dot = 0;
      if (router.normalize) {
        for (int64_t k = 0; k < K; k++) {
          total += s[index[k]];
          dot += dw[k] * s[index[k]];
        }
      }
      for (int64_t k = 0; k < K; k++) d[index[k]] += router.scale * (router.normalize ? (dw[k] - dot / total) / total : dw[k]);
      if (router.softmax) {
        const f32v mean = splat(row_sum(E, [&](int64_t i, int count) { return load_some(d + i, count) * load_some(s + i, count); }));
        each_vector(E, [&](int64_t i, int count) {
          store_some(d + i, load_some(s + i, count) * (load_some(d + i, count) - mean), count);
        });
      } else {
        each_vector(E, [&](int64_t i, int count) {
          const f32v score = load_some(s + i, count);
          store_some(d + i, load_some(d + i, count) * score * (splat(1.0f) - score), count);
        });
      }
    }
  });
}
