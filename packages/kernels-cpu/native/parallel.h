// The thread pool. The caller also works; helpers spin for a moment between ops and then sleep.
//
// Which thread runs what is decided at run time, but the result must not depend on it. A task's result may depend on its index and on the
// sizes of the problem, but not on the worker, the number of threads or the order of tasks: then 1 and 2 threads give the same bits.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

namespace moe {

// Number of threads that this call may use, including the caller. Workers are numbered 0 .. max_threads() - 1.
int max_threads();

// Runs fn(context, task, worker) for every task in 0 .. count - 1 and returns when all are done. Inside a task, and while another JavaScript
// thread uses the pool, everything runs on the caller as worker 0 (nested calls: as the worker that makes the call).
void run_tasks(int64_t count, void (*fn)(void* context, int64_t task, int worker), void* context);

// Calls fn(task, worker). For uneven work: many tasks of fixed content, taken by whichever thread is free.
template <class F>
void parallel_tasks(int64_t count, F&& fn) {
  using Body = std::remove_reference_t<F>;
  run_tasks(
      count, [](void* context, int64_t task, int worker) { (*static_cast<Body*>(context))(task, worker); },
      const_cast<void*>(static_cast<const void*>(&fn)));
}

// Calls fn(begin, end, worker) for pieces of 0 .. n. `grain`: the minimum number of items per thread (about 10 us of work). Piece borders
// are multiples of `align`, so that partial vectors only occur at n. Borders depend on the number of threads, so items must be
// independent. To combine partial results, use parallel_tasks with a count that depends on the sizes only.
template <class F>
void parallel_for(int64_t n, int64_t grain, F&& fn, int64_t align = 1) {
  if (n <= 0) return;
  const int64_t most = std::max<int64_t>(1, n / std::max<int64_t>(1, grain));
  const int64_t pieces = std::min<int64_t>(most, max_threads() == 1 ? 1 : int64_t{2} * max_threads());
  if (pieces <= 1) return fn(int64_t{0}, n, 0);
  const int64_t blocks = (n + align - 1) / align;
  parallel_tasks(pieces, [&](int64_t piece, int worker) {
    const int64_t begin = blocks * piece / pieces * align;
    const int64_t end = std::min(n, blocks * (piece + 1) / pieces * align);
    if (begin < end) fn(begin, end, worker);
  });
}

// A fixed division of 0 .. n for partial results: the number of chunks depends on n only.
struct Chunks {
  int64_t n, count;
  Chunks(int64_t items, int64_t per_chunk, int64_t most = 64)
      : n(items), count(std::max<int64_t>(1, std::min<int64_t>(most, (items + per_chunk - 1) / per_chunk))) {}
  int64_t begin(int64_t i) const { return n * i / count; }
  int64_t end(int64_t i) const { return n * (i + 1) / count; }
};

}  // namespace moe
