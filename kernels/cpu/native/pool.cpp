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
  generation_.fetch_add(1);
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

void Pool::dispatch(Task task, void* context) {
  task_ = task;
  context_ = context;
  next_.store(0, std::memory_order_relaxed);
  running_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
  generation_.fetch_add(1, std::memory_order_release);
  task(context);
  for (int spins = 0; running_.load(std::memory_order_acquire) != 0; ++spins) {
    relax();
    // A worker without a core cannot finish: give it ours.
    if (spins > kSpins) sched_yield();
  }
}

void Pool::work() {
  uint32_t seen = 0;
  for (;;) {
    int spins = 0;
    while (generation_.load(std::memory_order_acquire) == seen) {
      if (stop_.load(std::memory_order_relaxed)) return;
      relax();
      if (++spins > kSpins) {
        uint32_t awake = awake_.load(std::memory_order_acquire);
        if (awake % 2 == 0) {
          // Checked again after reading `awake_`: work handed out in between is not slept over.
          if (generation_.load(std::memory_order_acquire) == seen &&
              !stop_.load(std::memory_order_relaxed)) {
            futex_wait(&awake_, awake);
          }
        } else {
          sched_yield();
        }
        spins = 0;
      }
    }
    if (stop_.load(std::memory_order_relaxed)) return;
    ++seen;
    task_(context_);
    running_.fetch_sub(1, std::memory_order_release);
  }
}

}  // namespace ryzanstein
