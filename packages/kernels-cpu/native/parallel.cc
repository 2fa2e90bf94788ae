// moe-isa: baseline
#include "parallel.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#elif defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

#include "abi.h"
#include "runtime.h"

namespace moe {
namespace {

constexpr int most_threads = 256;
// How long a helper spins after a job: longer than the gaps between ops of a step, but short enough not to waste CPU time noticeably.
constexpr auto awake = std::chrono::microseconds(80);

thread_local int call_threads = 1;
thread_local int inside_worker = -1;

inline void pause() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("isb");  // A few dozen cycles; `yield` does nothing on most machines.
#endif
}

#if defined(__linux__)
inline int current_cpu() { return sched_getcpu(); }

// On a busy machine the scheduler tends to wake a helper on its caller's CPU, where it can only alternate with the caller, and leaves it
// there for milliseconds. Excluding that CPU briefly moves it immediately.
void leave(int cpu) {
  cpu_set_t allowed, others;
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
  others = allowed;
  CPU_CLR(cpu, &others);
  if (CPU_COUNT(&others) == 0) return;
  if (sched_setaffinity(0, sizeof others, &others) == 0) sched_setaffinity(0, sizeof allowed, &allowed);
}
#else
inline int current_cpu() { return -1; }
void leave(int) {}
#endif

// Runs one job at a time. `gate` = epoch << 16 | open << 15 | helpers inside. A helper joins with a compare-and-swap on an open gate, so it
// only sees the fields of the job that it joined. The caller closes the gate when no tasks are left and only waits for helpers that are
// inside, so a helper that the system schedules too late costs nothing.
class Pool {
 public:
  void run(int64_t count, int threads, void (*fn)(void*, int64_t, int), void* context) {
    grow(threads - 1);
    fn_ = fn;
    context_ = context;
    threads_ = threads;
    const int cpu = current_cpu();
    if (cpu != caller_cpu_.load(std::memory_order_relaxed)) caller_cpu_.store(cpu, std::memory_order_relaxed);
    for (int t = 0; t < threads; t++) {
      shares_[t].next.store(count * t / threads, std::memory_order_relaxed);
      shares_[t].end = count * (t + 1) / threads;
    }
    failure_ = nullptr;
    const uint64_t epoch = (gate_.load(std::memory_order_relaxed) >> 16) + 1;
    gate_.store(epoch << 16 | open_bit, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) > 0) {
      std::lock_guard<std::mutex> lock(sleep_mutex_);
      wake_.notify_all();
    }
    work(0);
    gate_.fetch_and(~uint64_t{open_bit}, std::memory_order_acq_rel);
    for (int spins = 0; (gate_.load(std::memory_order_acquire) & inside_mask) != 0; spins++) {
      if (spins < 20000) {
        pause();
      } else {
        std::this_thread::yield();
      }
    }
    if (failure_) std::rethrow_exception(failure_);
  }

  std::mutex busy;

 private:
  // The tasks that a thread takes first.
  struct alignas(64) Share {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };

  static constexpr uint64_t open_bit = 1 << 15;
  static constexpr uint64_t inside_mask = open_bit - 1;

  void grow(int wanted) {
    while (helpers_ < wanted) {
      try {
        std::thread([this, index = helpers_ + 1] { help(index); }).detach();
      } catch (const std::exception&) {
        return;  // The system provides no more threads: continue with those we have.
      }
      helpers_++;
    }
  }

  void work(int worker) {
    inside_worker = worker;
    // Its own share first: from op to op the same thread then works on about the same rows, which are still in its cache.
    for (int i = 0; i < threads_; i++) work_on(shares_[(worker + i) % threads_], worker);
    inside_worker = -1;
  }

  void work_on(Share& share, int worker) {
    while (share.next.load(std::memory_order_relaxed) < share.end) {
      const int64_t task = share.next.fetch_add(1, std::memory_order_relaxed);
      if (task >= share.end) return;
      try {
        fn_(context_, task, worker);
      } catch (...) {
        std::lock_guard<std::mutex> lock(sleep_mutex_);
        if (!failure_) failure_ = std::current_exception();
      }
    }
  }

