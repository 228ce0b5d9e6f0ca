#include "pool.h"

#include <algorithm>

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

// Jobs that are put up before workers are missed; some 100 microseconds, twice what waking one takes.
constexpr int kPatience = 4;

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

Pool::Pool(int threads)
    : boards_(static_cast<size_t>(threads) + 1), places_(static_cast<size_t>(threads)) {
  for (Board& board : boards_) {
    const size_t count = &board == boards_.data() ? static_cast<size_t>(threads) : 1;
    std::vector<Span> spans(count);
    std::vector<Tally> run(count);
    board.spans.swap(spans);
    board.run.swap(run);
  }
  // All at once: the number of threads may not change under a worker's eyes.
  std::vector<std::thread> workers(static_cast<size_t>(threads - 1));
  workers_.swap(workers);
  try {
    for (int i = 1; i < threads; ++i) workers_[i - 1] = std::thread([this, i] { work(static_cast<size_t>(i)); });
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
  places_[0].core.store(sched_getcpu(), std::memory_order_relaxed);
  looks_ = 0;
  awake_.fetch_add(1, std::memory_order_release);
  futex_wake(&awake_);
}

void Pool::end() {
  if (!workers_.empty()) awake_.fetch_add(1, std::memory_order_release);
}

void Pool::dispatch(Call call, const void* body, int64_t count, int64_t grain, Board& board) {
  const size_t thread = caller();
  settle(thread);
  const bool strand = &board != boards_.data();
  const int64_t spans = static_cast<int64_t>(board.spans.size());
  grain = std::max(grain, (count + kMostPieces - 1) / kMostPieces);
  const int64_t pieces = (count + grain - 1) / grain;
  ++board.jobs;
  board.put_up += static_cast<uint64_t>(pieces);
  for (int64_t i = spans; i-- > 0;) {
    // The first piece is this thread's: it begins at once, while others' cores are still told.
    const int64_t first = std::max<int64_t>(1, first_of(pieces, i, spans)), end = first_of(pieces, i + 1, spans);
    Span& span = board.spans[static_cast<size_t>(i)];
    span.call.store(call, std::memory_order_relaxed);
    span.body.store(body, std::memory_order_relaxed);
    span.count.store(count, std::memory_order_relaxed);
    span.grain.store(grain, std::memory_order_relaxed);
    span.next.store(static_cast<uint64_t>(board.jobs) << 32 | static_cast<uint64_t>(end << 16 | first),
                    std::memory_order_release);
  }
  call(body, 0, grain);
  board.ran(thread);
  while (board.claim_and_run(thread)) {
  }
  for (int spins = 0; !board.all_ran(); ++spins) {
    // A strand's thread has its own work to go on with.
    if (!strand && help(thread)) spins = 0;
    relax();
    // A worker without a core cannot finish: give it ours.
    if (spins > kSpins) sched_yield();
  }
}

bool Pool::Board::claim_and_run(size_t thread) {
  for (size_t i = 0; i < spans.size(); ++i) {
    if (claim_from((thread + i) % spans.size(), thread)) return true;
  }
  return false;
}

bool Pool::Board::claim_from(size_t number, size_t thread) {
  Span& span = spans[number];
  uint64_t ticket = span.next.load(std::memory_order_acquire);
  for (;;) {
    const int64_t piece = static_cast<int64_t>(ticket & 0xffff), end = static_cast<int64_t>(ticket >> 16 & 0xffff);
    if (piece >= end) return false;
    const Call call = span.call.load(std::memory_order_relaxed);
    const void* body = span.body.load(std::memory_order_relaxed);
    const int64_t count = span.count.load(std::memory_order_relaxed);
    const int64_t grain = span.grain.load(std::memory_order_relaxed);
    if (span.next.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel, std::memory_order_acquire)) {
      call(body, piece * grain, std::min((piece + 1) * grain, count));
      ran(thread);
      return true;
    }
  }
}

void Pool::Board::ran(size_t thread) { run[thread % run.size()].pieces.fetch_add(1, std::memory_order_release); }

bool Pool::Board::all_ran() const {
  uint64_t pieces = 0;
  for (const Tally& tally : run) pieces += tally.pieces.load(std::memory_order_acquire);
  return pieces == put_up;
}

bool Pool::help(size_t thread) {
  for (size_t i = 1; i < boards_.size(); ++i) {
    if (boards_[i].claim_and_run(thread)) return true;
  }
  return false;
}

size_t Pool::caller() const {
  const std::thread::id here = std::this_thread::get_id();
  for (size_t i = 0; i < workers_.size(); ++i) {
    if (workers_[i].get_id() == here) return i + 1;
  }
  return 0;
}

void Pool::settle(size_t thread) {
  const int core = sched_getcpu();
  if (core < 0) return;  // the system does not say
  places_[thread].core.store(core, std::memory_order_relaxed);
  if (thread == 0) {
    if (++looks_ == kPatience && !all_came()) sched_yield();
    return;
  }
  const uint32_t step = awake_.load(std::memory_order_acquire);
  if (places_[thread].moved == step) return;
  for (size_t other = 0; other < thread; ++other) {
    if (places_[other].core.load(std::memory_order_relaxed) != core) continue;
    places_[thread].moved = step;
    leave_core(thread);
    places_[thread].core.store(sched_getcpu(), std::memory_order_relaxed);
    return;
  }
}

void Pool::leave_core(size_t thread) const {
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof(allowed), &allowed) != 0) return;  // more cores than it has room for
  cpu_set_t others = allowed;
  for (size_t other = 0; other < places_.size(); ++other) {
    const int core = places_[other].core.load(std::memory_order_relaxed);
    if (other != thread && core >= 0 && core < CPU_SETSIZE) CPU_CLR(core, &others);
  }
  if (CPU_COUNT(&others) == 0 || sched_setaffinity(0, sizeof(others), &others) != 0) return;
  sched_setaffinity(0, sizeof(allowed), &allowed);
}

bool Pool::all_came() const {
  for (size_t thread = 1; thread < places_.size(); ++thread) {
    if (places_[thread].core.load(std::memory_order_relaxed) == kAsleep) return false;
  }
  return true;
}

void Pool::work(size_t thread) {
  for (int spins = 0;; ++spins) {
    if (stop_.load(std::memory_order_relaxed)) return;
    if (boards_[0].claim_and_run(thread) || help(thread)) {
      spins = 0;
      continue;
    }
    relax();
    if (spins < kSpins) continue;
    spins = 0;
    const uint32_t awake = awake_.load(std::memory_order_acquire);
    if (awake % 2 == 0) {
      places_[thread].core.store(kAsleep, std::memory_order_relaxed);
      futex_wait(&awake_, awake);
      settle(thread);
    } else {
      settle(thread);
      sched_yield();
    }
  }
}

}  // namespace ryzanstein
