// The selection of experts and its gradient. One warp per token; kernels end in _e<maximum number of experts>.
//
// Legend: N tokens, E experts, K experts per token. Lane l holds the `Per` consecutive experts from l * Per on in
// registers, so of equal experts, the lowest lane has the first.
#include "choice.cuh"

constexpr int warps = 4;

struct Router {
  int E, K, groups, topGroups;
  bool softmax, top2, normalize;
  float scale;
};

// Affinities of a token from its logits; zeros after the last expert.
template <int Per>
MOE_DEVICE void score(float (&s)[Per], const float* logits, int first, const Router& r) {
  eachExpertFour<Per>([&](int j) {
    const Four x = load4<false>(logits, first + j, r.E, -infinity());
    for (int k = 0; k < 4; k++) s[j + k] = x.v[k];
  });
  if (!r.softmax) {
    for (int j = 0; j < Per; j++) s[j] = sigmoid(s[j]);
    return;
  }
  float top = -infinity(), total = 0.f;
  for (int j = 0; j < Per; j++) top = maxOrNan(top, s[j]);
  top = warpMax(top);
  for (int j = 0; j < Per; j++) {
    s[j] = expf(s[j] - (top == -infinity() ? 0.f : top));
    total += s[j];
  }
  total = warpSum(total);
  const float factor = 1.f / (total < 1e-37f ? 1e-37f : total);
  for (int j = 0; j < Per; j++) s[j] *= factor;
}

template <int Per>
MOE_DEVICE void route(float* weights, int* indices, float* scores, const float* logits, const float* bias, int64_t n,
                      const Router& r, float* shared) {
  const int lane = (int)threadIdx.x % 32, first = lane * Per;
  float s[Per], choice[Per];
  int key[Per];
  score<Per>(s, logits + n * r.E, first, r);
  eachExpertFour<Per>([&](int j) {
    store4<false>(scores + n * r.E, first + j, r.E, Four{{s[j], s[j + 1], s[j + 2], s[j + 3]}});
    const Four b = load4<false>(bias, first + j, r.E);
    for (int k = 0; k < 4; k++) {
      choice[j + k] = s[j + k] + b.v[k];
      key[j + k] = first + j + k < r.E ? keyOf(choice[j + k]) : excluded;
    }
  });
  if (r.topGroups < r.groups) {
    const int size = r.E / r.groups, lanes = lanesPerGroup(r.groups);
    for (int j = 0; j < Per; j++) {
      if (first + j < r.E) shared[spread(first + j)] = choice[j];
    }
    __syncwarp();
    const unsigned kept = keptGroups(shared, size, lanes, r.groups, r.topGroups, r.top2);
    int group = first / size, member = first % size;
    for (int j = 0; j < Per; j++) {
      if (first + j < r.E && !(kept >> (group * lanes) & 1u)) key[j] = excluded;
      if (++member == size) {
        member = 0;
        group++;
      }
    }
  }
  // Selects the K best one after the other; `best` is the lane's best remaining expert.
  int bestKey, best;
  float bestScore;
  const auto findBest = [&] {
    bestKey = key[0];
    best = 0;
    bestScore = s[0];
    for (int j = 1; j < Per; j++) {
      if (key[j] > bestKey) {
        bestKey = key[j];
        best = j;
        bestScore = s[j];
      }
    }
  };
  findBest();
  int expert = 0;  // the expert of choice number `lane`
  float weight = 0.f, total = 0.f;
  for (int k = 0; k < r.K; k++) {
    const int winner = __ffs(__ballot_sync(wholeWarp, bestKey == warpLargest(bestKey))) - 1;
    const int chosen = __shfl_sync(wholeWarp, first + best, winner);
    const float chosenScore = __shfl_sync(wholeWarp, bestScore, winner);
    total += chosenScore;
    if (lane == k) {
      expert = chosen;
      weight = chosenScore;
    }
    if (lane == winner) {
      for (int j = 0; j < Per; j++) {
        if (j == best) key[j] = excluded;
      }
      findBest();
    }
  }
  if (lane >= r.K) return;
  indices[n * r.K + lane] = expert;
  weights[n * r.K + lane] = weight / (r.normalize ? total + 1e-20f : 1.f) * r.scale;
}