  // Joins the open job, if this helper has not served it yet.
  bool join(int worker, uint64_t& served) {
    uint64_t gate = gate_.load(std::memory_order_acquire);
    // Before joining: afterwards the caller waits for this helper, even while it is queued for a CPU.
    if ((gate & open_bit) && gate >> 16 != served && step_aside()) gate = gate_.load(std::memory_order_acquire);
    while ((gate & open_bit) && gate >> 16 != served) {
      if (!gate_.compare_exchange_weak(gate, gate + 1, std::memory_order_acq_rel)) continue;
      served = gate >> 16;
      if (worker < threads_) work(worker);
      gate_.fetch_sub(1, std::memory_order_release);
      return true;
    }
    return false;
  }

  // Moves this helper away if it is on its caller's CPU; returns whether it was.
  bool step_aside() {
    const int cpu = current_cpu();
    if (cpu < 0 || cpu != caller_cpu_.load(std::memory_order_relaxed)) return false;
    leave(cpu);
    return true;
  }

  void help(int worker) {
    uint64_t served = 0;
    for (;;) {
      const uint64_t seen = gate_.load(std::memory_order_acquire) >> 16;
      const auto until = std::chrono::steady_clock::now() + awake;
      bool joined = false;
      do {
        for (int i = 0; i < 32 && !joined; i++) {
          joined = join(worker, served);
          if (!joined) pause();
        }
      } while (!joined && std::chrono::steady_clock::now() < until);
      if (joined) continue;
      std::unique_lock<std::mutex> lock(sleep_mutex_);
      sleepers_.fetch_add(1, std::memory_order_seq_cst);
      // Any job since the last check wakes it, even one that is already done, because the next one is probably close.
      wake_.wait(lock, [&] { return gate_.load(std::memory_order_seq_cst) >> 16 != seen; });
      sleepers_.fetch_sub(1, std::memory_order_relaxed);
      lock.unlock();
      step_aside();
    }
  }

  alignas(64) std::atomic<uint64_t> gate_{0};
  Share shares_[most_threads];
  alignas(64) void (*fn_)(void*, int64_t, int) = nullptr;
  void* context_ = nullptr;
  int threads_ = 0;
  int helpers_ = 0;
  std::atomic<int> caller_cpu_{-1};
  std::exception_ptr failure_;
  std::atomic<int> sleepers_{0};
  std::mutex sleep_mutex_;
  std::condition_variable wake_;
};

// Never destroyed, because helpers may still sleep in it while the process exits. A forked child has no helpers and gets a new pool.
std::atomic<Pool*> shared{nullptr};

Pool& pool() {
  Pool* found = shared.load(std::memory_order_acquire);
  if (found) return *found;
  Pool* fresh = new Pool;
  if (shared.compare_exchange_strong(found, fresh)) {
#if defined(__unix__) || defined(__APPLE__)
    static std::once_flag once;
    std::call_once(once, [] { pthread_atfork(nullptr, nullptr, [] { shared.store(nullptr); }); });
#endif
    return *fresh;
  }
  delete fresh;
  return *found;
}

}  // namespace

int max_threads() { return call_threads; }

void set_call_threads(int threads) { call_threads = std::max(1, std::min(threads, most_threads)); }

void run_tasks(int64_t count, void (*fn)(void*, int64_t, int), void* context) {
  if (count <= 0) return;
  const int threads = static_cast<int>(std::min<int64_t>(call_threads, count));
  if (inside_worker < 0 && threads > 1) {
    Pool& own = pool();
    std::unique_lock<std::mutex> lock(own.busy, std::try_to_lock);
    if (lock.owns_lock()) return own.run(count, threads, fn, context);
  }
  const int worker = std::max(0, inside_worker);
  for (int64_t task = 0; task < count; task++) fn(context, task, worker);
}

}  // namespace moe
