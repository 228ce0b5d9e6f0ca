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

Pool::Pool(int threads, uint64_t jobs) : tickets_(static_cast<size_t>(threads)), jobs_(jobs) {
  // All at once: the number of threads may not change under a worker's eyes.
  std::vector<std::thread> workers(static_cast<size_t>(threads - 1));
  workers_.swap(workers);
  try {
    for (int i = 1; i < threads; ++i) workers_[i - 1] = std::thread([this, i] { work(i); });
  } catch (...) {
    stop();
    throw;
  }
}

Pool::~Pool() { stop(); }

void Pool::stop() {
  stop_.store(true);
  awake_.fetch_add(1);
  futex_wake(&awake_);
  for (auto& worker : workers_) {
    if (worker.joinable()) worker.join();
  }
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
  // A ticket has room for 32 bits of it, and a ticket of zero means that no job is open.
  if (static_cast<uint32_t>(++jobs_) == 0) ++jobs_;
  const int64_t pieces = (count + grain - 1) / grain;
  for (int i = threads() - 1; i >= 0; --i) {
    const uint64_t first = static_cast<uint64_t>(span(pieces, i));
    tickets_[i].next.store(jobs_ << 32 | first, std::memory_order_release);
  }
  while (claim_and_run(0)) {
  }
  for (int spins = 0; done_.load(std::memory_order_acquire) != count; ++spins) {
    relax();
    // A worker without a core cannot finish: give it ours.
    if (spins > kSpins) sched_yield();
  }
  for (Ticket& ticket : tickets_) ticket.next.store(0, std::memory_order_seq_cst);
}

// Runs the next piece, if there is one left.
bool Pool::claim_and_run(int thread) {
  for (int i = 0; i < threads(); ++i) {
    if (claim_from((thread + i) % threads())) return true;
  }
  return false;
}

bool Pool::claim_from(int span_of) {
  std::atomic<uint64_t>& next = tickets_[span_of].next;
  uint64_t ticket = next.load(std::memory_order_acquire);
  while (ticket != 0) {
    const int64_t piece = static_cast<int64_t>(ticket & 0xffffffff);
    const Call call = call_.load(std::memory_order_relaxed);
    const void* body = body_.load(std::memory_order_relaxed);
    const int64_t count = count_.load(std::memory_order_relaxed);
    const int64_t grain = grain_.load(std::memory_order_relaxed);
    if (piece >= span((count + grain - 1) / grain, span_of + 1)) return false;
    if (next.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel,
                                   std::memory_order_acquire)) {
      const int64_t first = piece * grain, last = first + grain < count ? first + grain : count;
      call(body, first, last);
      done_.fetch_add(last - first, std::memory_order_release);
      return true;
    }
  }
  return false;
}

void Pool::work(int thread) {
  for (int spins = 0;; ++spins) {
    if (stop_.load(std::memory_order_relaxed)) return;
    if (claim_and_run(thread)) {
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
