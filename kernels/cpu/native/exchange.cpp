#include "exchange.h"

#include <sched.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <system_error>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace ryzanstein {
namespace {

constexpr int kMostRanks = 63;
constexpr int64_t kRowGrain = 4;
// Looks at a flag before the core is given away, and before a look is worth a sleep: about ten
// microseconds, since another rank may wait for this very core, then some milliseconds.
constexpr int kSpins = 200, kYields = 5000;

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

}  // namespace

int64_t Exchange::bytes(int ranks, int64_t slot) {
  return static_cast<int64_t>(sizeof(Head)) + 2 * ranks * slot;
}

Exchange::Exchange(int fd, int rank, int ranks, int64_t slot)
    : rank_(rank), ranks_(ranks), slot_(slot), size_(bytes(ranks, slot)) {
  if (ranks < 1 || ranks > kMostRanks || rank < 0 || rank >= ranks || slot < 64 || slot % 64) {
    throw std::invalid_argument("no such rank, or a slot that is no multiple of 64 bytes");
  }
  struct stat status;
  if (fstat(fd, &status) != 0) throw std::system_error(errno, std::generic_category(), "fstat");
  if (status.st_size < size_) throw std::invalid_argument("the shared memory is too small");
  void* p = mmap(nullptr, static_cast<size_t>(size_), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (p == MAP_FAILED) throw std::system_error(errno, std::generic_category(), "mmap");
  head_ = static_cast<Head*>(p);
  data_ = static_cast<uint8_t*>(p) + sizeof(Head);
}

Exchange::~Exchange() { munmap(head_, static_cast<size_t>(size_)); }

float* Exchange::slot(int rank) const {
  const int64_t place = static_cast<int64_t>(turn_ % 2) * ranks_ + rank;
  return reinterpret_cast<float*>(data_ + place * slot_);
}

int64_t Exchange::rows_at_once(int64_t width) const {
  const int64_t rows = slot_ / (width * static_cast<int64_t>(sizeof(float)));
  if (rows < 1) throw std::invalid_argument("a row is larger than a slot of the shared memory");
  return rows;
}

// Nobody can be two turns ahead: who has met everyone in turn n knows that all have read turn n - 1.
void Exchange::meet() {
  const uint64_t turn = ++turn_;
  head_->arrived[rank_].turn.store(turn, std::memory_order_release);
  for (int r = 0; r < ranks_; ++r) {
    for (int spins = 0; head_->arrived[r].turn.load(std::memory_order_acquire) < turn; ++spins) {
      if (head_->aborted.load(std::memory_order_acquire)) {
        throw std::runtime_error("another rank has given up");
      }
      relax();
      if (spins < kSpins) continue;
      if (spins < kYields) {
        sched_yield();
      } else {
        const timespec pause{0, 50'000};
        nanosleep(&pause, nullptr);
      }
    }
  }
  if (head_->aborted.load(std::memory_order_acquire)) {
    throw std::runtime_error("another rank has given up");
  }
}

void Exchange::gather(Pool& pool, const float* in, int64_t rows,
                      const std::vector<int64_t>& widths, float* out) {
  if (static_cast<int>(widths.size()) != ranks_) {
    throw std::invalid_argument("a gather has one width a rank");
  }
  const int64_t own = widths[static_cast<size_t>(rank_)];
  const int64_t total = std::accumulate(widths.begin(), widths.end(), int64_t{0});
  const int64_t most = rows_at_once(*std::max_element(widths.begin(), widths.end()));
  for (int64_t done = 0; done < rows; done += most) {
    const int64_t count = std::min(most, rows - done);
    // What this turn's places are is settled before `meet` begins the next.
    const float* parts[kMostRanks];
    for (int r = 0; r < ranks_; ++r) parts[r] = slot(r);
    std::memcpy(slot(rank_), in + done * own, static_cast<size_t>(count * own) * sizeof(float));
    meet();
    pool.run(count, kRowGrain, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        float* target = out + (done + row) * total;
        for (int r = 0; r < ranks_; ++r) {
          const int64_t width = widths[static_cast<size_t>(r)];
          std::memcpy(target, parts[r] + row * width, static_cast<size_t>(width) * sizeof(float));
          target += width;
        }
      }
    });
  }
}

void Exchange::sum(Pool& pool, const float* in, int64_t rows, int64_t width, float* out) {
  const int64_t most = rows_at_once(width);
  for (int64_t done = 0; done < rows; done += most) {
    const int64_t count = std::min(most, rows - done);
    const float* parts[kMostRanks];
    for (int r = 0; r < ranks_; ++r) parts[r] = slot(r);
    std::memcpy(slot(rank_), in + done * width, static_cast<size_t>(count * width) * sizeof(float));
    meet();
    pool.run(count, kRowGrain, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        float* target = out + (done + row) * width;
        std::memcpy(target, parts[0] + row * width, static_cast<size_t>(width) * sizeof(float));
        for (int r = 1; r < ranks_; ++r) {
          const float* part = parts[r] + row * width;
          for (int64_t i = 0; i < width; ++i) target[i] += part[i];
        }
      }
    });
  }
}

}  // namespace ryzanstein
