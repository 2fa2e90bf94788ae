// Ranking of affinities, for experts and groups.
//
// Ranking compares integer keys that order like the floats: NaN counts as -Infinity, zeros of both signs are equal, and
// what cannot be selected is below -Infinity.
#pragma once
#include "four.cuh"

constexpr int excluded = -2147483647 - 1;

MOE_DEVICE int keyOf(float x) {
  const int bits = (int)asBits((x != x ? -infinity() : x) + 0.f);  // -0 + 0 = 0
  return bits ^ (bits >> 31 & 0x7fffffff);
}
MOE_DEVICE float valueOf(int key) { return asFloat((uint32_t)(key ^ (key >> 31 & 0x7fffffff))); }

/// Every lane gets the largest key of all lanes.
MOE_DEVICE int warpLargest(int key) { return joinLanes<Max>(key, 32); }

/// f(j) for j = 0, 4, .. below Per.
template <int Per, class F>
MOE_DEVICE void eachExpertFour(F&& f) {
#pragma unroll
  for (int j = 0; j < Per; j += 4) f(j);
}

/// The index of expert e in shared memory. Groups of 32 start in different banks.
MOE_DEVICE constexpr int spread(int e) { return e + e / 32; }

/// The number of lanes that rank a group together, a power of two. There are at most 32 groups.
MOE_DEVICE int lanesPerGroup(int groups) {
  int lanes = 32;
  while (lanes * groups > 32) lanes /= 2;
  return lanes;
}

/// Selects the topGroups best groups, each of `size` experts: by the sum of their two best choices (top2), or by their
/// best one. In the latter case NaN ranks a group last, because the maximum would be NaN. Group g is bit g * lanes of
/// the result.
MOE_DEVICE unsigned keptGroups(const float* choices, int size, int lanes, int groups, int topGroups, bool top2) {
  const int lane = (int)threadIdx.x % 32, group = lane / lanes;
  int first = excluded, second = excluded;
  bool isNan = false;
  if (group < groups) {
    for (int i = lane % lanes; i < size; i += lanes) {
      const float x = choices[spread(group * size + i)];
      const int key = keyOf(x);
      second = max(second, min(first, key));
      first = max(first, key);
      isNan = isNan || x != x;
    }
  }
  for (int step = 1; step < lanes; step *= 2) {
    const int otherFirst = __shfl_xor_sync(wholeWarp, first, step), otherSecond = __shfl_xor_sync(wholeWarp, second, step);
    second = max(min(first, otherFirst), max(second, otherSecond));
    first = max(first, otherFirst);
    isNan = __shfl_xor_sync(wholeWarp, (int)isNan, step) != 0 || isNan;
  }
  int key = isNan ? keyOf(-infinity()) : first;
  if (top2) key = size == 1 ? first : keyOf(valueOf(first) + valueOf(second));
  int before = 0;  // the number of groups that rank before this one
  for (int other = 0; other < groups; other++) {
    const int otherKey = __shfl_sync(wholeWarp, key, other * lanes);
    before += otherKey > key || (otherKey == key && other < group);
  }
  return __ballot_sync(wholeWarp, group < groups && before < topGroups);
}
