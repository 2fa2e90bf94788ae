// moe-isa: baseline
// A stable counting sort of (token, choice) slots by expert.
#include "moe.h"

using namespace moe;

// order, positions, offsets, counts, indices, slots, experts
MOE_KERNEL(moe_dispatch_plan_i32) {
  int32_t* order = args.ptr<int32_t>();
  int32_t* positions = args.ptr<int32_t>();
  int32_t* offsets = args.ptr<int32_t>();
  int32_t* counts = args.ptr<int32_t>();
  const int32_t* indices = args.ptr<const int32_t>();
  const int64_t slots = args.size(), experts = args.size();
  const Chunks chunks(slots, 16384, 32);
  // next[chunk][expert]: first the number of slots, then the position of the next slot.
  Scratch scratch(static_cast<size_t>(chunks.count * experts) * 4);
  int32_t* next = scratch.as<int32_t>();
  parallel_tasks(chunks.count, [&](int64_t chunk, int) {
    int32_t* own = next + chunk * experts;
    std::memset(own, 0, static_cast<size_t>(experts) * 4);
    for (int64_t s = chunks.begin(chunk); s < chunks.end(chunk); s++) {
      const int32_t e = indices[s];
      if (e < 0 || e >= experts) throw Error("slot %lld has expert %d, need 0 to %d", static_cast<long long>(s), e, static_cast<int>(experts) - 1);
      own[e]++;
    }
  });
  int32_t at = 0;
  for (int64_t e = 0; e < experts; e++) {
    offsets[e] = at;
    for (int64_t chunk = 0; chunk < chunks.count; chunk++) {
      const int32_t count = next[chunk * experts + e];
      next[chunk * experts + e] = at;
      at += count;
    }
    counts[e] = at - offsets[e];
  }
  offsets[experts] = at;
  parallel_tasks(chunks.count, [&](int64_t chunk, int) {
    int32_t* own = next + chunk * experts;
    for (int64_t s = chunks.begin(chunk); s < chunks.end(chunk); s++) {
      const int32_t position = own[indices[s]]++;
      positions[s] = position;
      order[position] = static_cast<int32_t>(s);
    }
  });
}
