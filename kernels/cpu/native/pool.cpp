#include "pool.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace ryzanstein {
namespace {

// Spins between looks at a flag before giving the core away; about 20 microseconds.
constexpr int kSpins = 2000;

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

void futex_wait(std::atomic<uint32_t>* word, uint32_t expected) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), FUTEX_WAIT_PRIVATE, expected, nullptr,
          nullptr, 0);
}

void futex_wake(std::atomic<uint32_t>* word) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), FUTEX_WAKE_PRIVATE, 1 << 30, nullptr,
          nullptr, 0);
}

}  // namespace

Pool::Pool(int threads) {
  for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { work(); });
}

Pool::~Pool() {
  stop_.store(true);
  awake_.fetch_add(1);
  futex_wake(&awake_);
  for (auto& worker : workers_) worker.join();
}

// `awake_` is odd while a step runs; workers sleep on an even value.
void Pool::begin() {
  if (workers_.empty()) return;
  awake_.fetch_add(1, std::memory_order_release);
  futex_wake(&awake_);
}

void Pool::end() {
  if (!workers_.empty()) awake_.fetch_add(1, std::memory_order_release);
}

void Pool::dispatch(Call call, const void* body, int64_t count, int64_t grain) {
  call_.store(call, std::memory_order_relaxed);
  body_.store(body, std::memory_order_relaxed);
  count_.store(count, std::memory_order_relaxed);
  grain_.store(grain, std::memory_order_relaxed);
  done_.store(0, std::memory_order_relaxed);
  ticket_.store(++jobs_ << 32, std::memory_order_release);
  while (claim_and_run()) {
  }
  for (int spins = 0; done_.load(std::memory_order_acquire) != count; ++spins) {
    relax();
    // A worker without a core cannot finish: give it ours.
    if (spins > kSpins) sched_yield();
  }
  ticket_.store(0, std::memory_order_seq_cst);
}

// Runs the next piece, if there is one left.
bool Pool::claim_and_run() {
  uint64_t ticket = ticket_.load(std::memory_order_acquire);
  for (;;) {
    if (ticket == 0) return false;
    const int64_t first = static_cast<int64_t>(ticket & 0xffffffff);
    const Call call = call_.load(std::memory_order_relaxed);
    const void* body = body_.load(std::memory_order_relaxed);
    const int64_t count = count_.load(std::memory_order_relaxed);
    const int64_t grain = grain_.load(std::memory_order_relaxed);
    if (first >= count) return false;
    const int64_t last = first + grain < count ? first + grain : count;
    const uint64_t next = (ticket & ~uint64_t{0xffffffff}) | static_cast<uint64_t>(last);
    if (ticket_.compare_exchange_weak(ticket, next, std::memory_order_acq_rel,
                                      std::memory_order_acquire)) {
      call(body, first, last);
      done_.fetch_add(last - first, std::memory_order_release);
      return true;
    }
  }
}

void Pool::work() {
  for (int spins = 0;; ++spins) {
    if (stop_.load(std::memory_order_relaxed)) return;
    if (claim_and_run()) {
      spins = 0;
      continue;
    }
    relax();
    if (spins < kSpins) continue;
    spins = 0;
    const uint32_t awake = awake_.load(std::memory_order_acquire);
    if (awake % 2 == 0) {
      futex_wait(&awake_, awake);
    } else {
      sched_yield();
    }
  }
}

}  // namespace ryzanstein