template <int Per>
MOE_DEVICE void routeGradient(float* dlogits, const float* scores, const int* indices, const float* dweights,
                              const float* dscores, int64_t n, const Router& r) {
  const int lane = (int)threadIdx.x % 32, first = lane * Per;
  const float *own = scores + n * r.E, *dw = dweights + n * r.K;
  const int* index = indices + n * r.K;
  const auto scoreOf = [&](int e) { return e >= 0 && e < r.E ? own[e] : 0.f; };
  float s[Per], d[Per];
  eachExpertFour<Per>([&](int j) {
    const Four x = load4<false>(own, first + j, r.E), dx = load4<false>(dscores + n * r.E, first + j, r.E);
    for (int k = 0; k < 4; k++) {
      s[j + k] = x.v[k];
      d[j + k] = dx.v[k];
    }
  });
  float total = 0.f, dot = 0.f;
  if (r.normalize) {
    for (int k = lane; k < r.K; k += 32) {
      const float x = scoreOf(index[k]);
      total += x;
      dot += dw[k] * x;
    }
    total = warpSum(total) + 1e-20f;
    dot = warpSum(dot) / total;
  }
  for (int k = 0; k < r.K; k++) {
    const float change = r.scale * (r.normalize ? (dw[k] - dot) / total : dw[k]);
    const int place = index[k] - first;
    for (int j = 0; j < Per; j++) d[j] += j == place ? change : 0.f;
  }
  float mean = 0.f;
  if (r.softmax) {
    for (int j = 0; j < Per; j++) mean += d[j] * s[j];
    mean = warpSum(mean);
  }
  eachExpertFour<Per>([&](int j) {
    const Four dx = four([&](int k) { return s[j + k] * (r.softmax ? d[j + k] - mean : d[j + k] * (1.f - s[j + k])); });
    store4<false>(dlogits + n * r.E, first + j, r.E, dx);
  });
}

#define ROUTER(most)                                                                                                     \
  MOE_KERNEL((warps * 32), moe_router_topk_fwd_f32_e##most,                                                              \
             (float* weights, int* indices, float* scores, const float* logits, const float* bias, int64_t N, int E,     \
              int K, int groups, int topGroups, int softmax, int top2, int normalize, float scale)) {                    \
    MOE_SHARED(float, choices, [warps][spread(most)]);                                                                   \
    const int warp = (int)threadIdx.x / 32;                                                                              \
    const int64_t n = (int64_t)blockIdx.x * warps + warp;                                                                \
    if (n >= N) return;                                                                                                  \
    const Router r{E, K, groups, topGroups, softmax != 0, top2 != 0, normalize != 0, scale};                             \
    route<most / 32>(weights, indices, scores, logits, bias, n, r, choices[warp]);                                       \
  }                                                                                                                      \
  MOE_KERNEL((warps * 32), moe_router_topk_bwd_f32_e##most,                                                              \
             (float* dlogits, const float* scores, const int* indices, const float* dweights, const float* dscores,      \
              int64_t N, int E, int K, int groups, int topGroups, int softmax, int top2, int normalize, float scale)) {  \
    const int64_t n = (int64_t)blockIdx.x * warps + (int)threadIdx.x / 32;                                               \
    if (n >= N) return;                                                                                                  \
    const Router r{E, K, groups, topGroups, softmax != 0, top2 != 0, normalize != 0, scale};                             \
    routeGradient<most / 32>(dlogits, scores, indices, dweights, dscores, n, r);                                         \
  }

ROUTER(128)
ROUTER(256)
ROUTER(512)
