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
// How long a helper stays awake after a job. Longer than the gaps between ops of one step, shorter than anyone notices in `top`.
constexpr auto awake = std::chrono::microseconds(80);

thread_local int call_threads = 1;
thread_local int inside_worker = -1;

inline void pause() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// One job at a time. `gate` = epoch << 16 | open << 15 | helpers inside. A helper joins by a compare-and-swap on an open
// gate, so it can only ever see the fields of the job that it joined; the caller closes the gate when no task is left to take,
// and waits only for helpers that are inside. A helper that the system runs too late therefore costs nothing.
class Pool {
 public:
  void run(int64_t count, int threads, void (*fn)(void*, int64_t, int), void* context) {
    grow(threads - 1);
    fn_ = fn;
    context_ = context;
    count_ = count;
    limit_ = std::min(threads - 1, helpers_);
    next_.store(0, std::memory_order_relaxed);
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
  static constexpr uint64_t open_bit = 1 << 15;
  static constexpr uint64_t inside_mask = open_bit - 1;

  void grow(int wanted) {
    while (helpers_ < wanted) {
      try {
        std::thread([this, index = helpers_ + 1] { help(index); }).detach();
      } catch (const std::exception&) {
        return;  // The system gives no more threads: go on with those we have.
      }
      helpers_++;
    }
  }

  void work(int worker) {
    inside_worker = worker;
    for (;;) {
      const int64_t task = next_.fetch_add(1, std::memory_order_relaxed);
      if (task >= count_) break;
      try {
        fn_(context_, task, worker);
      } catch (...) {
        std::lock_guard<std::mutex> lock(sleep_mutex_);
        if (!failure_) failure_ = std::current_exception();
      }
    }
    inside_worker = -1;
  }

  // Joins the open job, if there is one that this helper has not served yet.
  bool join(int worker, uint64_t& served) {
    uint64_t gate = gate_.load(std::memory_order_acquire);
    while ((gate & open_bit) && gate >> 16 != served) {
      if (!gate_.compare_exchange_weak(gate, gate + 1, std::memory_order_acq_rel)) continue;
      served = gate >> 16;
      if (worker <= limit_) work(worker);
      gate_.fetch_sub(1, std::memory_order_release);
      return true;
    }
    return false;
  }

  void help(int worker) {
    uint64_t served = 0;
    for (;;) {
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
      wake_.wait(lock, [&] {
        const uint64_t gate = gate_.load(std::memory_order_seq_cst);
        return (gate & open_bit) && gate >> 16 != served;
      });
      sleepers_.fetch_sub(1, std::memory_order_relaxed);
    }
  }

  alignas(64) std::atomic<uint64_t> gate_{0};
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) void (*fn_)(void*, int64_t, int) = nullptr;
  void* context_ = nullptr;
  int64_t count_ = 0;
  int limit_ = 0;
  int helpers_ = 0;
  std::exception_ptr failure_;
  std::atomic<int> sleepers_{0};
  std::mutex sleep_mutex_;
  std::condition_variable wake_;
};

// Never destroyed: helpers may still sleep in it while the process ends. A forked child has no helpers and gets a new one.
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
