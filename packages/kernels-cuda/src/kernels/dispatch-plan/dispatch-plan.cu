// A stable counting sort of (token, choice) slots by expert. Each block has `share` consecutive slots, and each of its
// warps an eighth of them, in order. A slot's position is its expert's offset, plus the number of the expert's slots in
// earlier blocks, in earlier warps, and earlier in its own warp.
#include "moe.cuh"

constexpr int warps = 8;
constexpr int threads = warps * 32;

// The expert of slot s. Out-of-range indices violate the op's contract; they are clamped, so that nothing is written
// out of bounds.
MOE_DEVICE int expertOf(const int* indices, int s, int E) { return min(max(indices[s], 0), E - 1); }

// Calls f(s, expert, peers) for the slots of this warp, 32 at a time and in order. All lanes call it. peers: the lanes
// whose slots have the same expert, 0 for lanes without a slot.
template <class F>
MOE_DEVICE void eachSlot(const int* indices, int slots, int share, int E, F&& f) {
  const int warpShare = share / warps;
  const int begin = (int)blockIdx.x * share + (int)threadIdx.x / 32 * warpShare;
  for (int at = begin; at < begin + warpShare; at += 32) {
    const int s = at + (int)threadIdx.x % 32;
    const int expert = s < slots ? expertOf(indices, s, E) : 0;
    unsigned peers = __ballot_sync(wholeWarp, s < slots);
    for (int bit = 1; bit < E; bit *= 2) {
      const unsigned set = __ballot_sync(wholeWarp, (expert & bit) != 0);
      peers &= expert & bit ? set : ~set;
    }
    f(s, expert, s < slots ? peers : 0u);
  }
}

// Counts the slots of each warp in its row of counts [warps][E], which must be zero.
MOE_DEVICE void countPerWarp(int* counts, const int* indices, int slots, int share, int E) {
  int* own = counts + (int)threadIdx.x / 32 * E;
  const int lane = (int)threadIdx.x % 32;
  eachSlot(indices, slots, share, E, [&](int, int expert, unsigned peers) {
    if (peers != 0 && __ffs(peers) - 1 == lane) own[expert] += __popc(peers);
    __syncwarp();
  });
}

MOE_DEVICE void clear(int* counts, int n) {
  for (int i = (int)threadIdx.x; i < n; i += threads) counts[i] = 0;
  __syncthreads();
}

// blockCounts [blocks, E]: the number of slots of each block by expert.
MOE_KERNEL((threads), moe_dispatch_plan_count_i32, (int* blockCounts, const int* indices, int slots, int share, int E)) {
  MOE_DYNAMIC_SHARED(memory);
  int* counts = reinterpret_cast<int*>(memory);  // [E]
  clear(counts, E);
  const int begin = (int)blockIdx.x * share, end = min(begin + share, slots);
  for (int s = begin + (int)threadIdx.x; s < end; s += threads) atomicAdd(&counts[expertOf(indices, s, E)], 1);
  __syncthreads();
  for (int e = (int)threadIdx.x; e < E; e += threads) blockCounts[(int64_t)blockIdx.x * E + e] = counts[e];
}

// Replaces starts[e] by the sum of starts[0 .. e-1], and sets `total` to the sum of all. Called by one warp.
MOE_DEVICE void exclusiveScan(int* starts, int E, int* total) {
  const int lane = (int)threadIdx.x % 32;
  int before = 0;
  for (int first = 0; first < E; first += 32) {
    const int own = first + lane < E ? starts[first + lane] : 0;
    int sum = own;
    for (int step = 1; step < 32; step *= 2) {
      const int left = __shfl_up_sync(wholeWarp, sum, step);
      if (lane >= step) sum += left;
    }
    if (first + lane < E) starts[first + lane] = before + sum - own;
    before += __shfl_sync(wholeWarp, sum, 31);
  }
  if (lane == 0) *total = before;
}

// Every block computes the offsets of all experts from the counts of all blocks. It recounts its own slots, so that a
// single block needs no table.
MOE_KERNEL((threads), moe_dispatch_plan_place_i32,
           (int* order, int* positions, int* offsets, int* counts, const int* indices, const int* blockCounts, int slots,
            int share, int E)) {
  MOE_DYNAMIC_SHARED(memory);
  int* next = reinterpret_cast<int*>(memory);  // [warps][E]: counts of a warp, then the position of its next slot
  int* starts = next + warps * E;              // [E]: counts of all blocks, then the experts' offsets
  int* total = starts + E;
  const int thread = (int)threadIdx.x;
  clear(next, warps * E);
  countPerWarp(next, indices, slots, share, E);
  __syncthreads();
  for (int e = thread; e < E; e += threads) {
    int own = 0;
    for (int w = 0; w < warps; w++) own += next[w * E + e];
    int before = 0, all = own;
#pragma unroll 8
    for (int b = 0; b < (int)gridDim.x; b++) {
      if (b == (int)blockIdx.x) {
        before = all - own;
      } else {
        all += blockCounts[(int64_t)b * E + e];
      }
    }
    starts[e] = all;
    int at = before;
    for (int w = 0; w < warps; w++) {
      const int count = next[w * E + e];
      next[w * E + e] = at;
      at += count;
    }
    if (blockIdx.x == 0) counts[e] = all;
  }
  __syncthreads();
  if (thread < 32) exclusiveScan(starts, E, total);
  __syncthreads();
  if (blockIdx.x == 0) {
    for (int e = thread; e < E; e += threads) offsets[e] = starts[e];
    if (thread == 0) offsets[E] = *total;
  }
  int* own = next + thread / 32 * E;
  const unsigned below = (1u << thread % 32) - 1;
  eachSlot(indices, slots, share, E, [&](int s, int expert, unsigned peers) {
    const int start = peers != 0 ? own[expert] : 0;
    __syncwarp();
    if (peers != 0) {
      const int position = starts[expert] + start + __popc(peers & below);
      positions[s] = position;
      order[position] = s;
      if ((peers & below) == 0) own[expert] = start + __popc(peers);
    }
    __syncwarp();
  });
}
